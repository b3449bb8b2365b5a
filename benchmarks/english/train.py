"""Brings a cut model back: it learns to say what the dense model says.

Loss: the Kullback-Leibler divergence from the dense model over all tokens, half of the answers' cross-entropy
and a little of a balance loss (Switch Transformer, arXiv:2101.03961, Eq. 4). Embeddings stay as they are. The
run writes its whole state now and then and finds its place again.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from mixture import Mixture
from rows import batches
from torch import Tensor

from melinoe.data.encoding import Encoded

CROSS_ENTROPY, BALANCE = 0.5, 0.02
LEARNING_RATE, ROUTER_LEARNING_RATE = 4e-4, 2e-3
WARM_UP, DECAY = 10, 0.3
TOKENS_AT_ONCE = {"cpu": 256, "cuda": 4096}  # of which logits are held
LOG_EVERY = {"cpu": 1, "cuda": 10}  # steps: what is logged is waited for


def train(
    dense: Any,
    model: Any,
    rows: list[Encoded],
    folder: Path,
    steps: int,
    *,
    stop_at: int | None = None,
    seconds: float | None = None,
    tokens: int = 2048,
    learning_rate: float = LEARNING_RATE,
    save_seconds: float = 400.0,
) -> None:
    """Trains `model` (layers are Mixtures) in place, where it is; state and log.jsonl go to `folder`.

    Args:
        steps: of the whole run, those of an earlier part included. The rate falls over the last DECAY of it.
        stop_at: save and return after this step of it; None: at the end.
        seconds: that this call may take; the rate falls to 0 by then if the steps are not done before.
        tokens: of a step, padding included.
        learning_rate: of everything but the routers.
        save_seconds: how often the state is written.
    """
    began, device = time.monotonic(), model.device
    dense.eval().to(device)
    for parameter in dense.parameters():  # and not the frequencies of its rotary embedding
        parameter.data = parameter.data.to(torch.bfloat16)
    model.train()
    model.get_input_embeddings().weight.requires_grad_(False)
    routers = [module.router for module in model.modules() if isinstance(module, Mixture)]
    known = {id(router) for router in routers}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in known]
    groups = [{"params": others, "rate": learning_rate}, {"params": routers, "rate": ROUTER_LEARNING_RATE}]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    step = _resume(folder, model, optimizer)
    last = steps if stop_at is None else min(stop_at, steps)
    pad, saved, seen = model.config.pad_token_id, time.monotonic(), 0
    epoch, lines = 0, _Log(folder / "log.jsonl")
    while step < last:
        for batch in batches(rows, tokens, pad, epoch):
            seen += 1
            if seen <= step:  # an earlier part of the run had it
                continue
            done = step / steps
            if seconds is not None:
                done = max(done, (time.monotonic() - began) / seconds)
            share = max(0.0, min(1.0, (step + 1) / WARM_UP, (1 - done) / DECAY))
            losses = _gradients(dense, model, batch)
            losses["norm"] = torch.nn.utils.clip_grad_norm_(others + routers, 1.0)
            for group in optimizer.param_groups:
                group["lr"] = group["rate"] * share
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            lines.add({"step": step, **losses, "lr": learning_rate * share})
            last_of_all = step == last or done >= 1
            if last_of_all or step % LOG_EVERY[device.type] == 0:
                lines.write()
            if last_of_all or time.monotonic() - saved > save_seconds:
                _save(folder, model, optimizer, step)
                saved = time.monotonic()
            if last_of_all:
                return
        epoch += 1


class _Log:
    """Lines of numbers; those that are tensors are waited for when lines are written."""

    def __init__(self, path: Path) -> None:
        self.path, self.lines, self.since = path, list[dict[str, Any]](), time.monotonic()

    def add(self, line: dict[str, Any]) -> None:
        self.lines.append(line)

    def write(self) -> None:
        read = [{name: round(float(value), 6) for name, value in line.items()} for line in self.lines]
        now = time.monotonic()
        with self.path.open("a") as file:
            for line in read:
                line["step"], line["seconds"] = int(line["step"]), round((now - self.since) / len(read), 6)
                file.write(json.dumps(line) + "\n")
        self.lines, self.since = [], now


def _gradients(dense: Any, model: Any, batch: dict[str, Tensor]) -> dict[str, Any]:
    """One forward and backward pass of one batch. Padding stands on the right, where nothing real sees it.

    What is counted or looked for in the batch is found before it goes to the device, which is never waited
    for.
    """
    device, real = model.device, batch["attention_mask"].bool()
    predicts = real[:, 1:]  # the place before each real token
    places = torch.cat([predicts, torch.zeros_like(predicts[:, :1])], dim=1).flatten().nonzero()[:, 0]
    targets, answers = batch["input_ids"][:, 1:][predicts], batch["answers"][:, 1:][predicts]
    count = max(1, int(answers.sum()))
    ids, places, targets, answers = (
        one.to(device, non_blocking=True) for one in (batch["input_ids"], places, targets, answers)
    )
    with torch.no_grad():
        teacher = dense.model(ids, use_cache=False).last_hidden_state
    with torch.autocast(device.type, torch.bfloat16):
        student = model.model(ids, use_cache=False).last_hidden_state
    hidden, wanted = (one.flatten(0, 1).index_select(0, places) for one in (student, teacher))
    gradient, divergence, entropy = _output_gradient(
        hidden.detach(), wanted, targets, answers, count, model.get_output_embeddings().weight
    )
    mixtures = [module for module in model.modules() if isinstance(module, Mixture)]
    balance = torch.stack([mixture.balance for mixture in mixtures]).mean()
    torch.autograd.backward([hidden, BALANCE * balance], [gradient, None])
    return {"kl": divergence, "nll": entropy, "balance": balance.detach(), "tokens": len(targets)}


@torch.no_grad()
def _output_gradient(
    student: Tensor, teacher: Tensor, targets: Tensor, answers: Tensor, count: int, embeddings: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss's gradient by the last hidden states [N, H], a few tokens at a time; divergence and NLL.

    count: tokens of answers.

    The logits of all tokens at once would be most of the memory and of the time: what is kept is their
    product with the embeddings.
    """
    weights = embeddings.to(torch.bfloat16)
    gradient = torch.empty_like(student)
    each = CROSS_ENTROPY / count
    divergence = entropy = torch.zeros((), device=student.device)
    at_once = TOKENS_AT_ONCE[student.device.type]
    for start in range(0, len(student), at_once):
        part = slice(start, start + at_once)
        said = (student[part].to(torch.bfloat16) @ weights.T).float().log_softmax(-1)
        wanted = (teacher[part] @ weights.T).float().log_softmax(-1)
        target, answer = targets[part, None], answers[part, None]
        entropy = entropy - (said.gather(1, target) * answer).sum()
        probable = wanted.exp()
        divergence = divergence + torch.linalg.vecdot(probable, wanted.sub_(said)).sum()
        said.exp_()
        logits = torch.sub(said, probable, out=probable).div_(len(student))
        logits.addcmul_(said, each * answer)
        logits.scatter_add_(1, target, -each * answer)
        gradient[part] = (logits.to(torch.bfloat16) @ weights).to(gradient.dtype)
    return gradient, divergence / len(student), entropy / count


def _save(folder: Path, model: Any, optimizer: Any, step: int) -> None:
    state = {"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(state, folder / "state.part")
    os.replace(folder / "state.part", folder / "state.pt")


def _resume(folder: Path, model: Any, optimizer: Any) -> int:
    if not (folder / "state.pt").exists():
        return 0
    state = torch.load(folder / "state.pt", map_location="cpu")
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])

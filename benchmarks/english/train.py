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
TOKENS_AT_ONCE = 256


def train(
    dense: Any,
    model: Any,
    rows: list[Encoded],
    folder: Path,
    steps: int,
    *,
    stop_at: int | None = None,
    tokens: int = 2048,
    save_seconds: float = 400.0,
) -> None:
    """Trains `model` (layers are Mixtures) in place; state and log.jsonl go to `folder`.

    Args:
        steps: of the whole run, those of an earlier part included. The rate falls over the last DECAY of it.
        stop_at: save and return after this step of it; None: at the end.
        tokens: of a step, padding included.
        save_seconds: how often the state is written.
    """
    dense.eval().to(torch.bfloat16)
    model.train()
    model.get_input_embeddings().weight.requires_grad_(False)
    routers = [module.router for module in model.modules() if isinstance(module, Mixture)]
    known = {id(router) for router in routers}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in known]
    groups = [{"params": others, "rate": LEARNING_RATE}, {"params": routers, "rate": ROUTER_LEARNING_RATE}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    step = _resume(folder, model, optimizer)
    last = steps if stop_at is None else min(stop_at, steps)
    pad, saved, seen = model.config.pad_token_id, time.monotonic(), 0
    epoch = 0
    while step < last:
        for batch in batches(rows, tokens, pad, epoch):
            seen += 1
            if seen <= step:  # an earlier part of the run had it
                continue
            began = time.monotonic()
            losses = _gradients(dense, model, batch)
            norm = torch.nn.utils.clip_grad_norm_(others + routers, 1.0)
            share = min(1.0, (step + 1) / WARM_UP, (steps - step) / (DECAY * steps))
            for group in optimizer.param_groups:
                group["lr"] = group["rate"] * share
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            line = {"step": step, **losses, "norm": norm.item(), "lr": LEARNING_RATE * share}
            line["seconds"] = time.monotonic() - began
            with (folder / "log.jsonl").open("a") as log:
                log.write(json.dumps({k: round(v, 6) for k, v in line.items()}) + "\n")
            if step == last or time.monotonic() - saved > save_seconds:
                _save(folder, model, optimizer, step)
                saved = time.monotonic()
            if step == last:
                return
        epoch += 1


def _gradients(dense: Any, model: Any, batch: dict[str, Tensor]) -> dict[str, float]:
    """One forward and backward pass of one batch. Padding stands on the right, where nothing real sees it."""
    ids, real = batch["input_ids"], batch["attention_mask"].bool()
    with torch.no_grad():
        teacher = dense.model(ids).last_hidden_state
    with torch.autocast("cpu", torch.bfloat16):
        student = model.model(ids).last_hidden_state
    predicts = real[:, 1:]  # the place before each real token
    targets, answers = ids[:, 1:][predicts], batch["answers"][:, 1:][predicts]
    hidden = student[:, :-1][predicts]
    gradient, divergence, entropy = _output_gradient(
        hidden.detach(), teacher[:, :-1][predicts], targets, answers, model.get_output_embeddings().weight
    )
    mixtures = [module for module in model.modules() if isinstance(module, Mixture)]
    balance = torch.stack([mixture.balance for mixture in mixtures]).mean()
    torch.autograd.backward([hidden, BALANCE * balance], [gradient, None])
    return {"kl": divergence, "nll": entropy, "balance": balance.item(), "tokens": len(targets)}


@torch.no_grad()
def _output_gradient(
    student: Tensor, teacher: Tensor, targets: Tensor, answers: Tensor, embeddings: Tensor
) -> tuple[Tensor, float, float]:
    """The loss's gradient by the last hidden states [N, H], a few tokens at a time.

    The logits of all tokens at once would be most of the memory and of the time: what is kept is their
    product with the embeddings.
    """
    weights = embeddings.to(torch.bfloat16)
    gradient = torch.empty_like(student)
    each = CROSS_ENTROPY / max(1, int(answers.sum()))
    divergence = entropy = 0.0
    for start in range(0, len(student), TOKENS_AT_ONCE):
        part = slice(start, start + TOKENS_AT_ONCE)
        said = (student[part].to(torch.bfloat16) @ weights.T).float().log_softmax(-1)
        wanted = (teacher[part] @ weights.T).float().log_softmax(-1)
        target, answer = targets[part, None], answers[part, None]
        entropy -= (said.gather(1, target) * answer).sum().item()
        probable = wanted.exp()
        divergence += torch.linalg.vecdot(probable, wanted.sub_(said)).sum().item()
        said.exp_()
        logits = torch.sub(said, probable, out=probable).div_(len(student))
        logits.addcmul_(said, each * answer)
        logits.scatter_add_(1, target, -each * answer)
        gradient[part] = (logits.to(torch.bfloat16) @ weights).to(gradient.dtype)
    return gradient, divergence / len(student), entropy / max(1, int(answers.sum()))


def _save(folder: Path, model: Any, optimizer: Any, step: int) -> None:
    state = {"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(state, folder / "state.part")
    os.replace(folder / "state.part", folder / "state.pt")


def _resume(folder: Path, model: Any, optimizer: Any) -> int:
    if not (folder / "state.pt").exists():
        return 0
    state = torch.load(folder / "state.pt")
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])

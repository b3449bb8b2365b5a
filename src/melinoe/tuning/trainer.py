"""`tune`: model and data in, adapter folder out. The verb; the loop stands in loop.py."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from melinoe.config import resolve_model
from melinoe.data import Encoded, encode_rows, read_rows
from melinoe.errors import MelinoeError
from melinoe.moe import MoeLayer, experts_per_token, fingerprint, moe_layers
from melinoe.offload.adapter import write_adapter
from melinoe.offload.low_rank import EXPERTS_FUNCTION, attach_low_rank, tuning_experts
from melinoe.tuning.batches import Batches, plan_batches
from melinoe.tuning.loop import CHECKPOINT, LOG, STATE, LocalityTrainer
from melinoe.tuning.progress import TuningProgress
from melinoe.tuning.settings import TuneSettings
from melinoe.undecorated import has_flat_experts, take_over

RUN = "run.json"


def tune(
    model: str | Path,
    data: str | Path,
    output_dir: str | Path,
    *,
    overwrite: bool = False,
    progress: bool = True,
    **settings: Any,
) -> dict[str, Any]:
    """Tunes the routers (fully) and the experts (low rank) of a checkpoint for expert locality.

    Args:
        model: checkpoint folder or Hub id; opened, never written.
        data: a .jsonl file or a folder with train.jsonl (melinoe.data).
        output_dir: the adapter folder to write; apply it with `--adapter` or fold it in with `merge`.
        overwrite: replace what stands in `output_dir`, and do not resume an interrupted run.
        progress: a live line on stderr.
        settings: the fields of TuneSettings.

    Returns:
        {"output_dir", "steps", "seconds", "tokens", "nll", "misses", "rank", "total", "skipped_steps",
        "base_fingerprint", "fingerprint", "resumed_from"}; losses are means over the last tenth of the run.

    Raises:
        MelinoeError: settings out of range, a dense or offloaded model, no usable rows, or an output folder
            that holds something else.
        KeyboardInterrupt: as it came; OUTPUT.partial keeps the last checkpoint and the next call resumes.
    """
    unknown = sorted(set(settings) - {field.name for field in fields(TuneSettings)})
    if unknown:
        allowed = ", ".join(field.name for field in fields(TuneSettings))
        raise MelinoeError("tune: unknown settings", got=", ".join(unknown), allowed=allowed)
    chosen = TuneSettings(**settings)
    output = Path(output_dir)
    if output.exists() and not (output.is_dir() and not any(output.iterdir())) and not overwrite:
        raise MelinoeError(
            f"{output} exists already", next_step="choose another folder, or overwrite it (--overwrite)"
        )
    started = time.monotonic()
    model = resolve_model(model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    encoded = [row for _, row in encode_rows(tokenizer, read_rows(data), chosen.max_length)]
    device = chosen.device or ("cuda" if torch.cuda.is_available() else "cpu")
    network, layers = prepare_model(model, chosen, device)
    base_fingerprint = fingerprint(network)
    work = output.with_name(output.name + ".partial")
    identity = _identity(chosen, base_fingerprint, encoded)
    resume = _open_run(work, identity, overwrite)
    resumed_from = json.loads((resume / STATE).read_text())["global_step"] if resume else None
    plan = plan_batches([len(row.ids) for row in encoded], chosen.batch_tokens, chosen.max_steps, chosen.seed)
    batches = Batches(encoded, plan, tokenizer.pad_token_id or 0)
    with _quiet(), TuningProgress(progress, chosen.max_steps) as bar:
        trainer = LocalityTrainer(
            network, layers, batches, chosen, work, _tokens_per_step(encoded, plan), device, bar
        )
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    steps = trainer.state.global_step
    result = {
        "steps": steps,
        "seconds": round(time.monotonic() - started, 2),
        "tokens": sum(len(encoded[row].ids) for rows in plan[:steps] for row in rows),
        **_last_losses(work / LOG),
        "skipped_steps": trainer.skipped_steps,
        "resumed_from": resumed_from,
        "rows": len(encoded),
        "slots": max(trainer.losses.capacities),
    }
    card = write_adapter(
        network,
        output,
        base=str(model),
        base_fingerprint=base_fingerprint,
        settings=chosen.as_dict(),
        result=result,
        keep=(work / LOG,),
    )
    shutil.rmtree(work, ignore_errors=True)
    prints = {key: card[key] for key in ("base_fingerprint", "fingerprint")}
    return {"output_dir": str(output), **prints, **result}


def prepare_model(model: str | Path, settings: TuneSettings, device: str) -> tuple[nn.Module, list[MoeLayer]]:
    """Loads a checkpoint for tuning: everything frozen but float32 routers and fresh low-rank factors.

    Raises:
        MelinoeError: not a mixture-of-experts model, or its experts are offloaded.
    """
    dtype = settings.dtype or ("float32" if device == "cpu" else "auto")
    network = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32 if dtype == "float32" else "auto"
    )
    network.config.output_router_logits = False  # its load-balancing loss fights locality
    layers = moe_layers(network)
    network.requires_grad_(False)
    if has_flat_experts(network):
        raise MelinoeError(
            "this family can be paged and traced, but not tuned: an adapter cannot name one of its experts",
            got=type(network).__name__,
            allowed="a model whose experts weights are [experts, in, out]",
        )
    generator = torch.Generator().manual_seed(settings.seed)
    for layer in layers:
        if next(layer.experts.parameters(recurse=False), None) is None:
            raise MelinoeError(
                "an offloaded model cannot be tuned",
                got=model,
                next_step="tune the checkpoint it was converted from",
            )
        settings.capacity(layer.num_experts, experts_per_token(network))  # refuses before any work
        attach_low_rank(layer.experts, settings.rank, settings.alpha, generator)
        layer.experts.low_rank.requires_grad_(settings.form.experts)
        layer.router.float().requires_grad_(True)
        if network.dtype != torch.float32:
            layer.router.register_forward_pre_hook(_float32_inputs)
    if not take_over(network, tuning_experts):
        network.set_experts_implementation(EXPERTS_FUNCTION)
    return network, layers


def _float32_inputs(_router: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x.float() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in inputs)


def _tokens_per_step(encoded: list[Encoded], plan: list[list[int]]) -> tuple[float, float]:
    """(completion tokens, scored tokens) of an average batch."""
    completion = sum(len(encoded[row].ids) - encoded[row].prompt_length for rows in plan for row in rows)
    rows = sum(map(len, plan))
    return completion / len(plan), (completion - rows) / len(plan)


def _identity(settings: TuneSettings, base_fingerprint: str, encoded: list[Encoded]) -> dict[str, Any]:
    """What a run must share with an interrupted one to resume it."""
    digest = hashlib.sha256(json.dumps([row.ids for row in encoded]).encode()).hexdigest()[:16]
    return {"settings": settings.as_dict(), "base_fingerprint": base_fingerprint, "data": digest}


def _open_run(work: Path, identity: dict[str, Any], overwrite: bool) -> Path | None:
    """Makes the work folder; the checkpoint to resume from if an interrupted run is the same one."""
    try:
        same = not overwrite and json.loads((work / RUN).read_text()) == identity
    except (OSError, ValueError):
        same = False
    if not same:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        (work / RUN).write_text(json.dumps(identity))
    checkpoint = work / CHECKPOINT
    return checkpoint if (checkpoint / STATE).is_file() else None


def _last_losses(log: Path) -> dict[str, float | None]:
    records = [json.loads(line) for line in log.read_text().splitlines()]
    records = records[-max(1, len(records) // 10) :]
    means: dict[str, float | None] = {}
    for name in ("total", "nll", "misses", "rank", "hit_rate", "divergence"):
        values = [record[name] for record in records if record.get(name) is not None]
        means[name] = round(sum(values) / len(values), 5) if values else None
    return means


class _quiet:
    """Keeps Trainer's remarks (INFO and WARNING of its loggers) out of our progress line."""

    names = ("transformers.trainer", "accelerate")

    def __enter__(self) -> None:
        self.levels = [logging.getLogger(name).level for name in self.names]
        for name in self.names:
            logging.getLogger(name).setLevel(logging.ERROR)

    def __exit__(self, *_: object) -> None:
        for name, level in zip(self.names, self.levels, strict=True):
            logging.getLogger(name).setLevel(level)

"""`tune`: model and data in, adapter folder out. The verb; the loop stands in trainer.py."""

from __future__ import annotations

import json
import logging
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from melinoe.adapters.peft_folder import Base, write_adapter
from melinoe.data.rows import Encoded, describe_rows, encode_rows, read_rows
from melinoe.errors import MelinoeError
from melinoe.files import partial_of
from melinoe.models.folder import local_folder, resolve_model
from melinoe.models.layers import experts_per_token, fingerprint
from melinoe.tuning.batches import Batches, padding_share, plan_batches
from melinoe.tuning.evaluation import Evaluation
from melinoe.tuning.memory.needed import TuningMemory, batch_shape, device_of, memory_needed
from melinoe.tuning.memory.pages import paging
from melinoe.tuning.model import prepare_model
from melinoe.tuning.parallel.processes import Processes
from melinoe.tuning.parallel.sharding import average_trained_alone, shard_frozen, weight_bytes
from melinoe.tuning.progress import TuningProgress
from melinoe.tuning.restart import open_run, run_identity
from melinoe.tuning.settings import TuneSettings
from melinoe.tuning.trainer import EVALUATIONS, LOG, LocalityTrainer


def tune(
    model: str | Path,
    data: str | Path,
    output_dir: str | Path,
    *,
    memory: int | str | None = None,
    eval_data: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    **settings: Any,
) -> dict[str, Any]:
    """Tunes the routers (fully) and the experts (low rank) of a checkpoint for expert locality.

    Run by `torchrun` or `accelerate launch`, the processes share each step's rows; the first one writes.

    Args:
        model: checkpoint folder, store, Hub id or `tiny`; opened, never written.
        data: a .jsonl file, a folder with train.jsonl, the Hub id of a data set, or `tiny`
            (melinoe.data.rows).
        output_dir: the adapter folder to write; apply it with `--adapter` or fold it in with `merge`.
        memory: bytes, "4GiB" or "80%" that one process must fit in (the interpreter not counted): the experts
            stay on disk and are read for every pass, forward and backward. The losses are those of the
            resident run, and a run that was interrupted may go on with another budget. None: everything in
            memory.
        eval_data: held-out rows for `eval_steps`; None: the valid split of `data`.
        resume: there must be an interrupted run to go on with. Without it, one with the same settings and
            data is gone on with as well, and any other starts anew.
        overwrite: replace what stands in `output_dir`, and do not resume an interrupted run.
        progress: a live line on stderr.
        settings: the fields of TuneSettings.

    Returns:
        {"output_dir", "steps", "seconds", "tokens", "nll", "misses", "rank", "total", "skipped_steps",
        "base_fingerprint", "fingerprint", "resumed_from", "processes", "weight_bytes" (of one process)};
        losses are means over the last tenth of the run. With `eval_steps` also "held_out", the last record of
        evaluations.jsonl; with paged experts "paged": {"slots" per layer, "slots_format", "loads", "hits",
        "bytes_read"}.

    Raises:
        MelinoeError: settings out of range, a dense model, no usable rows, nothing to resume where that was
            asked, a budget that is too small, or an output folder that holds something else.
        KeyboardInterrupt: as it came; OUTPUT.partial keeps the last checkpoint and the next call resumes.
    """
    chosen = TuneSettings.named(settings)
    if resume and overwrite:
        raise MelinoeError("tune: resume and overwrite contradict each other", allowed="one of them")
    output = Path(output_dir)
    if output.exists() and not (output.is_dir() and not any(output.iterdir())) and not overwrite:
        raise MelinoeError(
            f"{output} exists already", next_step="choose another folder, or overwrite it (--overwrite)"
        )
    started = time.monotonic()
    device = device_of(chosen)
    processes = Processes.join(device)
    progress = progress and processes.is_first
    parts = chosen.accumulate * processes.count
    tokenizer, encoded, plan = _read(model, data, chosen, parts, progress)
    held_out = _held_out(tokenizer, data, eval_data, chosen)
    pages = paging(model, memory, chosen, batch_shape(encoded, plan, chosen, parts), device)
    network, layers = prepare_model(model, chosen, device, pages)
    base_fingerprint = fingerprint(network)
    if chosen.shard:
        shard_frozen(network, processes)
    if processes.count > 1:
        average_trained_alone(network)
    work = partial_of(output)
    base_format = "auto" if pages is None else pages.record_format
    identity = run_identity(chosen, parts, base_fingerprint, encoded, base_format)
    restart = processes.ask_first(lambda: open_run(work, identity, resume, overwrite))
    if restart.note and progress:
        print(f"melinoe: {restart.note}", file=sys.stderr)
    pad_token_id = tokenizer.pad_token_id or 0
    batches = Batches(
        encoded,
        plan,
        pad_token_id,
        rank_tokens=chosen.rank_tokens,
        seed=chosen.seed,
        accumulate=chosen.accumulate,
        process=processes.index,
        processes=processes.count,
    )
    slots = max(chosen.capacity(layer.num_experts, experts_per_token(network)) for layer in layers)
    evaluation = None
    if held_out:
        evaluation = Evaluation(held_out, layers, slots, chosen.batch_tokens, pad_token_id, processes)
    with _quiet(), TuningProgress(progress, chosen.max_steps) as bar:
        trainer = LocalityTrainer(
            network,
            layers,
            batches,
            chosen,
            work,
            _tokens_per_step(encoded, plan),
            device,
            bar,
            processes,
            evaluation,
        )
        trainer.train(resume_from_checkpoint=str(restart.checkpoint) if restart.checkpoint else None)
    steps = trainer.state.global_step

    def finish() -> dict[str, Any]:
        result: dict[str, Any] = {
            "steps": steps,
            "seconds": round(time.monotonic() - started, 2),
            "tokens": sum(len(encoded[row].ids) for rows in plan[:steps] for row in rows),
            **_last_losses(work / LOG),
            "skipped_steps": trainer.skipped_steps,
            "resumed_from": restart.steps_done,
            "rows": len(encoded),
            "slots": slots,
            "processes": processes.count,
            "weight_bytes": weight_bytes(network),
        }
        if pages is not None:
            result["paged"] = pages.to_json(network)
        logs = [work / LOG]
        if evaluation is not None:
            logs.append(work / EVALUATIONS)
            result["held_out"] = json.loads(logs[-1].read_text().splitlines()[-1])
        card = write_adapter(
            network,
            output,
            Base(str(model) if pages is None else pages.source, base_fingerprint, base_format),
            settings=chosen.as_dict(),
            result=result,
            keep=tuple(logs),
        )
        shutil.rmtree(work, ignore_errors=True)
        prints = {key: card[key] for key in ("base_fingerprint", "fingerprint")}
        return {"output_dir": str(output), **prints, **result}

    return processes.ask_first(finish)


def plan_memory(model: str | Path, data: str | Path, **settings: Any) -> TuningMemory:
    """What one process of `tune` with the same arguments needs, without reading a weight.

    Raises:
        MelinoeError: as for `tune`, the output folder apart.
    """
    chosen = TuneSettings.named(settings)
    _, encoded, plan = _read(model, data, chosen, chosen.accumulate)
    batch = batch_shape(encoded, plan, chosen, chosen.accumulate)
    return memory_needed(model, chosen, batch, device_of(chosen))


def _read(
    model: str | Path, data: str | Path, settings: TuneSettings, parts: int = 1, show: bool = False
) -> tuple[Any, list[Encoded], list[list[int]]]:
    """(tokenizer, rows as tokens, the plan of steps); with `show`, what was found goes to stderr."""
    tokenizer = AutoTokenizer.from_pretrained(local_folder(resolve_model(model)))
    rows = read_rows(data)
    encoded = [row for _, row in encode_rows(tokenizer, rows, settings.max_length)]
    lengths = [len(row.ids) for row in encoded]
    plan = plan_batches(lengths, settings.batch_tokens, settings.max_steps, settings.seed, parts)
    if show:
        left_out = len(rows) - len(encoded)
        print(
            f"melinoe: {data}: {describe_rows(rows)}; "
            + (f"{left_out:,} left out (over {settings.max_length} tokens or empty); " if left_out else "")
            + f"{padding_share(lengths, plan, parts):.1%} of a batch is padding",
            file=sys.stderr,
        )
    return tokenizer, encoded, plan


def _held_out(
    tokenizer: Any, data: str | Path, eval_data: str | Path | None, settings: TuneSettings
) -> list[Encoded]:
    """Rows to measure on while tuning; none where that was not asked."""
    if not settings.eval_steps:
        return []
    if eval_data is None and Path(data).is_file():
        raise MelinoeError(
            "tune: evaluation needs held-out rows, and a single file has none",
            got=data,
            next_step="give --eval-data, or --data a folder with valid.jsonl",
        )
    rows = read_rows(eval_data or data, "valid")
    return [row for _, row in encode_rows(tokenizer, rows, settings.max_length)][: settings.eval_rows]


def _tokens_per_step(encoded: list[Encoded], plan: list[list[int]]) -> tuple[float, float]:
    """(completion tokens, scored tokens) of an average batch."""
    completion = sum(len(encoded[row].ids) - encoded[row].prompt_length for rows in plan for row in rows)
    rows = sum(map(len, plan))
    return completion / len(plan), (completion - rows) / len(plan)


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

"""`tune`: model and data in, adapter folder out. The verb as a sequence of steps."""

from __future__ import annotations

import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from melinoe.adapters.peft_folder import ADAPTER, Base
from melinoe.errors import MelinoeError
from melinoe.files import naming_errors, partial_of
from melinoe.machine import usable_device
from melinoe.models.identity import identity
from melinoe.models.layers import experts_per_token, fingerprint
from melinoe.models.positions import fixed_length
from melinoe.outputs import Output
from melinoe.runtime.division import given_bytes
from melinoe.tuning.evaluation import Evaluation
from melinoe.tuning.memory.needed import TuningMemory, device_of, memory_needed
from melinoe.tuning.memory.pages import divided, paging
from melinoe.tuning.model import prepare_model
from melinoe.tuning.parallel.processes import Processes
from melinoe.tuning.parallel.sharding import distribute
from melinoe.tuning.progress import TuningProgress, trainer_silenced
from melinoe.tuning.restart import open_run, run_identity
from melinoe.tuning.result import write_result
from melinoe.tuning.settings import TuneSettings
from melinoe.tuning.step.batches import StepBatches
from melinoe.tuning.trainer import LocalityTrainer
from melinoe.tuning.training_rows import read_held_out_rows, read_training_rows


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
            stay on disk and are read for every pass, forward and backward. With `accumulate`, parts of a step
            are computed together where that reads less (melinoe.tuning.memory.parts). The losses are those of
            the resident run, and a run that was interrupted may go on with another budget. None: everything
            in memory.
        eval_data: held-out rows for `eval_steps`; None: the valid split of `data`.
        resume: there must be an interrupted run to go on with. Without it, one with the same settings and
            data is gone on with as well; any other that saved something is refused, so that it is not lost.
        overwrite: replace an adapter that stands in `output_dir`, and do not resume an interrupted run.
        progress: a live line on stderr.
        settings: the fields of TuneSettings.

    Returns:
        {"output_dir", "steps", "seconds", "tokens", "nll", "misses", "rank", "total", "skipped_steps",
        "base_fingerprint", "fingerprint", "resumed_from", "processes", "weight_bytes" (of one process)};
        losses are means over the last tenth of the run. With `eval_steps` also "held_out", the last record of
        evaluations.jsonl; with paged experts "paged": {"slots" per layer, "slots_format", "parts" of a step
        (one after the other in each process), "loads", "hits", "bytes_read"}.

    Raises:
        MelinoeError: settings out of range, a dense model, no usable rows, nothing to resume where that was
            asked, a budget that is too small, or nothing may be written at `output_dir` (melinoe.outputs).
        KeyboardInterrupt: as it came; OUTPUT.melinoe-partial keeps the last checkpoint and the next call
            resumes.
    """
    chosen = TuneSettings.named(settings)
    if resume and overwrite:
        raise MelinoeError("tune: resume and overwrite contradict each other", allowed="one of them")
    reads = {"model": model, "data": data, "evaluation data": eval_data}
    output = Output(Path(output_dir), ADAPTER, reads, overwrite)
    output.check()
    work = partial_of(output.path)
    started, device = time.monotonic(), str(usable_device(device_of(chosen)))
    processes = Processes.join(device)
    show = progress and processes.is_first
    rows = read_training_rows(model, data, chosen, processes.count, processes.is_first, not progress)
    held_out = read_held_out_rows(model, rows.tokenizer, data, eval_data, chosen)
    if memory is not None and processes.count > 1:  # "80%" too: all must divide their steps alike
        memory = processes.ask_first(partial(given_bytes, memory, torch.device(device)))
    pages = paging(model, memory, chosen, partial(rows.largest_batch, chosen), device)
    tuned, layers = prepare_model(model, chosen, device, pages)
    if pages is None:
        base = Base(str(model), fingerprint(tuned), identity=identity(tuned))
    else:
        base = Base(pages.source, fingerprint(tuned), pages.record_format, identity(tuned))
    distribute(tuned, processes, chosen.shard)
    this_run = run_identity(chosen, rows, base)
    restart = processes.ask_first(lambda: open_run(work, this_run, resume, overwrite))
    if restart.note and show:
        print(f"melinoe: {restart.note}", file=sys.stderr)
    slots = max(chosen.capacity(layer.num_experts, experts_per_token(tuned)) for layer in layers)
    evaluation = None
    if held_out:
        evaluation = Evaluation(
            held_out, layers, slots, chosen.batch_tokens, rows.pad_token_id, processes,
            fixed_length(tuned.config),
        )  # fmt: skip
    with naming_errors(work), trainer_silenced(), TuningProgress(show, chosen.max_steps) as bar:
        trainer = LocalityTrainer(
            tuned,
            layers,
            StepBatches.of(
                rows.encoded, rows.plan, rows.pad_token_id, chosen, processes, pages.parts if pages else None
            ),
            chosen,
            work,
            rows.tokens_per_step(),
            device,
            bar,
            processes,
            evaluation,
        )
        trainer.train(resume_from_checkpoint=str(restart.saved) if restart.saved else None)
    found = {
        "seconds": round(time.monotonic() - started, 2),
        "tokens": rows.tokens(trainer.state.global_step),
        "resumed_from": restart.steps_done,
        "rows": len(rows.encoded),
        **rows.usable.to_json(),
        "slots": slots,
        **({} if pages is None else {"paged": pages.to_json(tuned)}),
    }
    return processes.ask_first(lambda: write_result(trainer, output, base, found))


def plan_memory(
    model: str | Path, data: str | Path, *, memory: int | str | None = None, **settings: Any
) -> TuningMemory:
    """What one process of `tune` with the same arguments needs, without reading a weight.

    Args:
        memory: a budget; where it is enough, what is needed with the steps divided as it makes them.

    Raises:
        MelinoeError: as for `tune`, the output folder and a budget that is too small apart.
    """
    chosen = TuneSettings.named(settings)
    rows, device = read_training_rows(model, data, chosen), device_of(chosen)
    needed = memory_needed(model, chosen, rows.largest_batch(chosen), device)
    if memory is None or not needed.fits(memory):
        return needed
    return divided(model, memory, chosen, partial(rows.largest_batch, chosen), device).needed

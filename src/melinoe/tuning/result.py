"""What a finished run leaves: the adapter folder with its logs, and what `tune` returns."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from melinoe.adapters.peft_folder import Base, write_adapter
from melinoe.outputs import Output
from melinoe.tuning.parallel.sharding import weight_bytes
from melinoe.tuning.trainer import EVALUATIONS, LOG, LocalityTrainer


def write_result(
    trainer: LocalityTrainer, output: Output, base: Base, found: dict[str, Any]
) -> dict[str, Any]:
    """Writes the adapter and removes the run's work folder.

    Args:
        trainer: whose run is over.
        base: the model that was tuned.
        found: of the run, put beside what the trainer knows.

    Returns:
        What `tune` returns.

    Raises:
        MelinoeError: a tensor is not finite, or something else stands at `output` now; the work folder stays.
    """
    work = trainer.folder
    result: dict[str, Any] = {
        "steps": trainer.state.global_step,
        **found,
        **_last_losses(work / LOG),
        "skipped_steps": trainer.skipped_steps,
        "processes": trainer.processes.count,
        "weight_bytes": weight_bytes(trainer.model),
    }
    logs = [work / LOG]
    if trainer.evaluation is not None:
        logs.append(work / EVALUATIONS)
        result["held_out"] = json.loads(logs[-1].read_text().splitlines()[-1])
    settings = trainer.settings.as_dict()
    card = write_adapter(
        trainer.model,
        output.path,
        base,
        settings=settings,
        result=result,
        keep=tuple(logs),
        check=output.check,
    )
    shutil.rmtree(work, ignore_errors=True)
    prints = {name: card[name] for name in ("base_fingerprint", "fingerprint")}
    return {"output_dir": str(output.path), **prints, **result}


def _last_losses(log: Path) -> dict[str, float | None]:
    """Means over the last tenth of the run."""
    records = [json.loads(line) for line in log.read_text().splitlines()]
    records = records[-max(1, len(records) // 10) :]
    means: dict[str, float | None] = {}
    for name in ("total", "nll", "misses", "rank", "hit_rate", "divergence"):
        values = [record[name] for record in records if record.get(name) is not None]
        means[name] = round(sum(values) / len(values), 5) if values else None
    return means

"""One point of a sweep in a process of its own: tune, merge, measure the merged checkpoint.

    python -m melinoe.frontier.run_point FOLDER/job.json

Each stage leaves something finished or nothing (FOLDER/adapter, FOLDER/merged, FOLDER/measured-KEY.json),
so an interrupted point goes on where it was. Quality is that of the merged, rounded checkpoint.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from melinoe.errors import MelinoeError
from melinoe.files import whole_file, write_text
from melinoe.frontier.sources import measuring_code, tuning_code

JOB, CODE = "job.json", "tuned-by"


@dataclass(frozen=True)
class Job:
    """What one process does.

    model: folder of the base.  settings: of `tune`; None: the base itself is measured.
    train: data folder with train.jsonl.  data: {name: folder with test.jsonl} to measure on.
    measuring: fields of measuring.Measuring.  output: file name of the measurements.
    keep_merged: the merged checkpoint stays.
    """

    model: str
    settings: dict[str, Any] | None
    train: str
    data: dict[str, str]
    measuring: dict[str, Any]
    output: str
    keep_merged: bool = False


def run(job: Job, folder: Path) -> dict[str, Any]:
    """Does what is left to do; returns {"tuned", "code", "measured_by", "predictor", "data": {name: ...}}."""
    from melinoe.frontier.measuring import Measuring, fit, measure
    from melinoe.measure.trace import open_model

    with _alone(folder):
        output = folder / job.output
        if output.is_file():
            return json.loads(output.read_text())
        result: dict[str, Any] = {"tuned": None, "code": None, "predictor": None}
        result["measured_by"] = measuring_code()
        model, merged = job.model, folder / "merged"
        if job.settings is not None:
            result["tuned"] = _tuned(job, folder)
            result["code"] = (folder / CODE).read_text() if (folder / CODE).is_file() else None
            if not merged.is_dir():
                from melinoe.adapters.merge import merge

                merge(job.model, folder / "adapter", merged)
            model = str(merged)
        opened = open_model(model)
        what = Measuring(**job.measuring)
        predictor = None
        if what.predictor_rows:
            predictor = folder / "predictor"
            seed = (job.settings or {}).get("seed", 0)
            result["predictor"] = fit(opened, Path(job.train), what.predictor_rows, predictor, seed)
        result["data"] = {
            name: measure(opened, Path(data), what, predictor) for name, data in job.data.items()
        }
        with whole_file(output) as partial:
            partial.write_text(json.dumps(result, default=float))
            if not job.keep_merged:
                shutil.rmtree(merged, ignore_errors=True)
    return result


def _tuned(job: Job, folder: Path) -> dict[str, Any]:
    """The result of tuning, from now or from before."""
    from melinoe.tuning.tune import tune

    adapter = folder / "adapter"
    if not adapter.is_dir():
        write_text(folder / CODE, tuning_code())
        tune(job.model, job.train, adapter, progress=False, **(job.settings or {}))
    return json.loads((adapter / "melinoe.json").read_text())["result"]


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """The process that a killed sweep left behind may still be at work here: wait for it."""
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("job", type=Path)
    parser.add_argument("--json", action="store_true", help="the last line of stdout says what was written")
    parser.add_argument("--quiet", action="store_true", help="no progress bars (there are none)")
    options = parser.parse_args()
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        job = Job(**json.loads(options.job.read_text()))
        run(job, options.job.parent)
    except MelinoeError as error:
        print(error, file=sys.stderr)
        sys.exit(1)
    if options.json:
        print(json.dumps({"output": str(options.job.parent / job.output)}))


if __name__ == "__main__":
    main()

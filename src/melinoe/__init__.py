"""melinoe: mixture-of-experts models inside a memory budget, exactly and fast.

The public names are imported when they are first used, so that `import melinoe` and
`melinoe --help` load neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import Any

from melinoe import _plugin
from melinoe._version import __version__ as __version__

_PUBLIC = {
    "MelinoeError": "melinoe.errors",
    "convert": "melinoe.conversion.convert",
    "load": "melinoe.runtime.load",
    "stats": "melinoe.runtime.load",
    "plan": "melinoe.runtime.plan",
    "generate": "melinoe.runtime.generation",
    "stream_generate": "melinoe.runtime.generation",
    "stickiness_table": "melinoe.measure.stickiness",
    "tune": "melinoe.tuning.tune",
    "merge": "melinoe.adapters.merge",
    "trace": "melinoe.measure.trace",
    "simulate": "melinoe.routing.simulate",
    "fit_predictor": "melinoe.prediction.fit",
    "placement": "melinoe.prediction.placement",
    "evaluate": "melinoe.measure.quality",
    "sweep": "melinoe.frontier.sweep",
    "bench": "melinoe.benchmark.bench",
    "demo": "melinoe.demonstration.demo",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'melinoe' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])


_plugin.register_when_imported()

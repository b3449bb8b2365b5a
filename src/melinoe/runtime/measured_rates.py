"""The rates of this machine for a model's shape: what is known of it, and the rest measured (probe.py)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from melinoe.models.layers import experts_per_token
from melinoe.runtime import probe
from melinoe.runtime.kept_rates import KeptRates
from melinoe.runtime.probe import Measured, Work
from melinoe.runtime.records import Records
from melinoe.runtime.speed import Rates
from melinoe.store.packing import FORMATS

LAYER, MISSED = "a layer of the embedded model", "what is added where no expert is at hand, reading apart"


def measured_rates(
    model: nn.Module, records: Records, files: list[Path], others: Mapping[str, Work], remembered: bool | None
) -> tuple[dict[str, Rates], dict[str, Measured]]:
    """({format: rates}, empty where nothing can be read; what was measured, by name).

    Args:
        model: without its experts, on the meta device.
        files: of the model, to measure reading with.
        others: what else is to be measured, by name.
        remembered: what is known of computing here, as for `KeptRates`.
    """
    top_k = experts_per_token(model)
    counts = sorted({1, top_k})
    sizes = {format: max(size for _, size in records.in_format(format)) for format in FORMATS}
    groups = {f"{count} {format}": (sizes[format], count) for format in FORMATS for count in counts}
    with probe.reading(files, groups) as reads:
        if not reads:
            return {}, probe.measure(others)
        kept = KeptRates(remembered, torch.get_num_threads())
        dense, experts, make = _computing(model, records, top_k)
        found = {name: known for name in (LAYER, MISSED, *make) if (known := kept.get(name))}
        new = {name: make[name]() for name in make if name not in found}
        measured = probe.measure({**others, **reads})
        for name, work in new.items():
            measured |= probe.measure({name: work}, sure=0.0)
    fresh = {name: measured[name] for name in new}
    new.clear()  # their matrices
    if not {LAYER, MISSED} <= found.keys():
        fresh |= dict(zip((LAYER, MISSED), probe.bookkeeping(), strict=True))
    kept.add(fresh)
    found |= measured | fresh
    hidden = _hidden_size(model)
    nbytes = hidden * hidden * next(model.parameters()).element_size()

    def rates(format: str) -> Rates:
        ends = [found[f"{count} {format}"] for count in counts]
        parts = found[LAYER], found[MISSED], found[dense], found[experts[format]], *ends
        group_seconds = np.interp(range(1, top_k + 1), counts, [end.seconds for end in ends])
        return Rates(
            found[LAYER].seconds,
            found[MISSED].seconds,
            nbytes / found[dense].seconds,
            found[experts[format]].seconds / top_k,
            tuple(group_seconds.tolist()),
            max(part.spread for part in parts),
        )

    return {format: rates(format) for format in FORMATS}, found


def _computing(
    model: nn.Module, records: Records, top_k: int
) -> tuple[str, dict[str, str], dict[str, Callable[[], Work]]]:
    """(name of the dense product, {format: name of its experts}, {name: makes what computes it})."""
    layout, module, hidden = records.layouts[0], records.module, _hidden_size(model)
    dtype = next(model.parameters()).dtype
    activation = getattr(module, "act_fn", None)
    shape = f"{type(module).__name__} {type(activation).__name__} {module.is_transposed} {layout.to_json()}"
    experts = {format: f"{top_k} {format} of {shape} by {records.hidden_size}" for format in FORMATS}
    dense = f"{dtype} {hidden} by {hidden}"
    make: dict[str, Callable[[], Work]] = {dense: partial(probe.dense_work, hidden, hidden, dtype)}
    for format, name in experts.items():
        make[name] = partial(probe.expert_work, module, layout, records.hidden_size, top_k, format)
    return dense, experts, make


def _hidden_size(model: nn.Module) -> int:
    return int(model.config.get_text_config().hidden_size)  # type: ignore[union-attr,operator]

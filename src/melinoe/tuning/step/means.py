"""What a step gave, and its parts added up: over what one process accumulates, and over all processes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch

from melinoe.tuning.parallel.processes import Processes

# what a mean is over; the others are sums already
_OVER = {
    "nll": "tokens",
    "base_nll": "tokens",
    "misses": "missed_over",
    "hit_rate": "scored",
    "divergence": "divergence_tokens",
}
_SUMS = ("total", "rank")
_COUNTS = ("tokens", "scored", "divergence_tokens", "missed_over")


@dataclass
class PartLosses:
    """What one part of a step gave.

    total is what is minimised: its sum over the parts is the loss of the step. The others are means for
    people, except that the sum of `rank` over the parts is the mean of the step.

    nll: nats per completion token; misses: of the loss's own cache, per layer and decoded token (0 .. K);
    hit_rate: what the runtime's policy would find in the slots; rank: the anchor's loss per token;
    divergence: nats per token away from the base model, where it is asked; base_nll: the base's on the same
    batch, likewise. tokens, scored, divergence_tokens: how many completion tokens, scored tokens and compared
    tokens the means are over; missed_over: scored tokens, or rows that have some, whichever misses are a mean
    over. asked: by layer, [E] how many scored tokens asked for each expert, where
    `balance` needs it.
    """

    total: torch.Tensor
    nll: torch.Tensor
    misses: torch.Tensor
    rank: torch.Tensor
    hit_rate: torch.Tensor
    divergence: torch.Tensor | None = None
    base_nll: torch.Tensor | None = None
    tokens: int = 0
    scored: int = 0
    divergence_tokens: int = 0
    missed_over: int = 0
    asked: dict[int, torch.Tensor] = field(default_factory=dict)


@dataclass
class StepMeans:
    """Means of a whole step.

    values: the fields of PartLosses, None where not finite or not asked for. asked: by layer, [E] share of
    scored tokens. seconds: since the run began, on the first process's clock.
    """

    values: dict[str, float | None]
    tokens: int
    scored: int
    seconds: float
    asked: dict[int, torch.Tensor] = field(default_factory=dict)


class StepSums:
    """Takes the losses of each part; `finish` gives the whole step's and starts again."""

    def __init__(self, processes: Processes) -> None:
        self.processes = processes
        self.parts: list[PartLosses] = []

    def add(self, losses: PartLosses) -> None:
        self.parts.append(replace(losses, total=losses.total.detach()))

    def finish(self, seconds: float) -> StepMeans:
        """Args: seconds: since the run began, on this process's clock."""
        parts, self.parts = self.parts, []
        names = [*_SUMS, *_OVER]
        asked_for = [name for name in names if getattr(parts[0], name) is not None]
        row = torch.zeros(len(names) + len(_COUNTS) + 1, dtype=torch.float64)
        for losses in parts:
            present = [getattr(losses, name).detach().double().reshape(()) for name in asked_for]
            numbers = dict(zip(asked_for, torch.stack(present).tolist(), strict=True))
            for place, name in enumerate(names):
                count = getattr(losses, _OVER[name]) if name in _OVER else 1
                row[place] += numbers.get(name, 0.0) * count if count else 0.0
            for place, name in enumerate(_COUNTS, len(names)):
                row[place] += getattr(losses, name)
        row[-1] = seconds if self.processes.is_first else 0.0
        sums = dict(zip([*names, *_COUNTS, "seconds"], self.processes.sum(row).tolist(), strict=True))
        values: dict[str, float | None] = {}
        for name in names:
            value = sums[name] / max(sums[_OVER[name]], 1.0) if name in _OVER else sums[name]
            values[name] = value if name in asked_for and math.isfinite(value) else None
        means = StepMeans(values, int(sums["tokens"]), int(sums["scored"]), sums["seconds"])
        if parts[0].asked and means.scored:
            sizes = [len(asked_E) for asked_E in parts[0].asked.values()]
            flat = torch.stack([torch.cat(list(losses.asked.values())) for losses in parts]).sum(0)
            shares = (self.processes.sum(flat) / means.scored).split(sizes)
            means.asked = dict(zip(parts[0].asked, shares, strict=True))
        return means

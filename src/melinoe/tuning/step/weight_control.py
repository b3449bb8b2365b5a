"""Turns what people want to pay into the weight of the cache loss: a target instead of a lambda.

Dual ascent on one multiplier: while the aim is missed the weight grows, while there is room it falls, in
steps that scale with the length of the run. Two aims:

    target hit rate        the weight grows until the runtime's policy finds that share of requests in the
    slots largest quality loss   the weight grows until the perplexity is that much above the base model's on
    the same batches

Both are watched on training batches, as running means. The second takes the base model for what quality would
be without locality, and training rows for unseen ones: it holds for short runs, in which a row comes once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

SMOOTHING = 0.95  # of the running means, per step: about 20 steps
REACH = 8.0  # how far a whole run can move the logarithm of the weight
LIMIT = 100.0  # of the factor and of its inverse: an aim out of reach must not run away with the whole loss
HIT_RATE_SCALE = 0.05  # a hit rate this far off moves the weight at full speed


@dataclass
class WeightController:
    """The multiplier of the cache loss's weight, and what it is steered by.

    target_hit_rate: 0 .. 1, or None. max_quality_loss: largest relative rise of perplexity, or None.
    max_steps: of the run. factor: the multiplier now. seen: running mean of what is steered; None before the
    first step.
    """

    target_hit_rate: float | None
    max_quality_loss: float | None
    max_steps: int
    factor: float = 1.0
    seen: float | None = None

    @property
    def steers(self) -> bool:
        return self.target_hit_rate is not None or self.max_quality_loss is not None

    def step(self, hit_rate: float, nll_above_base: float | None) -> None:
        """Moves the factor by what a step showed; a value that is not finite says nothing.

        Args:
            hit_rate: of the simulated policy on this batch, 0 .. 1.
            nll_above_base: nats per completion token, tuned less base, on this batch.
        """
        value = hit_rate if self.target_hit_rate is not None else nll_above_base
        if not self.steers or value is None or not math.isfinite(value):
            return
        self.seen = value if self.seen is None else SMOOTHING * self.seen + (1 - SMOOTHING) * value
        if self.target_hit_rate is not None:
            short = (self.target_hit_rate - self.seen) / HIT_RATE_SCALE
        else:
            assert self.max_quality_loss is not None
            allowed = math.log1p(self.max_quality_loss)
            short = (allowed - self.seen) / allowed
        factor = self.factor * math.exp(REACH / self.max_steps * min(1.0, max(-1.0, short)))
        self.factor = min(LIMIT, max(1 / LIMIT, factor))

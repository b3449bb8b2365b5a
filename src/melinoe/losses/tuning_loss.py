"""What a tuning step minimises: the terms of Eq. 6 (arXiv 2602.11192) added up, and how their weights move.

Pure numbers and tensors; tuning/step/losses.py asks the model and remembers what is remembered between steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

# Scored tokens of a step below which the weights grow in inverse proportion. With few tokens the likelihood's
# gradient is mostly noise, which AdamW scales up to full steps, and the cache's is lost in it: T0 mix alone
# (113 a step) gave 5 percent fewer loads where, together with GSM8K (312), it gave 21 (docs/log.md).
SCORED_TOKENS = 400.0


@dataclass(frozen=True)
class PartOfStep:
    """What one part of a step is of the whole, so that the losses of the parts add up to the step's.

    completion, scored: its completion and scored tokens over those of a mean step: every token of the data
    weighs the same, whichever step it is in. compared: tokens of the whole step that are compared with the
    base.
    """

    completion: float = 1.0
    scored: float = 1.0
    compared: int = 1


def tuning_loss(
    nll: torch.Tensor,
    misses: torch.Tensor | None,
    ranks: torch.Tensor | None,
    lambda_cs: float,
    lambda_rm: float,
    *,
    distill: float = 0.0,
    divergence: torch.Tensor | None = None,
    part: PartOfStep = PartOfStep(),
) -> torch.Tensor:
    """L = (1 - d) L_nll + d L_kl + lambda_cs L_cs + lambda_rm L_rm: Eq. 6, whose quality term is distilled by
    d.

    Args:
        nll: L_nll, nats per completion token of this part.
        misses: L_cs, expected misses per layer and scored token of this part (Eq. 4); None: not asked for.
        ranks: L_rm, this part's share of the step's mean (Eq. 5); None: not asked for.
        lambda_cs, lambda_rm: the weights as they are now.
        distill: d, 0 .. 1.
        divergence: KL(base, tuned) summed over the tokens of this part that are compared, nats.

    Returns:
        A scalar whose sum over the parts of a step is the step's loss.
    """
    total = (1 - distill) * part.completion * nll
    if divergence is not None and distill > 0:
        total = total + distill * divergence / max(part.compared, 1)
    if misses is not None:
        total = total + lambda_cs * part.scored * misses
    if ranks is not None:
        total = total + lambda_rm * ranks
    return total


def cooled(done: float, cooldown: float) -> float:
    """What both weights are multiplied by when the share `done` of the run is over, 0 .. 1.

    They fall in a straight line to nothing over the last `cooldown` of it: what has become local stays so,
    and the answers recover.
    """
    return min(1.0, (1 - done) / cooldown) if cooldown else 1.0


def boundary_strength(nll: float | None, scored_tokens: float) -> float:
    """What both weights are multiplied by where the gradient is that of the boundary (`relative`).

    The square root of the likelihood loss of late. Constant weights let misses alone govern a model that is
    nearly certain of its answers (0.001 nats), weights in proportion to the loss leave it as it is; between a
    model of 2.3 nats and one of 0.001 the root held.

    Args:
        nll: running mean of the likelihood loss; None in the first step, which knows no level yet.
        scored_tokens: of a mean step.
    """
    level = 1.0 if nll is None else math.sqrt(nll)
    return level * max(1.0, SCORED_TOKENS / max(scored_tokens, 1.0))

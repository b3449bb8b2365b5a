"""What `--objective NAME` stands for. No torch: `melinoe --help` reads this."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from melinoe.losses.occupancy import Cache


@dataclass(frozen=True)
class Objective:
    """One form of the losses.

    cache: what the requests are held against (losses/occupancy.py).
    gradient: the way back through r(t): "probabilities", p_f as in the paper, or "boundary", near the K-th
        choice.
    lambda_cs, lambda_rm: weights where none are given.
    anchor: what keeps the router near the base's: "ranks", the paper's loss, or "divergence", KL(p_b, p_f).
    experts: whether the experts' low-rank factors are trained besides the routers.
    cooldown: share of the run over which the weights fall to nothing, where none is given.
    """

    cache: Cache
    gradient: Literal["probabilities", "boundary"]
    lambda_cs: float
    lambda_rm: float
    anchor: Literal["ranks", "divergence"] = "ranks"
    experts: bool = True
    cooldown: float = 0.5


# docs/results.md has the frontier of each; the weights of the first are the paper's
OBJECTIVES: dict[str, Objective] = {
    "paper": Objective("plain", "probabilities", 0.5, 0.1, cooldown=0.0),
    "clipped": Objective("clipped", "probabilities", 1.0, 0.1),
    "boundary": Objective("clipped", "boundary", 0.045, 0.02),
    "lru": Objective("lru", "boundary", 0.045, 0.02),
    "counts": Objective("counts", "boundary", 0.045, 0.006),
    # the rival of arXiv 2605.27081, re-implemented from its description: only the routers move
    "remoe": Objective("previous", "probabilities", 1.0, 0.1, "divergence", experts=False, cooldown=0.0),
}

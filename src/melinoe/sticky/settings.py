"""How strongly a sequence keeps to its own experts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from melinoe.errors import MelinoeError

CONFIG_FIELD = "melinoe_sticky"  # in a model's config, so that copies of the model keep it
SHARE, LOGIT = "share", "logit"
# above the first a favoured expert is chosen whatever its share; e^20 times the odds come to the same
MOST = {SHARE: 1.0, LOGIT: 20.0}
MAX_STRENGTH = max(MOST.values())
AFTER = 16


@dataclass(frozen=True)
class Stickiness:
    """
    strength: added to what the router gives the favoured experts, for the choice alone; 0 is off.
    experts: how many of each layer a sequence favours; 0: a quarter of the layer's, at least K.
    after: tokens of a sequence that are routed as they are, before it favours any.
    unit: of the strength: the "share" that an expert has of its token's own K probabilities, or the "logit",
        which was the only one at first.
    """

    strength: float
    experts: int = 0
    after: int = AFTER
    unit: str = SHARE

    def __post_init__(self) -> None:
        sound = (
            isinstance(self.strength, int | float)
            and self.unit in MOST
            and 0 <= self.strength <= MOST[self.unit]
            and isinstance(self.experts, int)
            and self.experts >= 0
            and isinstance(self.after, int)
            and self.after >= 1
        )
        if not sound:
            raise MelinoeError(
                "not a stickiness",
                got=f"strength {self.strength} ({self.unit}), {self.experts} experts, after {self.after}",
                allowed="strength 0 to 1 in shares, 0 to 20 in logits, experts >= 0, after >= 1",
            )

    def favoured(self, num_experts: int, experts_per_token: int) -> int:
        """How many experts of a layer a sequence favours."""
        wanted = self.experts or max(experts_per_token, num_experts // 4)
        return min(wanted, num_experts)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def stickiness(given: Any) -> Stickiness | None:
    """Settings from what a user or a file gives: a strength, a mapping, or settings; None where it is off.

    A mapping without a unit is of a file from before there were shares: its strength is in logits.

    Raises:
        MelinoeError: not a stickiness.
    """
    if given is None:
        return None
    if isinstance(given, Mapping):
        try:
            given = Stickiness(**{"unit": LOGIT, **given})
        except TypeError:
            raise MelinoeError(
                "not a stickiness", got=dict(given), allowed="strength, experts, after, unit"
            ) from None
    if not isinstance(given, Stickiness):
        given = Stickiness(given)
    return given if given.strength > 0 else None

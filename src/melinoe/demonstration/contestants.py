"""The rows of the speed table: who runs, on which weights, from which slots, with which caps."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from melinoe.config import DEFAULT_POLICY

if TYPE_CHECKING:  # a contestant's own process needs no arena
    from melinoe.demonstration.arena import Arena


@dataclass(frozen=True)
class Contestant:
    """One row of the speed table.

    kind: "resident" (stock transformers), "accelerate" (disk_offload of the experts) or "melinoe".
    weights: which weights it runs: base, control or tuned; rows of equal weights must agree on every token.
    max_prompts, max_new_tokens: caps for slow rows; None: as all others.
    """

    name: str
    kind: str
    weights: str
    model: str
    slots: int | None = None
    policy: str = DEFAULT_POLICY
    predictor: str | None = None
    offload_folder: str | None = None
    max_prompts: int | None = None
    max_new_tokens: int | None = None
    limited: bool = True
    prompts: list[list[int]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def contestants(arena: Arena, slots: int, predictor: str) -> list[Contestant]:
    """The rows of the table, in its order. The resident ones are ceilings and stand outside the limit."""

    def resident(weights: str) -> Contestant:
        return Contestant(
            f"resident {weights}", "resident", weights, str(arena.models[weights]), limited=False
        )

    def ours(name: str, weights: str, policy: str, count: int = slots, **more: Any) -> Contestant:
        return Contestant(
            name, "melinoe", weights, str(arena.stores[weights]), slots=count, policy=policy, **more
        )

    slow: dict[str, Any] = {
        "max_prompts": arena.size.slow_prompts,
        "max_new_tokens": arena.size.slow_tokens,
        "offload_folder": str(arena.offload_folder),
    }
    rows = [
        resident("base"),
        resident("control"),
        resident("tuned"),
        Contestant("accelerate disk_offload", "accelerate", "base", str(arena.models["base"]), **slow),
        ours("on demand, no cache", "base", "lru", 0, max_prompts=max(1, arena.size.prompts // 2)),
        ours("base + lru", "base", "lru"),
        ours("base + decay", "base", "decay"),
        ours("control + decay", "control", "decay"),
        ours("tuned + decay", "tuned", "decay"),
        ours("tuned + predictor", "tuned", "decay", predictor=predictor),
    ]
    return [
        replace(row, prompts=arena.prompts, max_new_tokens=row.max_new_tokens or arena.size.new_tokens)
        for row in rows
    ]

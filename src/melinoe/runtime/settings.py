"""How a store is opened: what `melinoe.load`, a store's config, the quantizer and `attach` share."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from melinoe.config import DEFAULT_POLICY
from melinoe.errors import MelinoeError
from melinoe.runtime.division import one_of

MEMORY_VARIABLE = "MELINOE_MEMORY"  # the budget where none is given


def file_bytes(file: str | Path | None) -> int:
    """Of what is read whole; 0 where there is none, which is said when it is read."""
    return Path(file).stat().st_size if file is not None and Path(file).is_file() else 0


@dataclass(frozen=True)
class LoadSettings:
    """Settings of an offloaded model. Memory and slots both None: what is free.

    Attributes:
        memory: bytes, or text such as "4GiB" or "80%", for everything together.
        slots: records per layer, instead of memory.
        policy: what decides who stays: decay, lru, lfu, static.
        predictor: path of a predictor, or None.
        slots_format: packed or expanded, for a store with packed records; None: the default.
        context: tokens of KV cache that the budget sets aside for each sequence; None: the model's, at most
            budget.DEFAULT_CONTEXT.
        batch: sequences at once that the budget is for, beams among them.
        verify: compare each record with its checksum when it is first read.
        extra_bytes: memory that the budget must leave for something else, such as an adapter.
        any_dtype: the model may be opened in another dtype than the records have (tuning converts them at
            each use).

    Raises:
        MelinoeError: memory and slots are both given.
    """

    memory: int | str | None = None
    slots: int | None = None
    policy: str = DEFAULT_POLICY
    predictor: str | None = None
    slots_format: str | None = None
    context: int | None = None
    batch: int = 1
    verify: bool = False
    extra_bytes: int = 0
    any_dtype: bool = False

    def __post_init__(self) -> None:
        one_of(self.memory, self.slots)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> LoadSettings:
        """Raises MelinoeError for a key that is no setting."""
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(data) - set(known))
        if unknown:
            raise MelinoeError(
                "unknown settings of a melinoe store",
                got=", ".join(unknown),
                allowed=", ".join(known),
                next_step="remove them from quantization_config in its config.json",
            )
        return cls(**data)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def with_environment(self) -> LoadSettings:
        """These settings, with the memory of MELINOE_MEMORY where neither memory nor slots are given."""
        if self.memory is not None or self.slots is not None:
            return self
        return replace(self, memory=os.environ.get(MEMORY_VARIABLE))

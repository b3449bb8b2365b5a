"""What a budget of bytes is divided into, once the needs of a model are known: arithmetic, and no torch.

docs/memory.md says for people what is in each of the parts, and what is not counted.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from melinoe.config import format_bytes, parse_bytes
from melinoe.errors import MelinoeError
from melinoe.machine import KERNEL_BYTES, free_memory, kept_kernels, total_memory

if TYPE_CHECKING:
    import torch

PREFILL_CHUNK = 2048  # tokens of one call that the work space is sized for, but for `pass_length`
FREE_MARGIN = 0.8  # share of the free memory taken where no budget is given


@dataclass(frozen=True)
class Needs:
    """Bytes that a model takes whatever its slots are, and how many kernels it would like to keep (0: none).

    staging_records: of the largest size. batch: sequences at once. context: tokens of KV cache of each.
    pass_length: of which so many go through a forward pass at once.
    """

    library_bytes: int
    resident_bytes: int
    cache_bytes: int
    work_bytes: int
    shapes: int
    staging_records: int
    batch: int
    context: int
    pass_length: int


@dataclass(frozen=True)
class Budget:
    """Bytes by purpose. `slots` are records per layer; each layer has the same number.

    batch: sequences at once. context: tokens of KV cache of each. pass_length: of which so many go through a
    forward pass at once. pass_tokens: tokens of one forward pass.
    kernels: shapes of matrix products whose code is kept; part of library_bytes.
    process_bytes: what the process had when the model was opened; no part of the budget. 0: not known.
    """

    library_bytes: int
    resident_bytes: int
    cache_bytes: int
    work_bytes: int
    staging_bytes: int
    slots: int
    slot_bytes: int
    batch: int
    context: int
    pass_length: int
    kernels: int = 0
    process_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        fixed = self.library_bytes + self.resident_bytes + self.cache_bytes + self.work_bytes
        return fixed + self.staging_bytes + self.slot_bytes

    @property
    def pass_tokens(self) -> int:
        return self.batch * self.pass_length

    def __str__(self) -> str:
        return (
            f"libraries {format_bytes(self.library_bytes)} + resident {format_bytes(self.resident_bytes)}"
            f" + KV cache {format_bytes(self.cache_bytes)} + work {format_bytes(self.work_bytes)}"
            f" + staging {format_bytes(self.staging_bytes)}"
            f" + {self.slots} slots per layer {format_bytes(self.slot_bytes)}"
            f" = {format_bytes(self.total_bytes)}"
            + (f"; the process had {format_bytes(self.process_bytes)} before" if self.process_bytes else "")
        )


def pass_length(tokens: int, fixed_length: int | None) -> int:
    """How many tokens of a text of so many are computed at once.

    fixed_length: as `models.positions.fixed_length`; a longer text is one pass, whatever it takes.
    """
    whole = fixed_length is not None and tokens > fixed_length
    return tokens if whole else min(tokens, PREFILL_CHUNK)


def given_bytes(memory: int | str | None, device: torch.device | None) -> int:
    """Bytes of a budget: a size, a share of what is free ("80%"), or None for most of what is free.

    Raises:
        MelinoeError: neither.
    """
    if memory is None:
        return int(free_memory(device) * FREE_MARGIN)
    share = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%\s*", memory) if isinstance(memory, str) else None
    if share is None:
        return parse_bytes(memory)
    if not 0 < float(share[1]) <= 100:
        raise MelinoeError("not a share of the memory", got=memory, allowed="above 0% and up to 100%")
    return int(free_memory(device) * float(share[1]) / 100)


def refuse_more_than_there_is(memory: int | str | None, device: torch.device | None) -> None:
    """A budget that this machine cannot have is a slip of the pen. To plan for another machine is not.

    Raises:
        MelinoeError: more bytes than there are, used or free.
    """
    there_is = total_memory(device)
    if memory is not None and given_bytes(memory, device) > there_is:
        where = "this device" if device is not None and device.type == "cuda" else "this machine"
        raise MelinoeError(
            f"the memory budget is more than {where} has",
            got=memory,
            allowed=f"up to {format_bytes(there_is)}",
        )


def check_given(memory: int | str | None, slots: int | None, device: str = "cpu") -> None:
    """What can be said of a budget before torch is imported and a model is looked at.

    Raises:
        MelinoeError: both are given; no size and no share; or, of the host, more than there is.
    """
    one_of(memory, slots)
    if memory is not None:
        given_bytes(memory, None)
        if device == "cpu":
            refuse_more_than_there_is(memory, None)


def one_of(memory: int | str | None, slots: int | None) -> None:
    """Raises MelinoeError where both are given: one follows from the other."""
    if memory is not None and slots is not None:
        raise MelinoeError("give memory or slots, not both", got=f"memory={memory}, slots={slots}")


def divide(
    needs: Needs,
    records: list[tuple[int, int]],
    memory: int | str | None = None,
    slots: int | None = None,
    *,
    buffer_bytes: int = 0,
    device: torch.device | None = None,
) -> Budget:
    """The plan for a model with such needs; arguments and errors as of `budget.derive`.

    Args:
        device: whose free memory counts; None: the machine's.
    """
    given = given_bytes(memory, device) if slots is None else None
    resident, cache, work, library = (
        needs.resident_bytes, needs.cache_bytes, needs.work_bytes, needs.library_bytes
    )  # fmt: skip
    batch, context, shapes = needs.batch, needs.context, needs.shapes
    staging = needs.staging_records * max(size for _, size in records) + buffer_bytes
    per_slot = sum(size for _, size in records)
    most = max(count for count, _ in records)
    fixed = library + resident + cache + work + staging

    def room(total: int) -> tuple[int, int]:
        """(slots, kernels) of a budget."""
        kept = kept_kernels(shapes, total)
        return (total - fixed - kept * KERNEL_BYTES) // per_slot, kept

    if given is None:
        assert slots is not None
        # as a budget of just this size has: a tenth of the whole is a ninth of the rest
        kernels = kept_kernels(shapes, (fixed + slots * per_slot) * 10 // 9)
    else:
        slots, kernels = room(given)
        if slots < 1:
            least = -(-(fixed + per_slot) // 2**20)
            while room(least * 2**20)[0] < 1:
                least += 1
            raise MelinoeError(
                "the memory budget is too small for this model",
                got=format_bytes(given),
                allowed=f"{least}MiB or more",
                next_step=f"resident weights need {format_bytes(resident)}, the KV cache of {batch} times"
                f" {context} tokens {format_bytes(cache)}, work space {format_bytes(work)}, libraries"
                f" {format_bytes(library + kernels * KERNEL_BYTES)}, one slot in every layer"
                f" {format_bytes(per_slot)}",
            )
        slots = min(slots, most)
    library += kernels * KERNEL_BYTES
    if not 0 <= slots <= most:
        raise MelinoeError(
            "slots does not suit this model", got=slots, allowed=f"0 to {most}, the experts of a layer"
        )
    sizes = (batch, context, needs.pass_length, kernels)
    return Budget(library, resident, cache, work, staging, slots, slots * per_slot, *sizes)

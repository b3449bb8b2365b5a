"""Divides one number of bytes: libraries, weights, KV cache, work space, staging, and slots with the rest.

docs/memory.md says for people what is in each of them, and what is not counted.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import nn

from melinoe.config import format_bytes, parse_bytes
from melinoe.errors import MelinoeError
from melinoe.machine import KERNEL_BYTES, free_memory, kept_kernels, makes_kernels, total_memory
from melinoe.paging.slots import STAGING_RECORDS
from melinoe.runtime.kept_counts import kept_work_space

DEFAULT_CONTEXT = 2048  # tokens of KV cache that a budget sets aside
PREFILL_CHUNK = 2048  # tokens of one call that the work space is sized for
FREE_MARGIN = 0.8  # share of the free memory taken where no budget is given
# Of the work space, besides: what the C library keeps of freed blocks of up to 32 MiB. Prompts of 512 to 8192
# tokens at OLMoE-1B-7B's shape take 1.3 to 1.5 times what operations do (docs/log.md).
HOLES = 0.4
# What Python, torch and transformers take of a host beyond what they had when a model is opened: code that is
# read on first use, modules, threads. Measured (docs/memory.md): 33 to 37 MiB.
LIBRARY_BYTES = 40 * 2**20


@dataclass(frozen=True)
class Budget:
    """Bytes by purpose. `slots` are records per layer; each layer has the same number.

    batch: sequences at once. context: tokens of KV cache of each. pass_tokens: tokens of one forward pass.
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
    kernels: int = 0
    process_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        fixed = self.library_bytes + self.resident_bytes + self.cache_bytes + self.work_bytes
        return fixed + self.staging_bytes + self.slot_bytes

    @property
    def pass_tokens(self) -> int:
        return self.batch * min(self.context, PREFILL_CHUNK)

    def __str__(self) -> str:
        return (
            f"libraries {format_bytes(self.library_bytes)} + resident {format_bytes(self.resident_bytes)}"
            f" + KV cache {format_bytes(self.cache_bytes)} + work {format_bytes(self.work_bytes)}"
            f" + staging {format_bytes(self.staging_bytes)}"
            f" + {self.slots} slots per layer {format_bytes(self.slot_bytes)}"
            f" = {format_bytes(self.total_bytes)}"
            + (f"; the process had {format_bytes(self.process_bytes)} before" if self.process_bytes else "")
        )


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


def derive(
    model: nn.Module,
    records: list[tuple[int, int]],
    memory: int | str | None = None,
    slots: int | None = None,
    *,
    context: int | None = None,
    batch: int = 1,
    extra_bytes: int = 0,
    buffer_bytes: int = 0,
    device: torch.device | None = None,
) -> Budget:
    """The plan for a model without its experts (stripped already, weights loaded or not).

    Args:
        records: (number of experts, bytes of a slot) of each MoE layer.
        memory: all bytes the model may use, or a share of what is free ("80%"); None with `slots` None: most
            of what is free.
        slots: records per layer; overrides `memory`.
        context: tokens of KV cache of each sequence; None: the model's, at most DEFAULT_CONTEXT.
        batch: sequences at once, beams among them.
        extra_bytes: other things that stay in memory, such as an adapter.
        buffer_bytes: what packed records are expanded with; counted with the staging records.
        device: whose free memory counts.

    Raises:
        MelinoeError: the memory is too small, and the message names the smallest that works; or more slots
            than experts.
    """
    config = model.config.get_text_config()  # type: ignore[operator,union-attr]
    given = given_bytes(memory, device) if slots is None else None
    resident = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()]) + extra_bytes
    context = context or min(
        DEFAULT_CONTEXT, getattr(config, "max_position_embeddings", None) or DEFAULT_CONTEXT
    )
    needed = kept_work_space(model, batch, min(context, PREFILL_CHUNK), context)
    cache = batch * (needed.cache_bytes + context * needed.cache_bytes_per_token)
    work = int((1 + HOLES) * needed.num_bytes)
    work += cache // config.num_hidden_layers  # a layer's cache grows by being copied
    staging = STAGING_RECORDS * max(size for _, size in records) + buffer_bytes
    per_slot = sum(size for _, size in records)
    most = max(count for count, _ in records)
    device = device or torch.device("cpu")
    library = LIBRARY_BYTES if device.type == "cpu" else 0
    fixed = library + resident + cache + work + staging
    shapes = needed.shapes if makes_kernels(device, model.dtype) else 0  # type: ignore[arg-type]

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
    return Budget(library, resident, cache, work, staging, slots, slots * per_slot, batch, context, kernels)

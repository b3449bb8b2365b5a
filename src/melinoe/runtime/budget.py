"""Divides one number of bytes: resident weights, KV cache, work space, staging, and slots with the rest."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import nn

from melinoe.config import format_bytes, parse_bytes
from melinoe.errors import MelinoeError
from melinoe.machine import free_memory, total_memory
from melinoe.models.layers import experts_per_token
from melinoe.paging.slots import STAGING_RECORDS

DEFAULT_CONTEXT = 2048  # tokens of KV cache that a budget sets aside
PREFILL_CHUNK = 2048  # tokens of one call that the work space is sized for
FREE_MARGIN = 0.8  # share of the free memory taken where no budget is given


@dataclass(frozen=True)
class Budget:
    """Bytes by purpose. `slots` are records per layer; each layer has the same number."""

    resident_bytes: int
    cache_bytes: int
    work_bytes: int
    staging_bytes: int
    slots: int
    slot_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.resident_bytes + self.cache_bytes + self.work_bytes + self.staging_bytes + self.slot_bytes

    def __str__(self) -> str:
        return (
            f"resident {format_bytes(self.resident_bytes)} + KV cache {format_bytes(self.cache_bytes)}"
            f" + work {format_bytes(self.work_bytes)} + staging {format_bytes(self.staging_bytes)}"
            f" + {self.slots} slots per layer {format_bytes(self.slot_bytes)}"
            f" = {format_bytes(self.total_bytes)}"
        )


def _cache_bytes_per_token(model: nn.Module) -> int:
    """Bytes of one sequence at most.

    Counted as if every layer had full attention: hybrids and sliding windows need less.
    """
    config = model.config.get_text_config()  # type: ignore[operator,union-attr]
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    widths = 2 * max(width, getattr(config, "global_head_dim", None) or 0)  # gemma4: some heads are wider
    if getattr(config, "kv_lora_rank", None):  # latent attention: cached before it is expanded to heads
        heads, widths = 1, config.kv_lora_rank + config.qk_rope_head_dim
    element = (config.dtype or torch.float32).itemsize
    return int(config.num_hidden_layers * heads * widths * element)


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
        context: tokens of KV cache to set aside; None: the model's, at most DEFAULT_CONTEXT.
        extra_bytes: other things that stay in memory, such as an adapter.
        buffer_bytes: what packed records are expanded with; counted with the staging records.
        device: whose free memory counts.

    Raises:
        MelinoeError: the memory is too small, and the message names the smallest that works; or more slots
            than experts.
    """
    config = model.config.get_text_config()  # type: ignore[operator,union-attr]
    resident = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()]) + extra_bytes
    element = (config.dtype or torch.float32).itemsize
    context = context or min(
        DEFAULT_CONTEXT, getattr(config, "max_position_embeddings", None) or DEFAULT_CONTEXT
    )
    cache = context * _cache_bytes_per_token(model)
    work = min(context, PREFILL_CHUNK) * experts_per_token(model) * config.hidden_size * element
    staging = STAGING_RECORDS * max(size for _, size in records) + buffer_bytes
    per_slot = sum(size for _, size in records)
    most = max(count for count, _ in records)
    fixed = resident + cache + work + staging
    if slots is None:
        given = given_bytes(memory, device)
        slots = (given - fixed) // per_slot
        if slots < 1:
            raise MelinoeError(
                "the memory budget is too small for this model",
                got=format_bytes(given),
                allowed=f"{-(-(fixed + per_slot) // 2**20)}MiB or more",
                next_step=f"resident weights need {format_bytes(resident)}, the KV cache of {context} tokens"
                f" {format_bytes(cache)}, one slot in every layer {format_bytes(per_slot)}",
            )
    elif not 0 <= slots <= most:
        raise MelinoeError(
            "slots does not suit this model", got=slots, allowed=f"0 to {most}, the experts of a layer"
        )
    slots = min(slots, most)
    return Budget(resident, cache, work, staging, slots, slots * per_slot)

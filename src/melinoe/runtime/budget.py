"""Divides one number of bytes: libraries, weights, KV cache, work space, staging, and slots with the rest.

docs/memory.md says for people what is in each of them, and what is not counted. What a model needs is counted
here, on its skeleton; division.py has the arithmetic.
"""

from __future__ import annotations

import torch
from torch import nn

from melinoe.machine import makes_kernels
from melinoe.models.positions import fixed_length
from melinoe.paging.slots import STAGING_RECORDS
from melinoe.runtime import division
from melinoe.runtime.division import Budget, Needs, divide
from melinoe.runtime.kept_counts import kept_work_space

DEFAULT_CONTEXT = 2048  # tokens of KV cache that a budget sets aside
# Of the work space, besides: what the C library keeps of freed blocks of up to 32 MiB. Prompts of 512 to 8192
# tokens at OLMoE-1B-7B's shape take 1.3 to 1.5 times what operations do (docs/log.md).
HOLES = 0.4
# What Python, torch and transformers take of a host beyond what they had when a model is opened: code that is
# read on first use, modules, threads. Measured (docs/memory.md): 33 to 37 MiB.
LIBRARY_BYTES = 40 * 2**20


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
    needs = needs_of(model, context=context, batch=batch, extra_bytes=extra_bytes, device=device)
    return divide(needs, records, memory, slots, buffer_bytes=buffer_bytes, device=device)


def needs_of(
    model: nn.Module,
    *,
    context: int | None = None,
    batch: int = 1,
    extra_bytes: int = 0,
    device: torch.device | None = None,
) -> Needs:
    """What a model without its experts takes whatever its slots are; arguments as of `derive`."""
    config = model.config.get_text_config()  # type: ignore[operator,union-attr]
    resident = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()]) + extra_bytes
    context = context or min(
        DEFAULT_CONTEXT, getattr(config, "max_position_embeddings", None) or DEFAULT_CONTEXT
    )
    length = division.pass_length(context, fixed_length(config))
    needed = kept_work_space(model, batch, length, context)
    cache = batch * (needed.cache_bytes + context * needed.cache_bytes_per_token)
    work = int((1 + HOLES) * needed.num_bytes)
    work += cache // config.num_hidden_layers  # a layer's cache grows by being copied
    device = device or torch.device("cpu")
    library = LIBRARY_BYTES if device.type == "cpu" else 0
    shapes = needed.shapes if makes_kernels(device, model.dtype) else 0  # type: ignore[arg-type]
    return Needs(library, resident, cache, work, shapes, STAGING_RECORDS, batch, context, length)

"""Attention of continuous batching, one sequence at a time.

transformers' own way for `sdpa` computes all sequences of a batch as one, with a mask over the keys of
everybody: with N sequences N times the work, a mask of [tokens, tokens in the cache], and results that
depend on the neighbours' length. Here each sequence attends to its own keys by the very call that
`generate` makes for it, so that it does not matter who else is there, and no mask is kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "melinoe_packed"


def packed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cache: Any = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    **settings: Any,
) -> tuple[torch.Tensor, None]:
    """query [1, H, T, D]; key and value [1, heads, T, D] of the new tokens; returns [1, T, H, D].

    Args:
        cache: transformers' PagedAttentionCache; takes the new keys and gives back everybody's, one after
            the other.
        cu_seq_lens_q: [N + 1] where each sequence starts in the row, and the last one ends.
        sliding_window: how many tokens back a token looks, where the layer has a window and says so. Some
            (qwen2_moe, phimoe) leave it to the mask, which is not made here: the cache knows it as well.
    """
    assert cache is not None and cu_seq_lens_q is not None, "only for continuous batching"
    key, value = cache.update(key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=settings)
    window = getattr(cache.layer_to_allocator[module.layer_idx], "sliding_window", None)
    if sliding_window not in (None, window):
        raise ValueError(f"a layer looks {sliding_window} tokens back, and its cache keeps {window or 'all'}")
    starts, key_starts = cu_seq_lens_q.tolist(), settings["cu_seq_lens_k"].tolist()
    parts = []
    for start, end, key_start, key_end in zip(
        starts[:-1], starts[1:], key_starts[:-1], key_starts[1:], strict=True
    ):
        length, keys = end - start, key_end - key_start
        mask = None
        if length > 1 and (length != keys or (window or length) < length):
            mask = _causal(length, keys, window, query.device)
        part, _ = sdpa_attention_forward(
            module,
            query[:, :, start:end],
            key[:, :, key_start:key_end],
            value[:, :, key_start:key_end],
            mask,
            is_causal=mask is None,
            **settings,
        )
        parts.append(part)
    return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0], None


def _causal(length: int, keys: int, window: int | None, device: torch.device) -> torch.Tensor:
    """[1, 1, length, keys] true where the last `length` of `keys` tokens may look."""
    own = torch.arange(keys - length, keys, device=device)[:, None]
    other = torch.arange(keys, device=device)[None, :]
    allowed = other <= own
    if window is not None:
        allowed &= other > own - window
    return allowed[None, None]


def register() -> None:
    """Makes the name known to transformers; models ask for no mask under it."""
    ALL_ATTENTION_FUNCTIONS.register(NAME, packed_attention)

"""What a forward pass of a transformers model is given, as hooks before it see it."""

from __future__ import annotations

from typing import Any

import torch


def input_ids(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
    """[B, S], or None where embeddings are given."""
    return kwargs.get("input_ids", args[0] if args else None)


def given_tokens(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
    """[B, S] ids or [B, S, H] embeddings; None where there are neither."""
    ids = input_ids(args, kwargs)
    return ids if ids is not None else kwargs.get("inputs_embeds")


def real_tokens(args: tuple[Any, ...], kwargs: dict[str, Any], length: int) -> torch.Tensor | None:
    """[B, S] bool, False for padding among the `length` tokens of this pass; None where no mask says so."""
    mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
    if isinstance(mask, torch.Tensor) and mask.ndim == 2 and mask.shape[1] >= length:
        return mask[:, -length:].bool()
    return None


def past_length(kwargs: dict[str, Any]) -> int:
    """Tokens that are in the cache already, padding counted."""
    cache = kwargs.get("past_key_values")
    return int(cache.get_seq_length()) if cache is not None else 0

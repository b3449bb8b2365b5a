"""The quality term of tuning: the data's next token, the base model's own prediction of it, or some of both.

Asking for the base model's distribution (distillation) says of every token what the data says of one sample:
less noise in the gradient, so more room for the cache's. It costs one more forward pass, of the model without
its factors and with its old routers; no second model is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from melinoe.models.layers import MoeLayer


@dataclass
class Likelihood:
    """nll: sum of the negative log-likelihood over completion tokens; tokens: their number.

    divergence: sum of KL(base, tuned) over `divergence_tokens` predicted tokens, where it was asked for;
    base_nll: the base's own sum over completion tokens, likewise.
    """

    nll: torch.Tensor
    tokens: int
    divergence: torch.Tensor | None = None
    divergence_tokens: int = 0
    base_nll: torch.Tensor | None = None


def next_token_positions(
    mask_BS: torch.Tensor, prompt_lengths_B: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """([B, S] positions that predict a real token, [B, S] those that predict a completion token).

    These are not cache_loss.scored_positions, though they look alike: a likelihood counts the position that
    predicts the first completion token, which is the prompt's last, while the loads of decoding begin when
    that token is fed.
    """
    mask_BS = mask_BS.bool()
    position_BS = mask_BS.long().cumsum(1) - 1
    follows_BS = mask_BS & mask_BS.roll(-1, 1)
    follows_BS[:, -1] = False
    return follows_BS, follows_BS & (position_BS + 1 >= prompt_lengths_B[:, None])


def unwrapped(model: nn.Module) -> nn.Module:
    """The model itself, where accelerate put DistributedDataParallel around it."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def logits_at(model: nn.Module, batch: dict[str, torch.Tensor], chosen_BS: torch.Tensor) -> torch.Tensor:
    """[N, V] logits of the chosen positions alone, in order.

    The output layer sees only these: with short answers it would otherwise be a third of a small model's
    work. Labels are not passed, because several models then add their load-balancing loss, which fights
    locality.
    """
    ids_BS = batch["input_ids"]
    rows_N = chosen_BS.reshape(-1).nonzero()[:, 0]
    hooked = False

    def only_chosen(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        nonlocal hooked
        if not args or args[0].shape[:2] != ids_BS.shape:
            return None
        hooked = True
        return (args[0].reshape(-1, args[0].shape[-1])[rows_N][None], *args[1:])

    output_layer = unwrapped(model).get_output_embeddings()  # type: ignore[operator]
    handle = output_layer.register_forward_pre_hook(only_chosen) if output_layer is not None else None
    try:
        logits = model(input_ids=ids_BS, attention_mask=batch["attention_mask"], use_cache=False).logits
    finally:
        if handle is not None:
            handle.remove()
    logits_NV = logits.reshape(-1, logits.shape[-1])
    return logits_NV if hooked else logits_NV[rows_N]


@torch.no_grad()
def sequence_nll(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """[B] float64: negative log-likelihood of each row's completion, nats, summed over its tokens.

    Args:
        batch: input_ids, attention_mask [B, S] padded right, prompt_lengths [B].
    """
    _, completion_BS = next_token_positions(batch["attention_mask"], batch["prompt_lengths"])
    targets_N = batch["input_ids"].roll(-1, 1)[completion_BS]
    logits_NV = logits_at(model, batch, completion_BS).float()
    sizes = completion_BS.sum(1).tolist()
    rows = zip(logits_NV.split(sizes), targets_N.split(sizes), strict=True)
    return torch.stack([F.cross_entropy(*row, reduction="sum") for row in rows]).double()


@contextmanager
def as_base(model: nn.Module, layers: list[MoeLayer], base_routers: list[nn.Module]) -> Iterator[None]:
    """The model as it was before tuning: frozen routers in place of the tuned ones, no low-rank factors."""
    factors = [getattr(layer.experts, "low_rank", None) for layer in layers]

    def put(routers: list[nn.Module], low_rank: list[Any]) -> None:
        for layer, router, factor in zip(layers, routers, low_rank, strict=True):
            parent, _, name = layer.router_name.rpartition(".")
            setattr(unwrapped(model).get_submodule(parent), name, router)
            layer.experts.low_rank = factor

    put(base_routers, [None] * len(layers))
    try:
        yield
    finally:
        put([layer.router for layer in layers], factors)


def likelihood(
    model: nn.Module,
    batch: dict[str, torch.Tensor],
    layers: list[MoeLayer],
    base_routers: list[nn.Module],
    distill: bool,
    distill_prompt: bool,
) -> Likelihood:
    """One forward pass with gradient, and with `distill` one of the base model without.

    The base model goes first: what listens to the routers afterwards (RouterTap) must hear the tuned ones
    alone.

    Args:
        batch: input_ids, attention_mask [B, S], prompt_lengths [B].
        base_routers: frozen copies of the routers as they were.
        distill, distill_prompt: whether to compare with the base, and on the prompt's tokens as well.
    """
    follows_BS, completion_BS = next_token_positions(batch["attention_mask"], batch["prompt_lengths"])
    chosen_BS = follows_BS if distill and distill_prompt else completion_BS
    targets_N = batch["input_ids"].roll(-1, 1)[completion_BS]
    base_NV = None
    if distill:
        with torch.no_grad(), as_base(model, layers, base_routers):
            base_NV = logits_at(model, batch, chosen_BS).float()
    logits_NV = logits_at(model, batch, chosen_BS).float()
    is_completion_N = completion_BS[chosen_BS]
    nll = F.cross_entropy(logits_NV[is_completion_N], targets_N, reduction="sum")
    result = Likelihood(nll, len(targets_N))
    if base_NV is not None:
        base_NV = base_NV.log_softmax(-1)
        result.divergence = F.kl_div(logits_NV.log_softmax(-1), base_NV, reduction="sum", log_target=True)
        result.divergence_tokens = len(base_NV)
        result.base_nll = F.nll_loss(base_NV[is_completion_N], targets_N, reduction="sum")
    return result

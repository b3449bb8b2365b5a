"""Listens to the routers of a model while it runs: logits, choices and weights of every MoE layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import nn

from melinoe.models.layers import MoeLayer


@dataclass
class RouterRecord:
    """What one router did in one forward pass over T tokens.

    logits: [T, E], with gradient where the router is trained.
    indices: [T, K] the experts that were chosen (never recomputed from logits: groups and
        correction biases move the choice); weights: [T, K].
    inputs: the router's own positional arguments, so that a frozen copy can be asked the same.
    """

    logits: torch.Tensor
    indices: torch.Tensor
    weights: torch.Tensor
    inputs: tuple[Any, ...] = field(repr=False, default=())


class RouterTap:
    """Records what every router does while the tap is open.

    Used as `with RouterTap(layers) as tap: model(...)`; then `tap.records[i]` belongs to MoE layer i.
    The second forward pass that gradient checkpointing makes comes after the tap has closed and is not seen.
    """

    def __init__(self, layers: list[MoeLayer], choices_only: bool = False) -> None:
        """Args: choices_only: keep the indices alone. The rest holds on to what every layer was fed, which
        with dozens of wide layers is more than the model."""
        self.layers, self.choices_only = layers, choices_only
        self.records: list[RouterRecord] = []
        self._handles: list[Any] = []

    def _hook(self, layer: MoeLayer) -> Any:
        def record(_module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            logits, weights, indices = layer.routing_of(output)
            if self.choices_only:
                nothing = logits.new_empty(0)
                self.records.append(RouterRecord(nothing, indices, nothing))
                return
            self.records.append(RouterRecord(logits, indices, weights, inputs))

        return record

    def __enter__(self) -> RouterTap:
        self.records = []
        self._handles = [layer.router.register_forward_hook(self._hook(layer)) for layer in self.layers]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def indices(self) -> torch.Tensor:
        """[L, T, K] integer: the experts asked for, layer by layer."""
        assert len(self.records) == len(self.layers), (len(self.records), len(self.layers))
        return torch.stack([record.indices for record in self.records])

    def by_sequence(self, shape: Sequence[int], lengths: Iterable[int]) -> list[np.ndarray]:
        """The experts that each sequence of a batch asked for: [n, L, K] int16 each, on the host.

        Args:
            shape: (B, S) of the batch, padded on the right.
            lengths: n of each sequence: so many of its positions are read back.
        """
        chosen = self.indices().reshape(len(self.layers), *shape, -1).permute(1, 2, 0, 3)  # [B, S, L, K]
        rows = chosen.to("cpu", torch.int16).numpy()
        return [row[:length].copy() for row, length in zip(rows, lengths, strict=True)]


# {kind: log scores from logits}: what routers make of logits before they choose and weigh
_LOG_SCORES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "softmax": lambda logits: logits.log_softmax(-1),
    "sigmoid": nn.functional.logsigmoid,
    "sqrtsoftplus": lambda logits: nn.functional.softplus(logits).log() / 2,  # deepseek_v4
}


def score_kind(record: RouterRecord) -> str:
    """How a router turns logits into scores: "softmax", "sigmoid", "sqrtsoftplus" or "probability".

    Decided from one recorded call, without a table of names: the logarithm of the weights' ratios within a
    token equals the difference of the chosen experts' log scores, or of the logarithms of values that already
    are probabilities. With one expert per token (llama4) its weights are compared from token to token
    instead, up to a constant factor. "softmax" where none fits (sparsemixer) and where nothing can be told
    (one expert with weight 1).
    """
    with torch.no_grad():
        logits = record.logits.float()
        if bool((logits >= 0).all()) and torch.allclose(logits.sum(-1), logits.new_ones(()), atol=1e-3):
            return "probability"
        chosen = record.indices.clamp(max=logits.shape[1] - 1)
        log_weights = record.weights.float().clamp_min(1e-30).log()
        one = record.indices.shape[1] == 1
        if one and bool((log_weights == log_weights[:1]).all()):  # normalised, so always 1: says nothing
            return "softmax"
        off: dict[str, float] = {}
        for kind, log_scores in _LOG_SCORES.items():
            differences = log_scores(logits).gather(1, chosen) - log_weights
            reference = differences.median() if one else differences[:, :1]
            errors = (differences - reference).abs()[:, 0 if one else 1 :]
            off[kind] = float(errors.median()) if errors.numel() else 0.0
    nearest = min(off, key=lambda kind: off[kind])
    return nearest if off[nearest] < min(0.5 * off["softmax"], 0.05) else "softmax"


def router_probabilities(logits: torch.Tensor, kind: str) -> torch.Tensor:
    """p_f or p_b: [T, E] float32, each row sums to 1 (design/method.md, before bias and groups)."""
    logits = logits.float()
    if kind == "probability":
        return logits
    if kind == "softmax":
        return logits.softmax(-1)
    scores = logits.sigmoid() if kind == "sigmoid" else nn.functional.softplus(logits).sqrt()
    return scores / scores.sum(-1, keepdim=True).clamp_min(1e-20)


def requests(indices: torch.Tensor, num_experts: int) -> torch.Tensor:
    """[..., K] expert ids -> [..., E] float32, 1 where an expert was asked for."""
    shape = (*indices.shape[:-1], num_experts + 1)  # one more column takes expert-parallel sentinels
    return torch.zeros(shape, device=indices.device).scatter_(-1, indices.clamp(max=num_experts), 1.0)[
        ..., :num_experts
    ]

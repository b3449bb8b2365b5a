"""Finds the experts and the routers of any transformers model, and listens to the routers.

transformers decorates nearly every experts class (`use_experts_implementation`; melinoe.models.undecorated has the
others) and records every router (`_can_record_outputs["router_logits"]`), so no table of model names is
needed. Everything above
this file speaks of "MoE layer 0, 1, ..." in the order of the model's modules; dense layers are
not counted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import takewhile
from types import TracebackType
from typing import Any

import torch
from torch import nn

from melinoe.errors import MelinoeError
from melinoe.models import undecorated


@dataclass(frozen=True)
class MoeLayer:
    """One mixture-of-experts layer: its experts module and the router that feeds it."""

    index: int
    experts_name: str
    experts: nn.Module
    router_name: str
    router: nn.Module
    logits_index: int  # where the logits stand in the router's output tuple
    # the router's output -> (logits [T, E], weights [T, K], indices [T, K])
    routing: Callable[[Any], tuple[torch.Tensor, ...]] = field(repr=False, compare=False)

    @property
    def num_experts(self) -> int:
        return int(self.experts.num_experts)  # type: ignore[arg-type]


def is_experts(module: nn.Module) -> bool:
    """Whether a module is decorated for transformers' ExpertsInterface."""
    return all(hasattr(module, name) for name in ("has_gate", "is_transposed", "num_experts"))


def experts_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(name, module) of every experts module, in module order."""
    undecorated.describe(model)
    return [(name, module) for name, module in model.named_modules() if is_experts(module)]


def _routers(model: nn.Module) -> dict[str, tuple[nn.Module, int]]:
    """{name: (router, index of the logits in its output)}, from transformers' own recording table."""
    found: dict[str, tuple[nn.Module, int]] = {}
    for owner in model.modules():
        spec = (getattr(owner, "_can_record_outputs", None) or {}).get("router_logits")
        for one in [] if spec is None else spec if isinstance(spec, list) else [spec]:
            target = getattr(one, "target_class", one)
            for name, module in model.named_modules():
                if isinstance(target, type) and isinstance(module, target):
                    found[name] = (module, getattr(one, "index", 0))
    return found


def _shared_steps(one: str, other: str) -> int:
    """How many steps of two dotted names agree from the start."""
    pairs = zip(one.split("."), other.split("."), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def moe_layers(model: nn.Module) -> list[MoeLayer]:
    """The MoE layers of a model, each with its router.

    Raises:
        MelinoeError: a dense model, or experts whose router cannot be found.
    """
    experts = experts_modules(model)
    if not experts:
        raise MelinoeError(
            "not a mixture-of-experts model that transformers' ExpertsInterface covers",
            got=type(model).__name__,
            allowed="a model with experts modules, such as OLMoE, Mixtral, Qwen3-MoE or gpt-oss",
        )
    routers = _routers(model)
    layers = []
    for index, (name, module) in enumerate(experts):
        # the router of a layer is the one that shares the longest path with the experts
        best = max(routers, key=lambda router: _shared_steps(router, name), default=None)
        if best is None:
            raise MelinoeError(f"no router found for {name}", got=type(model).__name__)
        router, logits_index = routers.pop(best)
        routing = partial(undecorated.routing, model, best, logits_index=logits_index)
        layers.append(MoeLayer(index, name, module, best, router, logits_index, routing))
    return layers


def experts_per_token(model: nn.Module) -> int:
    """K, from the config (transformers names it num_experts_per_tok, or by an attribute map)."""
    config = model.config.get_text_config()  # type: ignore[operator,union-attr]
    for name in (
        "num_experts_per_tok",
        "top_k_experts",
        "num_experts_per_token",
        "moe_topk",
        "experts_per_token",
        "moe_top_k",
    ):
        value = getattr(
            config, name, getattr(getattr(config, "ffn_config", None), name, None)
        )  # dbrx nests it
        if value is not None:
            return int(value[0] if isinstance(value, list | tuple) else value)
    raise MelinoeError("the config does not say how many experts a token uses", got=type(config).__name__)


def fingerprint(model: nn.Module) -> str:
    """Identifies the routing of a model: 16 hexadecimal digits.

    Two models share it when the shape of their mixture and their routers' weights agree (compared in
    bfloat16, so that loading in another dtype does not matter). Experts of another width, precision or
    low-rank addition keep it: the same tokens ask the same experts of the same routers. Traces,
    predictors, adapters and stores carry it and refuse each other when it differs.
    """
    digest = hashlib.sha256(str(getattr(model.config, "model_type", "")).encode())
    for layer in moe_layers(model):
        digest.update(f"{layer.index}:{layer.num_experts}:{experts_per_token(model)};".encode())
        for name, tensor in sorted(layer.router.state_dict().items()):
            if tensor.is_floating_point():
                values = tensor.detach().to("cpu", torch.bfloat16).contiguous().view(torch.int16)
                digest.update(name.encode() + values.numpy().tobytes())
    return digest.hexdigest()[:16]


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

    def __init__(self, layers: list[MoeLayer]) -> None:
        self.layers = layers
        self.records: list[RouterRecord] = []
        self._handles: list[Any] = []

    def _hook(self, layer: MoeLayer) -> Any:
        def record(_module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            logits, weights, indices = layer.routing(output)
            self.records.append(RouterRecord(logits.reshape(-1, logits.shape[-1]), indices, weights, inputs))

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


def score_kind(record: RouterRecord) -> str:
    """How a router turns logits into scores: "softmax", "sigmoid" or "probability".

    Decided from one recorded call, without a table of names: the logarithm of the weights' ratios
    within a token equals the difference of the logits (softmax), of their log-sigmoids (sigmoid), or of
    the logarithms of values that already are probabilities. With one expert per token (llama4) its weights
    are compared from token to token instead, up to a constant factor. "softmax" where none fits (sparsemixer)
    and where nothing can be told (one expert with weight 1).
    """
    with torch.no_grad():
        logits = record.logits.float()
        if bool((logits >= 0).all()) and torch.allclose(logits.sum(-1), logits.new_ones(()), atol=1e-3):
            return "probability"
        chosen = torch.gather(logits, 1, record.indices.clamp(max=logits.shape[1] - 1))
        log_weights = record.weights.float().clamp_min(1e-30).log()
        ratios = log_weights[:, 1:] - log_weights[:, :1]
        if record.indices.shape[1] > 1:
            errors = {
                "softmax": (chosen[:, 1:] - chosen[:, :1] - ratios).abs(),
                "sigmoid": (nn.functional.logsigmoid(chosen).diff(dim=1).cumsum(1) - ratios).abs(),
            }
        elif bool((log_weights == log_weights[:1]).all()):  # normalised, so always 1: says nothing
            return "softmax"
        else:
            log_scores = {
                "softmax": chosen - logits.logsumexp(1, keepdim=True),
                "sigmoid": nn.functional.logsigmoid(chosen),
            }
            errors = {
                kind: (scores - log_weights - (scores - log_weights).median()).abs()
                for kind, scores in log_scores.items()
            }
        scale = {kind: float(error.median()) if error.numel() else 0.0 for kind, error in errors.items()}
    return "sigmoid" if scale["sigmoid"] < min(0.5 * scale["softmax"], 0.05) else "softmax"


def router_probabilities(logits: torch.Tensor, kind: str) -> torch.Tensor:
    """p_f or p_b: [T, E] float32, each row sums to 1 (design/method.md, before bias and groups)."""
    logits = logits.float()
    if kind == "probability":
        return logits
    if kind == "sigmoid":
        scores = logits.sigmoid()
        return scores / scores.sum(-1, keepdim=True).clamp_min(1e-20)
    return logits.softmax(-1)


def requests(indices: torch.Tensor, num_experts: int) -> torch.Tensor:
    """[..., K] expert ids -> [..., E] float32, 1 where an expert was asked for."""
    shape = (*indices.shape[:-1], num_experts + 1)  # one more column takes expert-parallel sentinels
    return torch.zeros(shape, device=indices.device).scatter_(-1, indices.clamp(max=num_experts), 1.0)[
        ..., :num_experts
    ]

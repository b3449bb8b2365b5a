"""Which weights a model has, told from a few of them, where models of the same routers must not be mixed up.

The fingerprint (layers.py) covers routing alone. A checkpoint that was tuned further with frozen routers, in
its experts or around them, shares it, and an adapter would be added to weights that it was not made for. So a
model also has an identity: of each of its parts (the experts of a layer; what else a layer has; what belongs
to none) a digest over the beginnings of its tensors. Two models are the same where every part that both know
agrees.

A few values do: whoever trains a matrix changes its rows, many of their elements in bfloat16 too, and eight
experts of each layer (others in every layer) see a training of one expert in twenty. No more than these is
read: 960 rows of 60 layers of 256 experts with two tensors each.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import nn

from melinoe.models.layers import MoeLayer, moe_layers, own_parameters, per_expert

SAMPLED_EXPERTS = 8  # of each layer
ROW = 256  # elements of a tensor at most
# a number that has been float16 is not the bfloat16 that it would have become without: rounded twice, and
# small ones lose digits
_COMPARED = (torch.float32, torch.bfloat16)

Identity = dict[str, str]
Beginning = Callable[[str, nn.Parameter], torch.Tensor | None]


def sampled_experts(index: int, num_experts: int) -> list[int]:
    """Which experts of MoE layer `index` are looked at: spread over the layer, others in the next one."""
    count = min(SAMPLED_EXPERTS, num_experts)
    return sorted((index + number * num_experts // count) % num_experts for number in range(count))


def row_length(shape: tuple[int, ...]) -> int:
    """How many elements are taken of a tensor (of one expert): the start of its first row."""
    return min(ROW, shape[-1]) if shape else 1


def beginning(tensor: torch.Tensor) -> torch.Tensor:
    """[row_length] elements of a tensor, without touching the rest of it."""
    while tensor.dim() > 1:
        tensor = tensor[0]
    return tensor.reshape(-1)[:ROW]


def digest(beginnings: Iterable[torch.Tensor | None]) -> str:
    """16 hexadecimal digits, compared in bfloat16: who loads in float32 and who in bfloat16 has the same.

    Returns:
        "" where it is not known: a tensor is not there, or held in other numbers (float16 and packed ones).
    """
    result = hashlib.sha256()
    for values in beginnings:
        if values is None or values.device.type == "meta" or values.dtype not in _COMPARED:
            return ""
        result.update(
            values.detach().to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes()
        )
    return result.hexdigest()[:16]


def experts_digest(layer: MoeLayer) -> str:
    """Of a layer's experts that are resident; "" where they are not."""
    parameters = [parameter for _, parameter in own_parameters(layer.experts)]
    if not parameters or any(type(parameter) is not nn.Parameter for parameter in parameters):
        return ""
    count = layer.num_experts
    rows = [per_expert(parameter, count) for parameter in parameters]
    return digest(beginning(row[expert]) for expert in sampled_experts(layer.index, count) for row in rows)


def identity(model: nn.Module) -> Identity:
    """{part of a model: digest}; what cannot be known is left out.

    Routers and what tuning adds are no part of it: a model with an adapter has the identity of its base.
    Offloaded experts are those of the store.
    """
    layers = moe_layers(model)
    paged = getattr(model, "melinoe_paged", None)
    experts = (
        {layer.experts_name: experts_digest(layer) for layer in layers} if paged is None else paged.identity()
    )
    return {
        **{name: one for name, one in experts.items() if one},
        **resident_identity(model, layers, _in_memory),
    }


def _in_memory(_: str, parameter: nn.Parameter) -> torch.Tensor | None:
    return beginning(parameter) if type(parameter) is nn.Parameter else None


def resident_identity(model: nn.Module, layers: list[MoeLayer], beginning_of: Beginning) -> Identity:
    """The digests of what is neither an expert's nor a router's, one for each layer of the model.

    Args:
        beginning_of: the start of a parameter by its name; None: not known, nor is the digest of its part.
    """
    others = tuple(f"{name}." for layer in layers for name in (layer.experts_name, layer.router_name))
    parts: dict[str, list[torch.Tensor | None]] = {}
    for name, parameter in model.named_parameters():
        if not name.startswith(others):
            numbered = re.match(r".*?\.\d+(?=\.)", name)
            parts.setdefault(numbered[0] if numbered else name, []).append(beginning_of(name, parameter))
    found = {name: digest(beginnings) for name, beginnings in parts.items()}
    return {name: one for name, one in found.items() if one}


def differing(one: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
    """The parts that two identities both know and that differ; of files from before there were any, none."""
    return [name for name in one if name in other and one[name] != other[name]]


def in_words(parts: list[str]) -> str:
    return f"other weights in {parts[0]}" + (f" and {len(parts) - 1} more" if len(parts) > 1 else "")

"""Writes and applies what tuning learned: PEFT's own adapter folder, plus one file of ours.

    adapter_config.json         PEFT LoRA: target_parameters (experts) and modules_to_save (routers), in full
    adapter_model.safetensors   factors and routers under the names that PEFT generates
    melinoe.json                format version, fingerprints, settings, seed, versions, last losses
    losses.jsonl                one line per logged step (when written by tune)

`PeftModel.from_pretrained(model, folder)` opens it without melinoe. PEFT itself refuses a model whose
experts were stripped for offloading; `apply_adapter` takes either kind.

PEFT names (checked against 0.21 in tests): of two targeted parameters of one module the wrappers nest,
the first parameter innermost, so the up projection is `experts.base_layer.lora_*` and the down projection
`experts.lora_*`. lora_A.weight is [E * r, in]; lora_B.weight is [out, r * E] with the expert index fastest.
"""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from melinoe._version import __version__
from melinoe.errors import MelinoeError
from melinoe.experts.forward import use_melinoe_experts
from melinoe.experts.low_rank import LowRankExperts, Projection, projection_parameter
from melinoe.files import whole_folder
from melinoe.models.identity import Identity, differing, identity, in_words
from melinoe.models.layers import MoeLayer, fingerprint, moe_layers
from melinoe.outputs import carded_folder
from melinoe.sticky.model import make_sticky
from melinoe.sticky.settings import stickiness

FORMAT_VERSION = 1
CARD, WEIGHTS, CONFIG = "melinoe.json", "adapter_model.safetensors", "adapter_config.json"
ADAPTER = carded_folder(
    "an adapter", CARD, "melinoe-adapter", files=(WEIGHTS, CONFIG, "losses.jsonl", "evaluations.jsonl")
)
_PREFIX = "base_model.model."
_SIDES: tuple[Projection, ...] = ("up", "down")
# of PEFT's settings for LoRA; none of ours has one, but PEFT may have gone on with an adapter in its folder
_CHANGES_THE_SUM = (
    "use_rslora", "use_dora", "use_qalora", "lora_bias", "rank_pattern", "alpha_pattern", "layer_replication",
    "alora_invocation_tokens", "arrow_config", "use_bdlora", "kasa_config",
)  # fmt: skip
_PEFT_VERSION = "0.21.2"  # whose names and shapes these are


def _factor_names(layer: MoeLayer, projection: Projection) -> tuple[str, str]:
    inner = ".base_layer" if projection == "up" else ""
    start = f"{_PREFIX}{layer.experts_name}{inner}"
    return f"{start}.lora_A.weight", f"{start}.lora_B.weight"


def _peft_order(layer: MoeLayer, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(A [E, r, in], B [E, out, r]) as PEFT counts in and out, and back again.

    It believes a class that transformers does not decorate (llama4's) not to be transposed, though it is:
    what goes in is out to it, and its A is our B.
    """
    return (b.mT, a.mT) if getattr(layer.experts, "weights_scale_input", False) else (a, b)


def adapter_tensors(layers: list[MoeLayer]) -> dict[str, torch.Tensor]:
    """The routers and factors of a tuned model, under PEFT's names and shapes."""
    tensors = {}
    for layer in layers:
        for projection in ("up", "down"):
            a_ERI, b_EOR = _peft_order(layer, *layer.experts.low_rank.factors(projection))
            name_a, name_b = _factor_names(layer, projection)
            tensors[name_a] = a_ERI.detach().reshape(-1, a_ERI.shape[2])
            tensors[name_b] = b_EOR.detach().permute(1, 2, 0).reshape(b_EOR.shape[1], -1)
        for name, value in layer.router.state_dict().items():
            tensors[f"{_PREFIX}{layer.router_name}.{name}"] = value.detach()
    return {name: value.cpu().clone().contiguous() for name, value in tensors.items()}


def _peft_config(model: nn.Module, layers: list[MoeLayer], base: str) -> dict[str, Any]:
    low_rank = layers[0].experts.low_rank
    return {
        "peft_type": "LORA",
        "peft_version": _PEFT_VERSION,
        "auto_mapping": {"base_model_class": type(model).__name__, "parent_library": type(model).__module__},
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": low_rank.rank,
        "lora_alpha": low_rank.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": [],
        "target_parameters": [
            f"{layer.experts_name}.{projection_parameter(layer.experts, projection)}"
            for layer in layers
            for projection in ("up", "down")
        ],
        "modules_to_save": [layer.router_name for layer in layers],
    }


@dataclass(frozen=True)
class Base:
    """The model that was tuned.

    Attributes:
        name: or path of the checkpoint.
        fingerprint: melinoe.models.layers.fingerprint of it.
        format: how its experts were rounded while it was tuned: auto (not), int8 or int4.
        identity: melinoe.models.identity.identity of it; empty: not known.
    """

    name: str
    fingerprint: str
    format: str = "auto"
    identity: Identity = field(default_factory=dict)


def write_adapter(
    model: nn.Module,
    folder: str | Path,
    base: Base,
    *,
    settings: dict[str, Any] | None = None,
    result: dict[str, Any] | None = None,
    keep: tuple[Path, ...] = (),
    check: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Writes the adapter of a tuned model (routers changed, `low_rank` on every experts module).

    The folder appears complete or not at all. An existing folder is replaced.

    Args:
        base: what was tuned.
        settings, result: put into melinoe.json.
        keep: files to copy into the folder.
        check: whether the folder may be replaced, asked when the new one is complete.

    Returns:
        What melinoe.json holds.

    Raises:
        MelinoeError: a tensor is not finite; nothing is written.
    """
    folder = Path(folder)
    layers = moe_layers(model)
    tensors = adapter_tensors(layers)
    for name, value in tensors.items():
        if not bool(torch.isfinite(value).all()):
            raise MelinoeError(
                f"tuning gave values that are not finite in {name}", next_step="lower the learning rates"
            )
    sticky = getattr(model, "melinoe_sticky", None)
    card = {
        "format": "melinoe-adapter",
        "format_version": FORMAT_VERSION,
        "files": [WEIGHTS, CONFIG, *(file.name for file in keep)],
        "base": base.name,
        "base_fingerprint": base.fingerprint,
        "base_format": base.format,
        "base_identity": base.identity,
        "fingerprint": fingerprint(model),
        "sticky": sticky.settings.to_json() if sticky is not None else None,
        "settings": settings or {},
        "result": result or {},
        "versions": {
            "melinoe": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }
    with whole_folder(folder, check) as new:
        save_file(tensors, new / WEIGHTS, {"format": "pt"})
        (new / CONFIG).write_text(json.dumps(_peft_config(model, layers, base.name), indent=2) + "\n")
        (new / CARD).write_text(json.dumps(card, indent=2) + "\n")
        for file in keep:
            shutil.copyfile(file, new / file.name)
    return card


@dataclass(frozen=True)
class Adapter:
    """An adapter folder that was opened and checked; the tensors are read by `tensors`."""

    folder: Path
    card: dict[str, Any]
    rank: int
    alpha: float

    @property
    def base_fingerprint(self) -> str:
        return str(self.card["base_fingerprint"])

    def tensors(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / WEIGHTS)


def read_adapter(folder: str | Path) -> Adapter:
    """Opens an adapter folder.

    Raises:
        MelinoeError: not an adapter of ours, incomplete, or of a later format.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise MelinoeError("no such adapter folder", got=folder, next_step="make one with: melinoe tune")
    try:
        card = json.loads((folder / CARD).read_text())
        config = json.loads((folder / CONFIG).read_text())
        rank, alpha, version = int(config["r"]), float(config["lora_alpha"]), int(card["format_version"])
        card["base_fingerprint"], card["fingerprint"], dict(card.get("base_identity", {}))
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            assert file.keys()
    except FileNotFoundError:
        missing = [name for name in (CARD, CONFIG, WEIGHTS) if not (folder / name).is_file()]
        raise MelinoeError(
            f"{folder} is not a complete melinoe adapter", got=f"no {', '.join(missing)}"
        ) from None
    except Exception as error:
        raise MelinoeError(
            f"cannot read the adapter {folder}", got=error, next_step="tune it again"
        ) from None
    if version > FORMAT_VERSION:
        raise MelinoeError(
            f"{folder} was written by a later melinoe",
            got=f"format {version}",
            allowed=f"up to {FORMAT_VERSION}",
        )
    for name in _CHANGES_THE_SUM:
        if config.get(name):
            raise MelinoeError(
                f"{folder} asks for a sum that melinoe does not compute",
                got=f"{name} {config[name]} ({CONFIG})",
                allowed="W + (lora_alpha / r) B A",
                next_step="merge it with PEFT",
            )
    return Adapter(folder, card, rank, alpha)


@torch.no_grad()
def apply_adapter(model: nn.Module, folder: str | Path) -> dict[str, Any]:
    """Puts an adapter's routers and factors on a model, resident or offloaded.

    Routers take the model's dtype, factors stay float32. Resident experts are switched to melinoe's
    experts function, which reads the factors; offloaded ones already run on it. The model becomes as sticky
    as it was tuned to be, or not sticky (melinoe.sticky).

    Returns:
        What the adapter's melinoe.json holds.

    Raises:
        MelinoeError: the adapter belongs to another model, is applied already, or is broken. The model is
            unchanged then.
    """
    adapter = read_adapter(folder)
    layers = moe_layers(model)
    for layer, (low_rank, router) in zip(layers, adapter_parts(model, adapter), strict=True):
        layer.experts.low_rank = low_rank
        for name, value in layer.router.state_dict().items():
            value.copy_(router[name])
    if any(True for layer in layers for _ in layer.experts.parameters(recurse=False)):
        use_melinoe_experts(model)
    model.melinoe_adapter = str(folder)  # type: ignore[assignment]
    if "sticky" in adapter.card:  # null: tuned without, whatever the config says
        make_sticky(model, stickiness(adapter.card["sticky"]))
    return adapter.card


def adapter_parts(model: nn.Module, adapter: Adapter) -> list[tuple[LowRankExperts, dict[str, torch.Tensor]]]:
    """The factors and the router of every MoE layer, in order; the model's routers must be there.

    Raises:
        MelinoeError: the adapter belongs to another model, is applied already, or is broken.
    """
    layers = moe_layers(model)
    found = fingerprint(model)
    if found != adapter.base_fingerprint or any(getattr(layer.experts, "low_rank", None) for layer in layers):
        already = found == adapter.card["fingerprint"]
        raise MelinoeError(
            f"the adapter {adapter.folder} is already part of this model" if already
            else f"the adapter {adapter.folder} was tuned on another model",
            got=f"fingerprint {found}",
            allowed=f"fingerprint {adapter.base_fingerprint}, as of {adapter.card.get('base')}",
        )  # fmt: skip
    check_base(adapter, identity(model))
    tensors = adapter.tensors()
    known = {name for layer in layers for side in _SIDES for name in _factor_names(layer, side)}
    known |= {
        f"{_PREFIX}{layer.router_name}.{name}" for layer in layers for name in layer.router.state_dict()
    }
    if unknown := sorted(tensors.keys() - known):
        raise MelinoeError(
            f"the adapter {adapter.folder} changes more than routers and experts",
            got=unknown[0] + (f" and {len(unknown) - 1} others" if len(unknown) > 1 else ""),
            next_step="merge it with PEFT",
        )
    try:
        return [_parts_of(layer, adapter, tensors) for layer in layers]
    except (KeyError, RuntimeError) as error:
        raise MelinoeError(f"the adapter {adapter.folder} does not fit this model", got=error) from None


class OtherBaseError(MelinoeError):
    """An adapter and a model whose routers agree, and whose other weights do not."""


def check_base(adapter: Adapter, found: Identity) -> None:
    """Refuses weights that are not those that were tuned.

    Args:
        found: of a model or of parts of it; parts that an adapter knows nothing of are not compared, which
            are all for one from before there was an identity.

    Raises:
        OtherBaseError: a part differs.
    """
    if others := differing(adapter.card.get("base_identity", {}), found):
        raise OtherBaseError(
            f"the adapter {adapter.folder} was tuned on another model with the same routers",
            got=in_words(others),
            allowed=f"the weights of {adapter.card.get('base')}",
            next_step="give the model that it was tuned on, or tune this one",
        )


def _parts_of(
    layer: MoeLayer, adapter: Adapter, tensors: dict[str, torch.Tensor]
) -> tuple[LowRankExperts, dict[str, torch.Tensor]]:
    """The factors and the router of one layer, shapes taken from the file."""
    state = layer.router.state_dict()
    device = next(iter(state.values())).device
    factors: dict[str, torch.Tensor] = {}
    for projection in ("up", "down"):
        name_a, name_b = _factor_names(layer, projection)
        a, b = tensors[name_a], tensors[name_b]
        a_ERI = a.reshape(layer.num_experts, adapter.rank, -1)
        b_EOR = b.reshape(-1, adapter.rank, layer.num_experts).permute(2, 0, 1)
        a_ERI, b_EOR = _peft_order(layer, a_ERI, b_EOR)
        factors |= {f"{projection}_A": a_ERI.contiguous(), f"{projection}_B": b_EOR.contiguous()}
    low_rank = LowRankExperts(
        layer.num_experts,
        (factors["up_A"].shape[2], factors["up_B"].shape[1]),
        (factors["down_A"].shape[2], factors["down_B"].shape[1]),
        adapter.rank,
        adapter.alpha,
    )
    low_rank.load_state_dict(factors)
    router = {name: tensors[f"{_PREFIX}{layer.router_name}.{name}"] for name in state}
    for name, value in state.items():
        if value.shape != router[name].shape:
            raise RuntimeError(
                f"{layer.router_name}.{name} is {tuple(router[name].shape)}, not {tuple(value.shape)}"
            )
    return low_rank.requires_grad_(False).to(device), router

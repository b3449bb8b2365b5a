"""Function-preserving widening: experts of real size around a small model's real routing.

Hidden units are added to every expert, with random gate and up rows and zero down columns: they are
computed, moved and cost what they cost, and add zero. So a model that trains in minutes can be measured
with records of several megabytes. Equal up to rounding (a matrix product of another size may add in
another order): compare a widened model with the widened resident one, never with the original.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from melinoe.errors import MelinoeError
from melinoe.files import whole_folder
from melinoe.models.layers import experts_modules
from melinoe.runtime.load import load_resident

_WIDTH_NAMES = ("moe_intermediate_size", "expert_intermediate_size", "intermediate_size")


def widen(source: str | Path, target: Path, record_bytes: int, seed: int = 0) -> int:
    """Writes a widened copy of a checkpoint.

    Args:
        record_bytes: how large one expert should be; the width is the next multiple of 64 above it.

    Returns:
        The new number of hidden units per expert.

    Raises:
        MelinoeError: a family whose experts are not plain gated ones, or experts that are that large already.
    """
    model, tokenizer = load_resident(source)
    modules = experts_modules(model)
    first: Any = modules[0][1]
    if not first.has_gate or first.is_transposed or first.has_bias or not first.is_concatenated:
        raise MelinoeError("widening covers plain gated experts only", got=type(first).__name__)
    hidden, old = first.down_proj.shape[1:]
    width = -(-record_bytes // (3 * hidden * first.down_proj.element_size() * 64)) * 64
    if width <= old:
        raise MelinoeError(
            "the experts are wide enough already", got=f"{old} units", allowed=f"below {width}"
        )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, module in modules:
            _widen_module(module, width, generator)
    config = model.config.get_text_config()
    name = next(name for name in _WIDTH_NAMES if getattr(config, name, None) == old)
    setattr(config, name, width)
    with torch.device("meta"):  # the config must describe what is written
        described = AutoModelForCausalLM.from_config(model.config)
    assert experts_modules(described)[0][1].down_proj.shape == modules[0][1].down_proj.shape
    with whole_folder(target) as new:
        model.save_pretrained(new)
        tokenizer.save_pretrained(new)
    return width


def _widen_module(module: Any, width: int, generator: torch.Generator) -> None:
    num_experts, hidden, old = module.down_proj.shape
    dtype = module.down_proj.dtype
    # the same extra rows in every expert of a layer: drawing them is the slow part, moving them is not
    scale = float(module.gate_up_proj.float().std())
    extra = (torch.randn(2, width - old, hidden, generator=generator) * scale).to(dtype)
    gate_up = torch.empty(num_experts, 2 * width, hidden, dtype=dtype)
    for half in range(2):
        gate_up[:, half * width : half * width + old] = module.gate_up_proj[:, half * old : (half + 1) * old]
        gate_up[:, half * width + old : (half + 1) * width] = extra[half]
    down = torch.zeros(num_experts, hidden, width, dtype=dtype)
    down[:, :, :old] = module.down_proj
    module.gate_up_proj = torch.nn.Parameter(gate_up, requires_grad=False)
    module.down_proj = torch.nn.Parameter(down, requires_grad=False)

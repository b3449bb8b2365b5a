"""The peer that every transformers user has: accelerate's disk_offload, of the experts alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import accelerate
import torch
from accelerate.hooks import remove_hook_from_module
from accelerate.utils import offload_state_dict
from transformers import AutoModelForCausalLM

from melinoe.models.layers import experts_modules, own_parameters
from melinoe.models.pretrained import skeleton


def write_disk_offload(model: Any, folder: Path) -> int:
    """Writes what disk_offload reads, one folder per experts module; returns the bytes of the largest."""
    largest = 0
    for index, (_, module) in enumerate(experts_modules(model)):
        weights = dict(own_parameters(module))
        offload_state_dict(str(folder / str(index)), {name: weight.data for name, weight in weights.items()})
        largest = max(largest, sum(weight.nbytes for weight in weights.values()))
    return largest


def load_disk_offloaded(source: Path, folder: Path) -> Any:
    """The model with its experts under disk_offload; they are never all in memory, not even while loading."""
    empty = skeleton(source)
    names = [name for name, _ in empty.named_parameters(remove_duplicate=False)]  # tied names as well
    experts = {name for name, _ in experts_modules(empty)}
    places = {name: "meta" if name.rpartition(".")[0] in experts else "cpu" for name in names}
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto", device_map=places)
    remove_hook_from_module(model, recurse=True)
    for index, (_, module) in enumerate(experts_modules(model)):
        accelerate.disk_offload(module, str(folder / str(index)), execution_device=torch.device("cpu"))
    return model.eval()

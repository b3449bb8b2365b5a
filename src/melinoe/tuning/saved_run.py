"""An unfinished run on disk: what is trained, AdamW's moments, and what the losses remember.

One folder, whole or not at all: training.safetensors and Trainer's own trainer_state.json. No pickle. (What a
model's weights lie in is called a checkpoint elsewhere; this one holds a run, and no model comes from it.)
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import TrainerState

from melinoe.files import whole_folder

FOLDER, WEIGHTS, STATE = "checkpoint", "training.safetensors", "trainer_state.json"
MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # AdamW's

Trained = dict[str, nn.Parameter]


def save_run(
    work: Path, trained: Trained, optimizer: torch.optim.Optimizer, state: TrainerState, notes: dict[str, str]
) -> None:
    """Writes WORK/checkpoint; `notes` are strings that come back from `load_weights`."""
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in trained.items():
        tensors[name] = parameter
        moments = optimizer.state.get(parameter, {})
        tensors |= {f"{key}:{name}": value for key, value in moments.items()}
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    with whole_folder(work / FOLDER) as new:
        save_file(tensors, new / WEIGHTS, notes)
        state.save_to_json(str(new / STATE))


@torch.no_grad()
def load_weights(saved: Path, trained: Trained) -> dict[str, str]:
    """Puts the weights back; returns the notes of `save_run`."""
    with safe_open(saved / WEIGHTS, framework="pt") as file:
        for name, parameter in trained.items():
            parameter.copy_(file.get_tensor(name))
        return file.metadata()


@torch.no_grad()
def load_moments(saved: Path, trained: Trained, optimizer: torch.optim.Optimizer) -> None:
    with safe_open(saved / WEIGHTS, framework="pt") as file:
        names = set(file.keys())
        for name, parameter in trained.items():
            for key in MOMENTS:
                if f"{key}:{name}" in names:
                    value = file.get_tensor(f"{key}:{name}")
                    optimizer.state[parameter][key] = value if key == "step" else value.to(parameter.device)


def steps_done(saved: Path) -> int:
    return int(json.loads((saved / STATE).read_text())["global_step"])

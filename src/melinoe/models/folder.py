"""Finds the folder of a model by its name, and the shape by its folder: what every verb does first."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from melinoe.errors import MelinoeError
from melinoe.tiny import model_path

if TYPE_CHECKING:
    from torch import nn


def resolve_model(source: str | Path) -> Path | str:
    """A model folder, or the id of a model on the Hub; `tiny` is the embedded model.

    Raises:
        MelinoeError: neither a model folder nor something that can be an id.
    """
    if str(source) == "tiny":
        return model_path()
    path = Path(source)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise MelinoeError(f"{path} is not a model folder", got="no config.json in it")
        return path
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        return str(source)
    raise MelinoeError(
        "no such model", got=source, allowed="a model folder, a store, a Hub id (organisation/name), or tiny"
    )


def local_folder(source: Path | str, weights: bool = True) -> Path:
    """The folder of a model: itself, or what huggingface_hub has fetched for an id.

    Args:
        weights: fetch weights too; if not, they may be there from an earlier call.
    """
    if isinstance(source, Path):
        return source
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.jinja", "*.txt", "*.model", *(["*.safetensors"] if weights else [])]
    try:
        return Path(snapshot_download(source, allow_patterns=patterns))
    except Exception as error:
        raise MelinoeError(
            "no such model folder, and the Hub has no such model or cannot be reached",
            got=source,
            next_step=f"check the name ({type(error).__name__})",
        ) from error


def skeleton(source: Path | str) -> nn.Module:
    """The model of a checkpoint on the meta device: shapes and names, no weights.

    Raises:
        MelinoeError: a type of model that cannot be offloaded.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from melinoe.models.supported import supported_config

    config = supported_config(source)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=config.dtype or torch.float32)

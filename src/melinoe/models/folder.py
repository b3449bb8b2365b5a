"""From the name of a model to its folder: what every verb does first."""

from __future__ import annotations

import re
from pathlib import Path

from melinoe.errors import MelinoeError
from melinoe.tiny import model_path


def resolve_model(source: str | Path) -> Path | str:
    """A model folder, or the id of a model on the Hub; `tiny` is the embedded model.

    Raises:
        MelinoeError: neither a model folder nor something that can be an id.
    """
    if str(source) == "tiny":
        return model_path()
    path = Path(source)
    if path.is_dir():
        if (path / "config.json").is_file():
            return path
        if (path / "adapter_config.json").is_file():
            raise MelinoeError(
                f"{path} is an adapter, not a model",
                next_step="name the model that it was made for, and this as --adapter",
            )
        raise MelinoeError(
            f"{path} is not a model folder",
            got="no config.json in it" + (", but GGUF" if any(path.glob("*.gguf")) else ""),
            allowed="a folder as transformers' save_pretrained writes it",
        )
    if path.is_file():
        raise MelinoeError(
            f"{path} is a file",
            allowed="a model folder, with config.json and safetensors in it",
            next_step="use the safetensors checkpoint it was made from" if path.suffix == ".gguf" else None,
        )
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

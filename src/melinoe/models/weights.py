"""Which files hold a checkpoint's weights, and in which dtype: transformers' own rules, by its own code.

`from_pretrained` takes model.safetensors before an index, an index wherever its shards stand below the
folder, or what the config names. Reading others than it does would give other answers than it gives. Only
what it reads without unpickling is taken, and nothing outside of the folder.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import Any

from melinoe.errors import MelinoeError

_VARIANT = re.compile(r"model\.(?!safetensors)(.+?)(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


def weight_files(folder: Path, config: Any) -> list[Path]:
    """The safetensors files that `from_pretrained` reads of a folder, in its order.

    Args:
        config: of the model; it may name the file (`transformers_weights`).

    Raises:
        MelinoeError: there are none, they are others than `from_pretrained` reads without being told to, or
            an index names files outside of the folder.
    """
    return _resolved(folder, config)[0]


def settle_dtype(folder: Path, config: Any) -> None:
    """Sets the dtype of a config that has none, as `from_pretrained(dtype="auto")` does: by the weights.

    It stays None where there are no weights here.
    """
    from transformers.modeling_utils import _get_dtype

    if config.dtype is not None or not any(folder.glob("*.safetensors*")):
        return
    files, metadata = _resolved(folder, config)
    _get_dtype("auto", [str(file) for file in files], config, metadata, None, weights_only=True)


def _resolved(folder: Path, config: Any) -> tuple[list[Path], dict[str, Any] | None]:
    """The files, and what an index says beside them."""
    from transformers.distributed.checkpoint import is_sharded_checkpoint
    from transformers.modeling_utils import _get_resolved_checkpoint_files

    if (folder / "adapter_config.json").is_file():
        raise MelinoeError(
            f"{folder} holds a PEFT adapter beside the model",
            got="adapter_config.json, which transformers would apply where peft is installed",
            next_step="merge it first, or move the adapter into a folder of its own",
        )
    if is_sharded_checkpoint(folder):
        raise MelinoeError(
            f"{folder} is a distributed checkpoint",
            got="shard-*-model-*.safetensors",
            next_step="save the model with save_pretrained",
        )
    try:
        files, metadata = _get_resolved_checkpoint_files(
            str(folder),
            variant=None,
            gguf_file=None,
            use_safetensors=True,
            user_agent=None,
            is_remote_code=False,
            transformers_explicit_filename=getattr(config, "transformers_weights", None),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _none_found(folder, error) from None
    assert files is not None
    for name in [*files, *type(config).extra_files]:
        _check_inside(folder, Path(name))
    extra = [folder / name for name in type(config).extra_files if (folder / name).is_file()]
    found = [Path(file) for file in files]
    missing = [file for file in found if not file.is_file()]
    if missing:
        raise MelinoeError(
            "a file of weights is missing",
            got=f"no {missing[0]}, which the index of {folder} names",
            next_step="fetch the checkpoint again",
        )
    return found + [file for file in extra if file not in found], metadata


def _check_inside(folder: Path, file: Path) -> None:
    """Refuses a name that leads out of the folder; links are followed, a Hub cache consists of them."""
    name = PurePosixPath(file.relative_to(folder)) if file.is_relative_to(folder) else PurePosixPath(file)
    if name.is_absolute() or ".." in name.parts:
        raise MelinoeError(
            f"an index in {folder} names a file outside of the folder",
            got=name,
            next_step="do not use this checkpoint unless you know why; put its shards into its folder",
        )


def _none_found(folder: Path, error: Exception) -> MelinoeError:
    """Why there are no weights that we read, by what there is instead."""
    names = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
    indices = [name for name in names if name.endswith(".safetensors.index.json")]
    variants = [name for name in names if _VARIANT.fullmatch(name)]
    shards = [name for name in names if name.endswith(".safetensors")]
    pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth"))]
    gguf = [name for name in names if name.endswith(".gguf")]
    expected = "model.safetensors or model.safetensors.index.json"
    if "model.safetensors.index.json" in indices:
        return MelinoeError(
            f"the index {folder / 'model.safetensors.index.json'} is damaged",
            got=f"{type(error).__name__}: {error}",
            next_step="fetch the checkpoint again",
        )
    if variants:
        return MelinoeError(
            f"{folder} holds a variant of the weights only",
            got=variants[0],
            allowed=expected,
            next_step="from_pretrained(folder, variant=...) and save_pretrained write a plain one",
        )
    if shards:
        return MelinoeError(
            f"{folder} holds safetensors that from_pretrained does not find",
            got=shards[0] + (f" and {len(shards) - 1} others" if len(shards) > 1 else ""),
            allowed=expected,
            next_step="name the file so, or fetch the index of the shards",
        )
    if gguf:
        return MelinoeError(
            f"{folder} holds GGUF weights",
            got=gguf[0],
            allowed=expected,
            next_step="use the safetensors checkpoint it was made from",
        )
    if pickles:
        return MelinoeError(
            f"{folder} holds pickled weights only, which melinoe does not read",
            got=pickles[0],
            allowed=expected,
            next_step="save the model with transformers' save_pretrained, which writes safetensors",
        )
    return MelinoeError(f"{folder} holds no safetensors weights", allowed=expected)

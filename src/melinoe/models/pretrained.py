"""transformers' loading calls, with errors that a user can read: config, skeleton, model, tokenizer.

Wherever the library opens something of a model folder, it opens it here. No code of a checkpoint's own is
run and nothing is unpickled (docs/security.md).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from melinoe.config import STORE_METHOD
from melinoe.errors import MelinoeError
from melinoe.models.weights import settle_dtype, weight_files

if TYPE_CHECKING:
    from torch import nn

_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json",
    "sentencepiece.bpe.model", "vocab.model",
)  # fmt: skip


def read_config(folder: Path | str) -> Any:
    """The config of a model folder.

    Raises:
        MelinoeError: it is broken, or of a type of model that transformers does not know or melinoe does not
            open.
    """
    from transformers import AutoConfig, PreTrainedConfig

    from melinoe.models.supported import check_supported

    with opening("config.json", folder):
        check_supported(PreTrainedConfig.get_config_dict(folder)[0])
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)


def is_marked(config: Any) -> bool:
    """Whether a config is that of a store."""
    mark = getattr(config, "quantization_config", None)
    return isinstance(mark, dict) and mark.get("quant_method") == STORE_METHOD


def skeleton(folder: Path | str) -> nn.Module:
    """The model of a checkpoint on the meta device: shapes, names and dtypes, no weights.

    Raises:
        MelinoeError: as `read_config`, or no language model.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from melinoe.models.shapes_alone import shapes_alone

    config = read_config(folder)

    def build(**more: Any) -> Any:
        with opening("the model", folder), shapes_alone():
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False, **more)

    model = build()
    if model.config.dtype is not None:  # of the part that is a language model, where there are others
        return model
    with opening("the weights", folder):
        settle_dtype(Path(folder), model.config)
    return build(dtype=model.config.dtype or torch.float32)


def load_model(folder: Path, **settings: Any) -> Any:
    """The model of a folder, whole: what is missing would be made up at random, and transformers only warns.

    Args:
        folder: of a checkpoint, or a store (melinoe.runtime.quantizer takes part then).
        settings: of `from_pretrained`.

    Raises:
        MelinoeError: the folder lacks weights of the model, or cannot be opened.
    """
    from transformers import AutoModelForCausalLM

    from melinoe.models.token_ids import refuse_unknown_ids

    config = settings.get("config") or read_config(folder)
    generation = folder / "generation_config.json"
    if generation.is_file():  # transformers passes over a broken one, and samples by its defaults
        with opening("generation_config.json", folder):
            json.loads(generation.read_text(encoding="utf-8"))
    if not is_marked(config):
        weight_files(folder, config)  # refuses what we would not read
    with opening("the model", folder):
        model, found = AutoModelForCausalLM.from_pretrained(
            folder,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are an error below, by name
            use_safetensors=True,
            trust_remote_code=False,
            **settings,
        )
    if found["mismatched_keys"]:
        name, there, expected = sorted(found["mismatched_keys"])[0]
        raise MelinoeError(
            f"the weights in {folder} have other shapes than its config.json says",
            got=f"{name} {list(there)}",
            allowed=list(expected),
            next_step="fetch the checkpoint again",
        )
    missing = sorted(found["missing_keys"])
    if missing:
        raise MelinoeError(
            f"{folder} lacks weights of the model",
            got=f"nothing for {missing[0]}" + (f" and {len(missing) - 1} others" if len(missing) > 1 else ""),
            next_step="fetch the checkpoint again",
        )
    if not is_marked(config):  # a store's pager listens itself
        refuse_unknown_ids(model)
    return model


def read_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder, as it is saved there.

    Raises:
        MelinoeError: there is none, or it is broken.
    """
    from transformers import AutoTokenizer

    if not any((folder / name).is_file() for name in _TOKENIZER_FILES) and not any(folder.glob("*.tiktoken")):
        raise MelinoeError(
            f"there is no tokenizer in {folder}",
            allowed=f"one of {', '.join(_TOKENIZER_FILES[:4])}",
            next_step="copy the tokenizer files of the model that it was made from",
        )
    with opening("the tokenizer", folder):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


@contextmanager
def opening(what: str, folder: Path | str) -> Iterator[None]:
    """Turns whatever a library raises while it opens something of a folder into one plain line."""
    try:
        yield
    except MelinoeError:
        raise
    except Exception as error:
        raise _plain(what, Path(folder), error) from error


def _plain(what: str, folder: Path, error: Exception) -> MelinoeError:
    text = " ".join(str(error).split())
    broken = _broken_json(folder)
    if broken:
        name, reason = broken
        return MelinoeError(f"{folder / name} is not valid JSON", got=reason, next_step="fetch it again")
    if "Unrecognized model in" in text or "model type `None`" in text:
        return MelinoeError(f"{folder / 'config.json'} names no model_type", next_step="fetch it again")
    if "trust_remote_code" in text or "custom code" in text:
        return MelinoeError(
            f"the model in {folder} needs Python code of its own, which melinoe does not run",
            next_step="use a checkpoint whose model_type transformers has",
        )
    if type(error).__name__ == "SafetensorError":
        file = _broken_safetensors(folder)
        return MelinoeError(f"cannot read {file}", got=text, next_step="fetch the checkpoint again")
    if isinstance(error, ImportError):
        return MelinoeError(f"{what} of {folder} needs a package that is missing", got=text[:200])
    return MelinoeError(
        f"cannot open {what} of {folder}",
        got=f"{type(error).__name__}: {text[:300]}",
        next_step="check the file it names, or fetch the checkpoint again",
    )


def _broken_json(folder: Path) -> tuple[str, str] | None:
    """The first JSON file of a model folder that cannot be read, and why."""
    for file in sorted(folder.glob("*.json")) if folder.is_dir() else ():
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            if file.name == "config.json" and not isinstance(found, dict):
                return file.name, f"a {type(found).__name__}, not an object"
        except (ValueError, RecursionError, OSError) as error:
            return file.name, str(error)
    return None


def _broken_safetensors(folder: Path) -> Path:
    """The first safetensors file of a model folder that cannot be opened, or the folder."""
    from safetensors import SafetensorError, safe_open

    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError):
            return file
    return folder

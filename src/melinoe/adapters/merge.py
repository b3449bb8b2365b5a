"""`merge`: folds an adapter into its checkpoint and writes a plain one that every engine can load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from melinoe._version import __version__
from melinoe.adapters.peft_folder import apply_adapter
from melinoe.errors import MelinoeError
from melinoe.experts.low_rank import fold_low_rank
from melinoe.files import whole_folder
from melinoe.models.folder import local_folder, resolve_model
from melinoe.models.layers import fingerprint, moe_layers
from melinoe.models.pretrained import load_model, read_tokenizer
from melinoe.outputs import Output, carded_folder

MERGED_CARD, MERGED_FORMAT = "melinoe-merged.json", "melinoe-merged"
MERGED = carded_folder("a merged checkpoint", MERGED_CARD, MERGED_FORMAT)


def merge(
    model: str | Path, adapter: str | Path, output_dir: str | Path, *, overwrite: bool = False
) -> dict[str, Any]:
    """Writes the tuned checkpoint: transformers' own folder, which nobody needs melinoe to open.

    Summed in float32, then rounded once to the base checkpoint's dtype. Tokenizer, chat template and
    generation config come along; melinoe-merged.json says what was merged into what. The folder appears
    complete or not at all.

    Args:
        model: the checkpoint that was tuned, folder or Hub id.
        adapter: the folder that `tune` wrote.
        output_dir: where the plain checkpoint goes.
        overwrite: replace a merged checkpoint that stands there.

    Returns:
        {"output_dir", "fingerprint", "dtype", "bytes"}.

    Raises:
        MelinoeError: the adapter is of another model, or nothing may be written at `output_dir`
            (melinoe.outputs).
    """
    output = Output(Path(output_dir), MERGED, {"model": model, "adapter": adapter}, overwrite)
    output.check()
    model = resolve_model(model)
    folder = local_folder(model)
    network = load_model(folder, dtype="auto")
    dtypes = {name: tensor.dtype for name, tensor in (*network.named_parameters(), *network.named_buffers())}
    network.float()
    apply_adapter(network, adapter)
    for layer in moe_layers(network):
        if next(layer.experts.parameters(recurse=False), None) is None:
            raise MelinoeError(
                "an offloaded model cannot be merged",
                got=model,
                next_step="merge the checkpoint it was converted from",
            )
        fold_low_rank(layer.experts)
    for name, tensor in (*network.named_parameters(), *network.named_buffers()):
        tensor.data = tensor.data.to(dtypes[name])
    network.set_experts_implementation("eager")  # our function's name means nothing to others
    with whole_folder(output.path, output.check) as new:
        network.save_pretrained(new)
        read_tokenizer(folder).save_pretrained(new)
        _keep_generation_config(folder, new)
        card = {
            "format": MERGED_FORMAT,
            "format_version": 1,
            "base": str(model),
            "adapter": str(adapter),
            "fingerprint": fingerprint(network),
            "melinoe": __version__,
            "files": sorted(file.name for file in new.iterdir()),
        }
        (new / MERGED_CARD).write_text(json.dumps(card, indent=2) + "\n")
    return {
        "output_dir": str(output.path),
        "fingerprint": card["fingerprint"],
        "dtype": str(network.dtype).removeprefix("torch."),
        "bytes": sum(file.stat().st_size for file in output.path.glob("*.safetensors")),
    }


def _keep_generation_config(model: str | Path, folder: Path) -> None:
    """The base's generation config, even where the model class would have written its own defaults."""
    try:
        GenerationConfig.from_pretrained(model).save_pretrained(folder)
    except OSError:  # the base has none
        (folder / "generation_config.json").unlink(missing_ok=True)

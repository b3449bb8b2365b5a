"""`merge`: folds an adapter into its checkpoint and writes a plain one that every engine can load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from melinoe.adapters.peft_folder import apply_adapter
from melinoe.errors import MelinoeError
from melinoe.experts.low_rank import fold_low_rank
from melinoe.files import whole_folder
from melinoe.models.folder import resolve_model
from melinoe.models.layers import fingerprint, moe_layers


def merge(
    model: str | Path, adapter: str | Path, output_dir: str | Path, *, overwrite: bool = False
) -> dict[str, Any]:
    """Writes the tuned checkpoint: transformers' own folder, without a trace of melinoe.

    Summed in float32, then rounded once to the base checkpoint's dtype. Tokenizer, chat template and
    generation config come along. The folder appears complete or not at all.

    Args:
        model: the checkpoint that was tuned, folder or Hub id.
        adapter: the folder that `tune` wrote.
        output_dir: where the plain checkpoint goes.
        overwrite: replace what stands there.

    Returns:
        {"output_dir", "fingerprint", "dtype", "bytes"}.

    Raises:
        MelinoeError: the adapter is of another model, or the output folder holds something else.
    """
    output = Path(output_dir)
    if output.exists() and not (output.is_dir() and not any(output.iterdir())) and not overwrite:
        raise MelinoeError(
            f"{output} exists already", next_step="choose another folder, or overwrite it (--overwrite)"
        )
    model = resolve_model(model)
    network = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    dtypes = {name: parameter.dtype for name, parameter in network.named_parameters()}
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
    for name, parameter in network.named_parameters():
        parameter.data = parameter.data.to(dtypes[name])
    network.set_experts_implementation("eager")  # our function's name means nothing to others
    with whole_folder(output) as new:
        network.save_pretrained(new)
        AutoTokenizer.from_pretrained(model).save_pretrained(new)
        _keep_generation_config(model, new)
    return {
        "output_dir": str(output),
        "fingerprint": fingerprint(network),
        "dtype": str(network.dtype).removeprefix("torch."),
        "bytes": sum(file.stat().st_size for file in output.glob("*.safetensors")),
    }


def _keep_generation_config(model: str | Path, folder: Path) -> None:
    """The base's generation config, even where the model class would have written its own defaults."""
    try:
        GenerationConfig.from_pretrained(model).save_pretrained(folder)
    except OSError:  # the base has none
        (folder / "generation_config.json").unlink(missing_ok=True)

"""What the contestants of the speed table share: widened weights, their stores, prompts and how many."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from melinoe.conversion.convert import convert
from melinoe.data.encoding import encode_prompt
from melinoe.data.rows import Row
from melinoe.demonstration.peers import write_disk_offload
from melinoe.demonstration.widen import widen
from melinoe.errors import MelinoeError
from melinoe.runtime.load import load_resident, load_tokenizer

MAX_PROMPT = 160  # tokens; longer prompts are left out of the speed rows


@dataclass(frozen=True)
class Size:
    """How much each contestant generates; slow ones are capped."""

    prompts: int
    new_tokens: int
    slow_prompts: int
    slow_tokens: int


FULL, SMALL = Size(6, 40, 1, 6), Size(2, 16, 1, 4)


@dataclass(frozen=True)
class Arena:
    """What the contestants share.

    models, stores: {weights: folder}, widened. layer_bytes: of all experts of a layer.
    """

    folder: Path
    models: dict[str, Path]
    stores: dict[str, Path]
    offload_folder: Path
    layer_bytes: int
    prompts: list[list[int]]
    size: Size


def prepare(
    models: dict[str, str], folder: Path, record_bytes: int, rows: list[Row], size: Size, seed: int
) -> Arena:
    """Widens and converts all weights, and writes what accelerate reads.

    Args:
        models: {weights: checkpoint folder}; `base` among them.
        folder: to make, for all that is written.
        record_bytes: of one widened expert.
        rows: whose prompts are generated from, the first that are short enough.
    """
    folder.mkdir(parents=True)
    wide = {name: folder / name for name in models}
    for name, source in models.items():
        widen(source, wide[name], record_bytes, seed)
    stores = {name: folder / f"{name}-store" for name in models}
    for name in models:
        convert(wide[name], stores[name], progress=False)
    model, tokenizer = load_resident(wide["base"])
    layer_bytes = write_disk_offload(model, folder / "accelerate")
    prompts = [encode_prompt(tokenizer, row) for row in rows if row.messages]
    prompts = [prompt for prompt in prompts if len(prompt) <= MAX_PROMPT][: size.prompts]
    if not prompts:
        raise MelinoeError(
            "no prompt is short enough for the speed rows", allowed=f"up to {MAX_PROMPT} tokens"
        )
    assert load_tokenizer(wide["base"]).pad_token_id is not None
    return Arena(folder, wide, stores, folder / "accelerate", layer_bytes, prompts, size)

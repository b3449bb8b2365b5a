"""What a checkpoint says about generating: when to stop, whether to draw, how many beams.

transformers reads it (generation_config.json, or what the model's config says) and `model.generate` follows
it; here is the one place where a verb asks for it, and where what a verb must override is put into words.
`generate` follows the checkpoint; `evaluate` and the speed rows of the demo compare tokens, so they are
greedy.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import GenerationConfig
from transformers.generation.configuration_utils import GenerationMode

from melinoe.errors import MelinoeError
from melinoe.models.pretrained import opening, read_config

_MODES = (
    GenerationMode.GREEDY_SEARCH,
    GenerationMode.SAMPLE,
    GenerationMode.BEAM_SEARCH,
    GenerationMode.BEAM_SAMPLE,
    GenerationMode.ASSISTED_GENERATION,
)
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p")


def folder_settings(folder: str | Path) -> GenerationConfig:
    """The generation settings of a checkpoint folder, as `from_pretrained` would give them to its model."""
    if (Path(folder) / "generation_config.json").is_file():
        with opening("generation_config.json", folder):
            return GenerationConfig.from_pretrained(folder)
    return GenerationConfig.from_model_config(read_config(folder))


def end_tokens(settings: GenerationConfig, tokenizer: Any) -> list[int]:
    """The tokens that end a generation; the tokenizer's own where the checkpoint names none."""
    named = settings.eos_token_id
    if named is None:
        named = tokenizer.eos_token_id
    return (
        []
        if named is None
        else [int(one) for one in named]
        if isinstance(named, Collection)
        else [int(named)]
    )


def context_length(model: Any) -> int | None:
    """How many tokens a model can see; None where its config sets no limit."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


@dataclass(frozen=True)
class Request:
    """What `model.generate` is called with.

    arguments: of generate, besides the tokens.
    beams: more than one: transformers gives no token before the last.
    overridden: sentences for people: what the checkpoint asks for and this verb does otherwise.
    """

    arguments: dict[str, Any]
    beams: int
    overridden: tuple[str, ...]


def request(
    model: Any,
    tokenizer: Any,
    max_new_tokens: int,
    *,
    temperature: float | None = None,
    exactly: bool = False,
    why_greedy: str = "",
) -> Request:
    """The checkpoint's settings with what a verb was told.

    Args:
        model: whose generation_config holds.
        temperature: 0 is greedy, above 0 draws; None: as the checkpoint has it.
        exactly: go on for exactly max_new_tokens, whatever ends a generation: one answer, one beam.
        why_greedy: why temperature is 0, where nobody asked for it.

    Raises:
        MelinoeError: a way to decode that transformers itself no longer has.
    """
    settings, overridden = model.generation_config, []
    mode = settings.get_generation_mode()
    if mode not in _MODES:
        raise MelinoeError(
            "the checkpoint's generation settings cannot be followed",
            got=f"{mode.value.replace('_', ' ')} (generation_config.json)",
            allowed=", ".join(known.value.replace("_", " ") for known in _MODES),
        )
    temperature = 0.0 if exactly and temperature is None else temperature
    ends = end_tokens(settings, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else settings.pad_token_id
    arguments: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "eos_token_id": ends or None,
        "pad_token_id": pad if pad is not None else ends[0] if ends else 0,
        "return_dict_in_generate": False,
    }
    beams = settings.num_beams or 1
    if temperature is not None:
        arguments["do_sample"] = temperature > 0
        if temperature > 0:
            arguments["temperature"] = temperature
        elif settings.do_sample and why_greedy:
            drawn = (f"{name} {getattr(settings, name)}" for name in _SAMPLING if getattr(settings, name))
            overridden.append(f"greedy ({why_greedy}), where the checkpoint draws ({', '.join(drawn)})")
    if (settings.num_return_sequences or 1) > 1:
        arguments["num_return_sequences"] = 1
        overridden.append(f"one answer, where the checkpoint asks for {settings.num_return_sequences}")
    if exactly:
        arguments |= {"min_new_tokens": max_new_tokens, "stop_strings": None, "num_beams": 1}
        beams = 1
    elif settings.stop_strings:
        arguments["tokenizer"] = tokenizer  # which finds them in the tokens
    return Request(arguments, beams, tuple(overridden))

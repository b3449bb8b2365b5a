"""What a checkpoint says about generating: when to stop, whether to draw, how many beams.

transformers reads it (generation_config.json, or what the model's config says) and `model.generate` follows
it; here is the one place where a verb asks for it, and where what a verb must override is put into words.
`generate`, `chat` and `serve` follow the checkpoint where nothing else is asked for; `evaluate` and the speed
rows of the demo compare tokens, so they are greedy.
"""

from __future__ import annotations

import copy
import math
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
MAX_TEMPERATURE, MIN_PENALTY = 100.0, 0.01
LEAST_DRAWN = 1e-5  # a lower temperature is 0: logits divided by it would leave float32
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


def stop_strings(settings: GenerationConfig) -> list[str]:
    """The texts that end a generation; transformers takes one as well as a list of them."""
    named = settings.stop_strings or []
    return [named] if isinstance(named, str) else list(named)


def context_length(model: Any) -> int | None:
    """How many tokens a model can see; None where its config sets no limit."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


@dataclass(frozen=True)
class Sampling:
    """How a request wants its tokens chosen; names and meanings are those of GenerationConfig.

    None: as the checkpoint has it. temperature 0 is greedy, from 1e-5 on it draws. top_p, top_k or min_p draw
    as well, because nobody narrows down what is not drawn; top_k 0 is all tokens.

    Raises:
        MelinoeError: a value that transformers cannot follow.
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None

    def __post_init__(self) -> None:
        for name, least, most in (
            ("temperature", 0.0, MAX_TEMPERATURE),
            ("top_p", 0.0, 1.0),
            ("top_k", 0, math.inf),
            ("min_p", 0.0, 1.0),
            ("repetition_penalty", MIN_PENALTY, math.inf),
        ):
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                bound = f"{least:g} or more" if most == math.inf else f"{least:g} to {most:g}"
                raise MelinoeError(f"{name} is out of range", got=value, allowed=bound)

    def changes(self) -> dict[str, Any]:
        """The fields of GenerationConfig that it sets."""
        changed = {name: value for name, value in vars(self).items() if value is not None}
        if self.temperature is not None:
            changed["do_sample"] = self.temperature >= LEAST_DRAWN
            if not changed["do_sample"]:
                del changed["temperature"]
        elif changed.keys() & {"top_p", "top_k", "min_p"}:
            changed["do_sample"] = True
        return changed


AS_THE_CHECKPOINT = Sampling()


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
    sampling: Sampling = AS_THE_CHECKPOINT,
    exactly: bool = False,
    why_greedy: str = "",
) -> Request:
    """The checkpoint's settings with what a verb was told.

    Args:
        model: whose generation_config holds.
        sampling: what the verb was told.
        exactly: go on for exactly max_new_tokens, whatever ends a generation: one answer, one beam.
        why_greedy: why the temperature is 0, where nobody asked for it.

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
    changes = sampling.changes()
    if exactly and "do_sample" not in changes:
        changes["do_sample"] = False
    ends = end_tokens(settings, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else settings.pad_token_id
    arguments: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "eos_token_id": ends or None,
        "pad_token_id": pad if pad is not None else ends[0] if ends else 0,
        "return_dict_in_generate": False,
    }
    beams = settings.num_beams or 1
    if settings.do_sample and changes.get("do_sample") is False and why_greedy:
        drawn = (f"{name} {getattr(settings, name)}" for name in _SAMPLING if getattr(settings, name))
        overridden.append(f"greedy ({why_greedy}), where the checkpoint draws ({', '.join(drawn)})")
    arguments |= changes
    if (settings.num_return_sequences or 1) > 1:
        arguments["num_return_sequences"] = 1
        overridden.append(f"one answer, where the checkpoint asks for {settings.num_return_sequences}")
    if exactly:
        arguments |= {"min_new_tokens": max_new_tokens, "stop_strings": None, "num_beams": 1}
        beams = 1
    elif settings.stop_strings:
        arguments["tokenizer"] = tokenizer  # which finds them in the tokens
    return Request(arguments, beams, tuple(overridden))


def of_one_answer(model: Any, tokenizer: Any, max_new_tokens: int, sampling: Sampling) -> GenerationConfig:
    """What `model.generate` would follow, as an object: one answer, one token at a time.

    For whoever chooses tokens himself (`melinoe.serving`): several beams, guessed tokens and stop strings,
    which need more than the last logits, are left out; stop strings are looked for in the text.

    Raises:
        MelinoeError: as `request`.
    """
    arguments = request(model, tokenizer, max_new_tokens, sampling=sampling).arguments
    arguments.pop("tokenizer", None)
    config: GenerationConfig = model._prepare_generation_config(None, **copy.deepcopy(arguments))[0]
    config.num_beams = 1
    config.prompt_lookup_num_tokens = config.stop_strings = None
    return config

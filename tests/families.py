"""Tiny random checkpoints of every family that is tested, as from_pretrained finds them on disk."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    ContinuousBatchingConfig,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

import melinoe
from family_configs import config
from melinoe.experts.forward import use_melinoe_experts
from melinoe.routing.policies import DecayedCounts
from melinoe.runtime.load import align

# the families that every kind of test goes through; test_families.py has all there are
FAMILIES = (
    "mixtral", "olmoe", "phimoe", "qwen2_moe", "qwen3_moe", "qwen3_next", "deepseek_v2", "deepseek_v3",
    "gpt_oss", "granitemoe", "glm4_moe", "ernie4_5_moe", "minimax_m2", "lfm2_moe", "jamba", "dots1",
    "hunyuan_v1_moe", "flex_olmo", "afmoe", "nemotron_h", "gemma4_text", "llama4_text", "dbrx",
)  # fmt: skip
# how routers score, where it is not by softmax (phimoe's sparsemixer is a softmax over what its mask leaves)
SCORE_KINDS = dict.fromkeys(("gemma4", "gemma4_text"), "probability") | {"deepseek_v4": "sqrtsoftplus"}
SCORE_KINDS |= dict.fromkeys(
    (
        "afmoe", "axk1", "axk2", "bailing_hybrid", "beam", "deepseek_v3", "deepseek_v32", "dots1",
        "dots3_note", "dots3_note_text", "exaone_moe", "flint", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa",
        "hy_v3", "hy_v4", "inkling2_text", "inkling_text", "kimi_linear", "kolibri1", "laguna", "lfm2_moe",
        "llama4", "llama4_text", "mimo_v2_flash", "minimax_m2", "minimax_m3_vl_text", "nemotron_h",
        "solar_open",
    ),
    "sigmoid",
)  # fmt: skip
UNDECORATED = ("llama4", "llama4_text", "dbrx")  # transformers knows one way to compute their experts


class RandomPolicy(DecayedCounts):
    """Keeps whatever chance says: a policy must not be able to change a result."""

    name = "random"

    def __init__(self, *args):
        self.generator = np.random.default_rng(1)
        super().__init__(*args)

    def worth(self, layer):
        return self.generator.random(self.num_experts).tolist()


def save_tokenizer(folder: Path, family: str = "") -> None:
    """A tokenizer of 64 entries: words, or bytes where transformers insists on its own way to cut words."""
    special = {"<pad>": 0, "<eos>": 1, "<unk>": 2}
    if family.startswith(("qwen3_5", "qwen4")):
        letters = {letter: i + 3 for i, letter in enumerate("\u0120w0123456789")}
        tokenizer = Tokenizer(models.BPE(special | letters, [], unk_token="<unk>"))
    else:
        words = {f"w{i}": i + 3 for i in range(50)}
        tokenizer = Tokenizer(models.WordLevel(special | words, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
    ).save_pretrained(folder)


def save_checkpoint(folder: Path, family: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Path:
    """Writes config, weights and tokenizer; returns the folder.

    Types with a text part are written whole, with what makes tokens of pictures and sounds, as on the Hub.
    """
    torch.manual_seed(seed)
    theirs = config(family)
    whole = theirs.get_text_config() is not theirs
    model = (AutoModelForImageTextToText if whole else AutoModelForCausalLM).from_config(theirs, dtype=dtype)
    for name, parameter in model.named_parameters():  # correction biases and the like start at zero or empty
        if parameter.is_floating_point() and "norm" not in name and parameter.numel() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    for name, buffer in model.named_buffers():
        if "correction" in name or "expert_bias" in name:
            buffer.normal_(std=0.05)
        elif name.endswith("tid2eid"):  # deepseek_v4: the experts of every token of the vocabulary
            buffer.copy_(torch.rand(len(buffer), 8).argsort(1)[:, : buffer.shape[1]])
    model.save_pretrained(folder)
    save_tokenizer(folder, family)
    return folder


def batch(length: int = 9, seed: int = 0) -> dict[str, torch.Tensor]:
    """Two prompts of different length, padded on the left."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 50, (2, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, : length // 3] = 0
    ids[1, : length // 3] = 0
    return {"input_ids": ids, "attention_mask": mask}


# {way to generate: settings of model.generate}; "assisted" and "generate_batch" are more than settings
WAYS: dict[str, dict[str, Any]] = {
    "dynamic cache": {},
    "one prompt": {},
    "static cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
    "beams": {"num_beams": 3},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "assisted": {},
    "chunked prefill": {"prefill_chunk_size": 4},
    "generate_batch": {},
}
_ALONE = ("one prompt", "prompt lookup", "assisted")  # transformers guesses for one sequence at a time
NEW_TOKENS = 8


def generate(model: Any, way: str, assistant: Any = None) -> list[list[int]]:
    """Greedy token ids, prompt left out, by one of WAYS.

    There are two prompts of different length where it takes two.
    """
    inputs = {name: value.to(model.device) for name, value in batch().items()}
    if way == "generate_batch":
        prompts = [
            row[mask.bool()].tolist()
            for row, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
        ]
        settings = GenerationConfig(
            max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=63, pad_token_id=0
        )
        pages = ContinuousBatchingConfig(
            page_size=16, num_blocks=16, max_batch_tokens=64, use_cuda_graph=False
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            results = model.generate_batch(
                prompts, generation_config=settings, continuous_batching_config=pages
            )
        tokens = [results[key].generated_tokens for key in sorted(results)]
        errors = [results[key].error for key in sorted(results) if results[key].error]
        if errors or len(tokens) != len(prompts):
            raise NotImplementedError(errors[0] if errors else "no result")
        return tokens
    if way in _ALONE:
        inputs = {name: value[:1] for name, value in inputs.items()}
    more = {"assistant_model": assistant} if way == "assisted" else WAYS[way]
    length = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
    with torch.no_grad():
        tokens = model.generate(**inputs, **length, do_sample=False, **more)
    return tokens[:, inputs["input_ids"].shape[1] :].tolist()


def enough_for(source: Any, slots: int, **settings: Any) -> int:
    """The smallest budget that gives so many slots per layer."""
    plan = melinoe.plan(source, slots=slots, measure_seconds=0, **settings)
    return int(plan["budget"]["total_bytes"])


def resident(source: Path, use_own: bool = True) -> Any:
    """The checkpoint with every expert in memory; `use_own`: on our experts function, to compare bits."""
    model = AutoModelForCausalLM.from_pretrained(source).eval()
    if use_own:
        use_melinoe_experts(model)
        # as melinoe.load leaves them: torch and MKL round by alignment and by requires_grad
        model.requires_grad_(False)
        align(model)
    return model

"""A tiny random OLMoE with a tokenizer of characters, for the tests that need text in and experts out."""

import functools
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import OlmoeConfig, OlmoeForCausalLM, PreTrainedTokenizerFast

from melinoe.data.rows import Row

CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789 .?=+#-"
SPECIAL = ["<pad>", "<sep>", "<eos>"]


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *CHARACTERS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    inner.decoder = decoders.Fuse()
    result = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        eos_token="<eos>",
        additional_special_tokens=["<sep>"],
        padding_side="left",
    )
    result.chat_template = (
        "{% for m in messages %}{{ m['content'] }}"
        "{% if m['role'] == 'assistant' %}<eos>{% else %}<sep>{% endif %}{% endfor %}"
    )
    return result


@functools.cache
def model_and_tokenizer(seed: int = 0) -> tuple[OlmoeForCausalLM, PreTrainedTokenizerFast]:
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    config = OlmoeConfig(
        vocab_size=len(SPECIAL) + len(CHARACTERS),
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=2,
    )
    model = OlmoeForCausalLM(config).eval()
    with torch.no_grad():  # routers and embeddings that tell tokens apart
        for name, parameter in model.named_parameters():
            if "embed" in name or "mlp.gate." in name:
                parameter.normal_(0, 1, generator=torch.Generator().manual_seed(seed))
    return model, tokenizer()


def rows(number: int = 12) -> list[Row]:
    """Prompts of different lengths, half of them sums and half of them echoes."""
    result = []
    for index in range(number):
        if index % 2:
            result.append(Row(({"role": "user", "content": f"{index}+{index}=?"},), f"{2 * index}", "sum"))
        else:
            text = CHARACTERS[index % 7 : index % 7 + 3 + index % 5]
            result.append(Row(({"role": "user", "content": f"say {text}"},), text, "echo"))
    return result


def save(folder: Path, seed: int = 0) -> Path:
    """The model as a checkpoint folder."""
    model, words = model_and_tokenizer(seed)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder

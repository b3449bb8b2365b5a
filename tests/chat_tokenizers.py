"""Tokenizers with everything that a checkpoint's brings, made here.

Of every kind, with and without BOS, EOS and a chat template in the layouts of well-known families.
"""

from __future__ import annotations

import functools
import json
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

TEXT = "what is 2+2= 4? say yo to the world, you 12 + 30. hello system be brief yes no " * 3
BOS, EOS = "<s>", "</s>"
CONTROL = (
    "<|system|> <|user|> <|assistant|> <|end|> <|endoftext|> <|im_start|> <|im_end|> <start_of_turn>"
    " <end_of_turn> <|start_header_id|> <|end_header_id|> <|eot_id|> <think> </think> [INST] [/INST]"
).split()
ADDED = [BOS, EOS, "<pad>", *CONTROL]

# as the families write them; `{% generation %}` stands around what the assistant says, or does not
PHI = """{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>
{% generation %}{{ m.content }}<|end|>{% endgeneration %}
{% else %}<|{{ m.role }}|>
{{ m.content }}<|end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>
{% else %}<|endoftext|>{% endif %}"""
CHATML = """{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}\
{{ m.content }}<|im_end|>{% endif %}
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
GEMMA = """<s>{% for m in messages %}{% if m.role == 'system' %}\
{{ raise_exception('System role not supported') }}{% endif %}<start_of_turn>\
{% if m.role == 'assistant' %}model
{% generation %}{{ m.content | trim }}<end_of_turn>{% endgeneration %}{% else %}{{ m.role }}
{{ m.content | trim }}<end_of_turn>{% endif %}
{% endfor %}{% if add_generation_prompt %}<start_of_turn>model
{% endif %}"""
LLAMA = """<s>{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>

{% if m.role == 'assistant' %}{% generation %}{{ m.content | trim }}<|eot_id|>{% endgeneration %}{% else %}\
{{ m.content | trim }}<|eot_id|>{% endif %}{% endfor %}{% if add_generation_prompt %}\
<|start_header_id|>assistant<|end_header_id|>

{% endif %}"""
MISTRAL = """<s>{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}</s>\
{% endgeneration %}{% else %}[INST]{{ m.content }}[/INST]{% endif %}{% endfor %}"""
MARKED = {"phi": PHI, "chatml": CHATML, "gemma": GEMMA, "llama": LLAMA, "mistral": MISTRAL}
ENDS = {
    "phi": "<|end|>",
    "chatml": "<|im_end|>",
    "gemma": "<end_of_turn>",
    "llama": "<|eot_id|>",
    "mistral": "</s>",
}


def unmarked(template: str) -> str:
    """The same template without the marks: other blocks in their place, for a block eats the line end behind
    it."""
    return template.replace("{% generation %}", "{% if true %}").replace("{% endgeneration %}", "{% endif %}")


def _byte_level() -> Tokenizer:
    """As GPT-2's and most of today's."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(
        [TEXT], trainers.BpeTrainer(vocab_size=340, initial_alphabet=alphabet, show_progress=False)
    )
    return inner


def _sentencepiece(in_normalizer: bool) -> Tokenizer:
    """As Mixtral's and Gemma's: merges of letters, bytes for unknown ones, a mark for a space."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=120, show_progress=False))
    found = json.loads(inner.to_str())["model"]
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *found["vocab"]]
    merges = [tuple(merge) for merge in found["merges"]]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys([*pieces, "▁", "\n"]))}
    inner = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    fallback = [decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    if in_normalizer:  # the older form of it
        inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), *fallback])
    return inner


class InPython(PreTrainedTokenizer):
    """A tokenizer without a Rust backend: a mark for a space, two letters or one to a token, and bytes."""

    def __init__(self, **settings: Any) -> None:
        letters = "abcdefghijklmnopqrstuvwxyz0123456789▁.,?!=+\n"
        pairs = ["▁y", "yo", "=4", "he", "ll", "in"]
        pieces = ["<unk>", *letters, *pairs, *(f"<0x{byte:02X}>" for byte in range(256))]
        self.numbers = {piece: number for number, piece in enumerate(pieces)}
        self.pieces = pieces
        self.edges = settings.pop("edges", (False, False))
        super().__init__(unk_token="<unk>", **settings)

    @property
    def vocab_size(self) -> int:
        return len(self.pieces)

    def get_vocab(self) -> dict[str, int]:
        return {**self.numbers, **self.added_tokens_encoder}

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        text, found = "▁" + text.replace(" ", "▁"), []
        while text:
            size = 2 if text[:2] in self.numbers else 1
            piece, text = text[:size], text[size:]
            found += [piece] if piece in self.numbers else [f"<0x{byte:02X}>" for byte in piece.encode()]
        return found

    def _convert_token_to_id(self, token: str) -> int:
        return self.numbers.get(token, 0)

    def _convert_id_to_token(self, index: int) -> str:
        return self.pieces[index]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        raw = bytearray()
        for token in tokens:
            raw += bytes([int(token[3:5], 16)]) if token.startswith("<0x") else token.encode()
        return raw.decode("utf-8", errors="replace").replace("▁", " ").removeprefix(" ")

    def build_inputs_with_special_tokens(self, one: list[int], two: list[int] | None = None) -> list[int]:
        before = [self.bos_token_id] if self.edges[0] else []
        return [*before, *one, *([self.eos_token_id] if self.edges[1] else [])]


KINDS = ("byte level", "sentencepiece", "older sentencepiece", "in Python")


@functools.cache
def tokenizer(
    kind: str = "byte level", bos: bool = False, eos: bool = False, template: str | None = None
) -> Any:
    """A tokenizer of a kind.

    Args:
        bos, eos: whether it puts BOS before a text, and EOS behind.
        template: the chat template's text.
    """
    special = {"bos_token": BOS, "eos_token": EOS, "pad_token": "<pad>"}
    if kind == "in Python":
        result: Any = InPython(edges=(bos, eos), **special)
    else:
        inner = _byte_level() if kind == "byte level" else _sentencepiece(kind.startswith("older"))
        inner.add_special_tokens(ADDED)
        edges = [(name, inner.token_to_id(name)) for name in (BOS, EOS)]
        single = f"{BOS} $A" if bos else "$A"
        inner.post_processor = processors.TemplateProcessing(
            single=f"{single} {EOS}" if eos else single, special_tokens=edges
        )
        result = PreTrainedTokenizerFast(tokenizer_object=inner, **special)
    result.add_special_tokens({"additional_special_tokens": CONTROL})
    result.chat_template = template
    return result


def end_token(of: Any, layout: str) -> int:
    """What ends an answer in a layout."""
    return of.convert_tokens_to_ids(ENDS[layout])

"""Small tokenizers of every kind that decodes in its own way, made here."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

WORDS = ("▁", "▁the", "▁a", "b", "é", "▁x", "lo", "▁hel", "你", "▁你好", ".", ",", "'s", "▁.")
TEXT = "hello world 你好 déjà vu . , 's n't"
PIECES = "[UNK] [SEP] do not ##t n ' t ##ing play . , s ##s m re".split()


def byte_fallback(metaspace: bool = False) -> Any:
    """As Mixtral's: pieces of words, and bytes for what is none."""
    special = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0)]
    pieces = [(f"<0x{byte:02X}>", -10.0) for byte in range(256)]
    words = [(word, -float(i)) for i, word in enumerate(WORDS)]
    inner = Tokenizer(models.Unigram([*special, *pieces, *words], unk_id=0, byte_fallback=True))
    spaces = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    inner.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace()] if metaspace else spaces
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")


def byte_level() -> Any:
    """As GPT-2's and most of today's."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=["<|end|>"])
    inner.train_from_iterator([TEXT] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|end|>")


def word_pieces(cleanup: str = "") -> Any:
    """As BERT's. cleanup: who takes spaces back before punctuation, the decoder or transformers."""
    inner = Tokenizer(models.WordPiece({word: i for i, word in enumerate(PIECES)}, unk_token="[UNK]"))
    inner.decoder = decoders.WordPiece(cleanup=cleanup == "decoder")
    result = PreTrainedTokenizerFast(tokenizer_object=inner, sep_token="[SEP]")
    result.clean_up_tokenization_spaces = cleanup == "transformers"
    return result


KINDS = {
    "byte fallback": byte_fallback,
    "metaspace": lambda: byte_fallback(metaspace=True),
    "byte level": byte_level,
    "word pieces": word_pieces,
    "word pieces, cleaned": lambda: word_pieces("decoder"),
    "cleaned by transformers": lambda: word_pieces("transformers"),
    "in Python": ByT5Tokenizer,
}

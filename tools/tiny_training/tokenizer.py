"""The embedded model's tokenizer: byte-level BPE trained on the workload's own text.

Digits and capital letters are one token each (sums, numerals and codes are done symbol by symbol);
everything else merges into whole words. Byte-level, so any text survives a round trip. Special
tokens and chat template: `<pad>`=0, `<sep>`=1, `<eos>`=2 and `prompt<sep>completion<eos>`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from melinoe.tiny.workload import STEPWISE, rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

VOCABULARY = 1024  # upper bound
TRAINING_ROWS = 8000
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}<eos>{% else %}<sep>{% endif %}{% endfor %}"
)


def build_tokenizer(seed: int = 0) -> PreTrainedTokenizerFast:
    """Train the tokenizer on rows of the train split; the same seed gives the same vocabulary."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.Split(Regex("[A-Z]"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        min_frequency=20,
        special_tokens=["<pad>", "<sep>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # mental arithmetic is digits, which are tokens of their own: it has nothing to teach here
    examples = rows("train", TRAINING_ROWS, seed, list(STEPWISE))
    texts = (text for row in examples for text in (row["prompt"], row["completion"]))
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        additional_special_tokens=["<sep>"],
        model_max_length=512,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def save_tokenizer(folder: str | Path, seed: int = 0) -> PreTrainedTokenizerFast:
    """Build and save in the form AutoTokenizer loads; returns the tokenizer."""
    tokenizer = build_tokenizer(seed)
    tokenizer.save_pretrained(str(folder))
    return tokenizer

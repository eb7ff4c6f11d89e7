"""A tokenizer of one's own for a model without weights, trained on the texts that the model is to be trained on."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import transformers

from attn_plugins.core.options import build

SPECIAL = ("<pad>", "<s>", "</s>")
"""Of padding, beginning and end, with the ids 0, 1 and 2."""


@dataclass(frozen=True, kw_only=True)
class TrainedTokenizer:
    """How a tokenizer is trained."""

    train: Literal["bpe"]
    """bpe: pairs of bytes that come together most often become tokens (Sennrich et al. 2015, arXiv:1508.07909)."""
    vocab_size: int = 4000
    """Tokens, bytes and special ones counted; fewer where the texts have no more pairs that come twice."""

    def __post_init__(self) -> None:
        least = len(SPECIAL) + 256
        if self.vocab_size < least:
            raise ValueError(f"vocab_size={self.vocab_size}; allowed: at least {least}, for bytes and special tokens")


def read_settings(value: Any) -> TrainedTokenizer:
    """Settings as YAML gives them; ValueError where they are wrong."""
    return build(TrainedTokenizer, value, "tokenizer")


def train_tokenizer(settings: TrainedTokenizer, texts: Iterable[str]) -> Any:
    """A fast tokenizer of transformers, the same for the same texts; it puts the end token behind each text."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    made = Tokenizer(models.BPE())
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocab_size,
        min_frequency=2,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(texts, trainer)
    pad, begin, end = SPECIAL
    ends = (end, made.token_to_id(end))
    made.post_processor = processors.TemplateProcessing(
        single=f"$A {end}", pair=f"$A {end} $B {end}", special_tokens=[ends]
    )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token=pad, bos_token=begin, eos_token=end)


def texts_of(rows: Any) -> Iterator[str]:
    """All texts of rows to train on, row by row: whatever is a text in them."""
    for row in rows:
        yield from (value for value in row.values() if isinstance(value, str))

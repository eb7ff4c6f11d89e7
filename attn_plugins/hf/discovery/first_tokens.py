"""Which tokens stand first in every input of an encoder: read off its weights, and of text off its config."""

import re
from collections.abc import Iterable

from torch import nn
from transformers import PreTrainedModel

IN_WEIGHTS = re.compile(r"([a-z_]+\.)*(cls_token|class_embedding|distillation_token|register_tokens)")
"""Parameters of an encoder, outside of its layers, that are put before what it has made of its input."""


def prefix_tokens(around: Iterable[PreTrainedModel]) -> int:
    """How many there are, such as [CLS] and registers.

    Of text it is the one that tokenizers begin with, [CLS] or <s>; none where the config names a token for the end
    and none for the beginning (T5).

    Args:
        around: the models that hold an encoder, innermost first.
    """
    for part in around:
        learned = [p for name, p in part.named_parameters() if IN_WEIGHTS.fullmatch(name)]
        if learned:
            return sum(p.shape[-2] if p.ndim > 1 else 1 for p in learned)
        kinds = list(part.modules())
        if any(isinstance(m, nn.Embedding) and m.num_embeddings == _vocabulary(part) for m in kinds):
            begins, ends = (_names(part, *tokens) for tokens in (("bos", "cls"), ("eos", "sep")))
            return 1 if begins or not ends else 0
        if any(isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) for m in kinds):
            return 0
    return 0


def _vocabulary(part: PreTrainedModel) -> int | None:
    return getattr(part.config, "vocab_size", None)


def _names(part: PreTrainedModel, *tokens: str) -> bool:
    return any(getattr(part.config, f"{token}_token_id", None) is not None for token in tokens)

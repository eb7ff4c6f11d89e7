"""Rows of multi-query associative recall: pairs of keys and values, then the keys again, with gaps between them."""

import torch

from attn_plugins.data.synthetic.rows import Drawn
from attn_plugins.data.text import IGNORED


def recall_pairs(
    number: int, length: int, pairs: int, vocab_size: int, power: float, generator: torch.Generator
) -> Drawn:
    """Rows of ``length`` tokens: ``pairs`` keys, each with its value after it, then each key once more, to be answered.

    A key is in the lower half of the vocabulary, a value in the upper one. Of the places for keys after the pairs, the
    one with so many others before it, i, is taken with a probability that goes with (i + 1) ** (power - 1). After a key
    that asks, and wherever else none stands, is a value that means nothing: no key comes with two of them in the row.

    Returns:
        "input_ids" (R, N); "labels" (R, N), the value after each key that asks, -100 elsewhere; "distance" (R, N), at
        these labels how many tokens before the question the key stood, 0 elsewhere.
    """
    half, told = vocab_size // 2, 2 * pairs
    keys_RP = torch.rand(number, half, generator=generator).topk(pairs, 1).indices
    values_RP = torch.randint(half, vocab_size, (number, pairs), generator=generator)
    weights = torch.arange(1, (length - told) // 2 + 1, dtype=torch.float64) ** (power - 1)
    gaps_RP = torch.multinomial(weights.expand(number, -1), pairs, replacement=False, generator=generator)
    asked_RP = told + 2 * gaps_RP
    ids_RN = torch.randint(half, vocab_size, (number, length), generator=generator)
    ids_RN[:, 0:told:2], ids_RN[:, 1:told:2] = keys_RP, values_RP
    ids_RN.scatter_(1, asked_RP, keys_RP)
    labels_RN = torch.full_like(ids_RN, IGNORED).scatter_(1, asked_RP + 1, values_RP)
    apart_RP = asked_RP - 2 * torch.arange(pairs)
    distance_RN = torch.zeros_like(ids_RN).scatter_(1, asked_RP + 1, apart_RP)
    return {"input_ids": ids_RN, "labels": labels_RN, "distance": distance_RN}

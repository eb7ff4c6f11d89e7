"""Rows in which something is to be said again: what came after a token that stood once, or all tokens but noise."""

import torch

from attn_plugins.data.synthetic.rows import Drawn
from attn_plugins.data.text import IGNORED


def induction_rows(number: int, length: int, vocab_size: int, generator: torch.Generator) -> Drawn:
    """Rows of ``length`` random tokens, in which the last token of the vocabulary stands once, and asks at the end.

    Returns:
        "input_ids" (R, N), the answer last; "labels" (R, N), -100 but there; "distance" (R, N), there how many tokens
        before the question the token stood, 0 elsewhere.
    """
    ids_RN = torch.randint(0, vocab_size - 1, (number, length), generator=generator)
    place_R1 = torch.randint(0, length - 3, (number, 1), generator=generator)
    ids_RN.scatter_(1, place_R1, vocab_size - 1)
    ids_RN[:, -2], ids_RN[:, -1] = vocab_size - 1, ids_RN.gather(1, place_R1 + 1)[:, 0]
    labels_RN, distance_RN = torch.full_like(ids_RN, IGNORED), torch.zeros_like(ids_RN)
    labels_RN[:, -1], distance_RN[:, -1] = ids_RN[:, -1], length - 2 - place_R1[:, 0]
    return {"input_ids": ids_RN, "labels": labels_RN, "distance": distance_RN}


def selective_rows(number: int, length: int, tokens: int, vocab_size: int, generator: torch.Generator) -> Drawn:
    """Rows of ``tokens`` different tokens at random places among noise, then a separator, then the tokens in order.

    The last token of the vocabulary is the noise, the one before it the separator.

    Returns:
        "input_ids" (R, N); "labels" (R, N), the copy, -100 elsewhere; "distance" (R, N), at these labels how many
        tokens before the one that comes next it stood, 0 elsewhere.
    """
    told = length - 1 - tokens
    said_RT = torch.rand(number, vocab_size - 2, generator=generator).topk(tokens, 1).indices
    places_RT = torch.rand(number, told, generator=generator).topk(tokens, 1).indices.sort(1).values
    ids_RN = torch.full((number, length), vocab_size - 1)
    ids_RN.scatter_(1, places_RT, said_RT)
    ids_RN[:, told], ids_RN[:, told + 1 :] = vocab_size - 2, said_RT
    labels_RN, distance_RN = torch.full_like(ids_RN, IGNORED), torch.zeros_like(ids_RN)
    labels_RN[:, told + 1 :] = said_RT
    distance_RN[:, told + 1 :] = told + torch.arange(tokens) - places_RT
    return {"input_ids": ids_RN, "labels": labels_RN, "distance": distance_RN}

"""Texts packed into one row, given beside the mask: by positions that start again, cumulative lengths, or numbers.

transformers puts only positions into masks, and only in models that hand them on, without a cache and without a padding
mask; the other tellings are for flash attention. So that texts never see each other, what tells of them is read once a
forward pass, where a model is given it, and stands in every mask that the model makes until it returns.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import Cache, masking_utils
from transformers.masking_utils import and_masks, packed_sequence_mask_function

from attn_plugins.core.mask import AttentionMask
from attn_plugins.core.tracing import exporting, readable
from attn_plugins.hf.call import Call
from attn_plugins.hf.hooks import remove_hooks
from attn_plugins.hf.under_way import thread

ARGUMENTS = ("position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")
"""Arguments of a model that may tell of packed texts."""

PACKED = "_attn_plugin_packed"
"""Attribute of a cache: whether the tokens in it are packed texts."""

COUNTS_TEXTS = hasattr(masking_utils, "remap_positions_for_packed_sequence")
"""Whether transformers counts a model's own chunks from the beginning of each text, where it knows of texts itself."""

ALONE = "give each text a row of its own"


@dataclass
class Packing:
    """What the arguments of a running forward say of packed texts."""

    model: nn.Module
    given: list[Any]
    """The arguments that it was read from."""
    by: str
    """Names of those that tell of more than one text in a row."""
    texts_BN: torch.Tensor | None
    """Number of the text that each token is of, which grows along a row; None where rows hold one text each."""
    anew: bool
    """Whether the first new token has the first position of a text, though the cache holds others."""
    outer: "Packing | None"
    """That of the model around it."""
    used: bool = False
    """Whether a mask was made from it."""
    exported: bool = field(default_factory=exporting)
    """Whether a graph is being exported: torch calls no hook there after an error, and the packing would outlive it."""


def watch(model: nn.Module) -> None:
    """Read what a model is told of packed texts, whenever it is called."""
    model.register_forward_pre_hook(begin, with_kwargs=True)
    model.register_forward_hook(end, always_call=True)


def unwatch(model: nn.Module) -> None:
    """Undo :func:`watch`."""
    remove_hooks(model, begin, end)


def begin(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A forward pre-hook.

    Raises:
        ValueError: what tells of texts contradicts itself, the mask or the cache; nothing has changed then.
    """
    named = {**dict(zip(_parameters(type(model)), args, strict=False)), **kwargs} if args else kwargs
    cache = next((held for held in named.values() if isinstance(held, Cache)), None)
    if cache is not None and getattr(cache, PACKED, False) and int(cache.get_seq_length()):
        raise ValueError(
            f"the cache holds packed texts, and nothing tells which of them goes on; {ALONE} to continue from a cache"
        )
    embeds = named.get("inputs_embeds")
    text = named.get("input_ids") if embeds is None else embeds
    outer = running()
    given: list[Any] = [
        text,
        cache,
        named.get("attention_mask"),
        named.get("encoder_hidden_states"),
        *map(named.get, ARGUMENTS),
    ]
    if outer is not None and all(mine is theirs for mine, theirs in zip(given, outer.given, strict=True)):
        by, texts_BN, anew = outer.by, outer.texts_BN, outer.anew
    elif text is None or named.get("cache") is not None or all(argument is None for argument in given[4:]):
        by, texts_BN, anew = "", None, False  # of paged caches, lengths tell the pages
    elif torch.compiler.is_compiling() and text.shape[1] == 1:
        by, texts_BN, anew = "", None, False  # no text begins within one token: nothing to compute in each step
    else:
        by, texts_BN, anew = read(*given)
    thread.notes.packing = Packing(model, given, by, texts_BN, anew, outer)


def end(model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """A forward hook, called after an error too."""
    packing = running()
    while packing is not None and packing.model is not model:
        packing = packing.outer
    if packing is not None:
        thread.notes.packing = packing.outer


def running() -> Packing | None:
    """What the innermost model whose forward is running was told."""
    packing: Packing | None = thread.notes.packing
    while packing is not None and packing.exported and not torch.compiler.is_exporting():
        packing = packing.outer
    return packing


def read(
    text: torch.Tensor,
    cache: Cache | None,
    mask: Any,
    encoder_states: Any,
    positions: Any,
    lengths_q: Any,
    lengths_k: Any,
    numbers: Any,
) -> tuple[str, torch.Tensor | None, bool]:
    """(Which arguments tell of texts, number of each token's text (B or 1, N) or None, whether a cached one ends).

    Raises:
        ValueError: as :func:`begin`.
    """
    rows, length = text.shape[:2]
    known = readable(*(held for held in (text, positions, lengths_q, numbers) if isinstance(held, torch.Tensor)))
    seen = 0 if cache is None else cache.get_seq_length()
    seen = int(seen) if known else seen
    prepared = [
        held for held in (mask.values() if isinstance(mask, dict) else [mask]) if isinstance(held, AttentionMask)
    ]
    own = isinstance(mask, torch.Tensor) and mask.ndim > 2  # it says who sees whom, positions tell where tokens are
    padding_BK, first = _padding(prepared[0] if prepared else mask, seen if cache is not None and known else -length)
    real_BN = None if padding_BK is None else padding_BK[:, first:][:, :length]
    positions_BN = None if own else _text_positions(positions, length)

    starts = {
        "position_ids": None if positions_BN is None or length == 1 else fallen(positions_BN, real_BN),
        "cu_seq_lens": _starts_of_lengths(lengths_q, lengths_k, rows, length),
        "seq_idx": _starts_of_numbers(numbers, rows, length),
    }
    starts = {name: found for name, found in starts.items() if found is not None and not (known and not found.any())}
    by = " and ".join(starts)
    anew = False
    if known and seen and positions_BN is not None:
        begun_B = (positions_BN[:, 0] == 0) if real_BN is None else (positions_BN[:, 0] == 0) & real_BN[:, 0]
        anew = bool((begun_B if padding_BK is None else begun_B & padding_BK[:, :first].any(dim=1)).any())
    if not starts or (not known and (isinstance(seen, torch.Tensor) or seen)):
        return by, None, anew
    if encoder_states is not None:
        raise ValueError(f"{by} tells of packed texts to a model with cross-attention; {ALONE}")
    if seen or getattr(cache, "is_compileable", False):
        held = f"that holds {seen} tokens" if seen else "of fixed length"
        raise ValueError(f"{by} tells of packed texts beside a cache {held}; {ALONE}, or use a new cache")
    if own:
        raise ValueError(
            f"{by} tells of packed texts beside a mask {tuple(mask.shape)} that may say otherwise; leave one"
        )
    if prepared or isinstance(mask, dict):
        if any(held.segments_BK is None for held in prepared):
            raise ValueError(f"{by} tells of packed texts beside a mask that was made without them; {ALONE}")
        return by, None, anew
    total = torch.stack(torch.broadcast_tensors(*starts.values())).any(dim=0)
    return by, total.long().cumsum(dim=1), anew


def packed_rule(
    rule: Callable,
    segments_BK: torch.Tensor | None,
    batch: int,
    queries: int,
    keys: int,
    *,
    causal: bool,
    chunked: bool,
) -> tuple[Callable, torch.Tensor] | None:
    """What the running model was told, for a mask that it makes.

    Args:
        rule: mask function of the mask.
        segments_BK: what that says of texts.
        causal: whether it hides what follows.
        chunked: whether it counts from the beginning of a row.

    Returns:
        (rule that keeps texts apart, their numbers (B or 1, K)), or None where the mask's own rule says it all.

    Raises:
        ValueError: these texts cannot be kept apart in this mask.
    """
    packing = running()
    if packing is not None and packing.anew and causal:
        raise ValueError(f"position_ids begin a new text in rows of which the cache holds another; {ALONE}")
    if packing is None or packing.texts_BN is None:
        return None
    texts_BK = packing.texts_BN
    if texts_BK.shape[1] != queries or texts_BK.shape[0] not in (1, batch) or keys != queries:
        raise ValueError(
            f"{packing.by} tells of packed texts in {tuple(texts_BK.shape)} tokens, and a mask is made for {batch} "
            f"rows of {queries} queries and {keys} keys; {ALONE}"
        )
    packing.used = True
    if segments_BK is not None:
        ours, own = _changes(texts_BK), _changes(segments_BK)
        if readable(texts_BK) and not bool((ours & ~own).any()) and (COUNTS_TEXTS or not chunked):
            return None
        texts_BK = (ours | own).long().cumsum(dim=1)
    if chunked:
        raise ValueError(
            f"{packing.by} tells of packed texts to a model whose own attention counts chunks from the beginning of a "
            "row; tell of them by position_ids, with use_cache=False and no attention mask"
        )
    return and_masks(packed_sequence_mask_function(texts_BK), rule), texts_BK


def check(segmented: bool | None) -> None:
    """Refuse to attend where texts were told and the mask does not keep them apart.

    Args:
        segmented: whether it does; None for a tensor, which may have come of a mask that does.
    """
    packing = running()
    if packing is None or packing.texts_BN is None or segmented or (segmented is None and packing.used):
        return
    raise ValueError(
        f"{packing.by} tells {type(packing.model).__name__} of packed texts, and it makes masks without them; {ALONE}"
    )


def mark_cache(call: Call) -> None:
    """Note on the cache that a module was given that it holds packed texts."""
    if (cache := call.find(Cache)) is not None:
        setattr(cache, PACKED, True)


def _parameters(cls: type[nn.Module]) -> list[str]:
    if cls not in _names:
        _names[cls] = list(inspect.signature(inspect.unwrap(cls.forward)).parameters)[1:]
    return _names[cls]


_names: dict[type[nn.Module], list[str]] = {}
"""Dynamo follows a dict, and not functools.cache."""


def _padding(mask: Any, first: int) -> tuple[torch.Tensor | None, int]:
    """(Which keys are real (B, K), None where all are, and the index of the first query among them)."""
    if isinstance(mask, AttentionMask):
        return mask.padding_BK, first - mask.kv_offset
    return (mask.bool(), first) if isinstance(mask, torch.Tensor) and mask.ndim == 2 else (None, first)


def _text_positions(positions: Any, length: int) -> torch.Tensor | None:
    """(B or 1, N), where positions count tokens; those of images' rows and columns tell of no texts."""
    if not isinstance(positions, torch.Tensor) or positions.is_floating_point():
        return None
    if positions.ndim == 3 and positions.shape[0] == 4:
        positions = positions[0]  # Qwen-VL: the text's, then time, row and column
    positions = positions.unsqueeze(0) if positions.ndim == 1 else positions
    return positions if positions.ndim == 2 and positions.shape[1] == length else None


def fallen(positions_BN: torch.Tensor, real_BN: torch.Tensor | None) -> torch.Tensor:
    """True at real tokens whose position is less than that of the real one before, or again the row's least.

    One position for all tokens of a batch is what models give that have no positions (Decision Transformer's GPT-2).
    """
    real_BN = torch.ones_like(positions_BN, dtype=torch.bool) if real_BN is None else real_BN
    positions_BN, real_BN = torch.broadcast_tensors(positions_BN, real_BN)
    index_BN = torch.arange(positions_BN.shape[1], device=positions_BN.device).expand_as(positions_BN)
    last_BN = torch.where(real_BN, index_BN, -1).cummax(dim=1).values
    last_BN = nn.functional.pad(last_BN[:, :-1], (1, 0), value=-1)
    before_BN = positions_BN.gather(1, last_BN.clamp(min=0))
    least_B1 = positions_BN.masked_fill(~real_BN, torch.iinfo(positions_BN.dtype).max).amin(dim=1, keepdim=True)
    differ = (real_BN & (positions_BN != least_B1)).any()
    return differ & real_BN & (last_BN >= 0) & ((positions_BN < before_BN) | (positions_BN == least_B1))


def _starts_of_lengths(queries: Any, keys: Any, rows: int, length: int) -> torch.Tensor | None:
    """True where a text begins, except at the beginning of a row."""
    given = [torch.as_tensor(held) for held in (queries, keys) if held is not None]
    if not given:
        return None
    ends = given[0].long()
    if readable(ends):
        spelled = f"cu_seq_lens={ends.tolist()}"
        if (
            ends.ndim != 1
            or not ends.numel()
            or ends[0] != 0
            or ends[-1] != rows * length
            or bool((ends.diff() < 0).any())
        ):
            raise ValueError(f"{spelled}; allowed: lengths summed up, from 0 to {rows * length} tokens")
    begins_BN = torch.zeros(rows * length + 1, dtype=torch.bool, device=ends.device).index_fill(0, ends, True)
    begins_BN = begins_BN[:-1].view(rows, length)
    if readable(ends) and not bool(begins_BN[:, 0].all()):
        raise ValueError(f"{spelled} has a text across rows of {length} tokens; allowed: texts that end with their row")
    inside_BN = begins_BN & (torch.arange(length, device=ends.device) > 0)
    if readable(ends) and bool(inside_BN.any()) and not torch.equal(given[0], given[-1]):
        raise ValueError(
            f"cu_seq_lens_q={given[0].tolist()}, cu_seq_lens_k={given[1].tolist()}; allowed: the same in both"
        )
    return inside_BN


def _starts_of_numbers(numbers: Any, rows: int, length: int) -> torch.Tensor | None:
    if not isinstance(numbers, torch.Tensor):
        return None
    if numbers.ndim != 2 or numbers.shape[1] != length or numbers.shape[0] not in (1, rows):
        raise ValueError(f"seq_idx is of shape {tuple(numbers.shape)}; allowed: ({rows}, {length})")
    return _changes(numbers)


def _changes(numbers_BN: torch.Tensor) -> torch.Tensor:
    """True where a number differs from the one before it."""
    return numbers_BN != torch.cat([numbers_BN[:, :1], numbers_BN[:, :-1]], dim=1)

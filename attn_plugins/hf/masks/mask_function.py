"""The mask function that transformers calls, and the lazy mask that it returns."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import masking_utils
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from attn_plugins.core.decode_state import State
from attn_plugins.core.mask import AttentionMask
from attn_plugins.core.tracing import readable
from attn_plugins.hf import structures
from attn_plugins.hf.call import innermost
from attn_plugins.hf.masks import packing
from attn_plugins.hf.masks.dense_masks import additive
from attn_plugins.hf.masks.structure import structure_of
from attn_plugins.hf.masks.tensors import stands_for_a_tensor, takes_all
from attn_plugins.hf.parallel.context import WholeRows, whole_rows

UNSKIPPED = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
"""Arguments of mask functions that are not to leave a mask out which says more than they know."""


@stands_for_a_tensor
class LazyMask(AttentionMask):
    """An AttentionMask that also keeps what transformers asked for, so that any other mask can be made from it.

    To code that expects a tensor it is the boolean mask (B, 1, Q, K). Its sizes cost nothing; all else makes it dense,
    once for all layers.
    """

    ndim = 4
    dtype = torch.bool

    def __init__(self, *args: Any, arguments: dict[str, Any], **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.arguments = arguments
        self.fixed_length = isinstance(self.q_offset, torch.Tensor) or (
            self.causal and self.kv_offset + self.kv_length > self.q_offset + self.q_length
        )
        """Whether it is for a cache of fixed length, with room for tokens to come."""
        self.last_queries = False
        """Whether queries are known to be the last of more keys, where nothing follows them (prefix tuning)."""
        self.rows: WholeRows | None = whole_rows()
        """What the rows hold that these queries and keys are a part of, where processes have parts of them."""

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.batch_size, 1, self.q_length, self.kv_length))

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return self.ndim

    def __getitem__(self, index: Any) -> Any:
        self.touch()
        if isinstance(index, tuple) and len(index) == 4 and isinstance(index[2], int):
            # One query's row, as eager attention adds it to scores: Longformer marks global tokens in it by numbers.
            row = torch.full((1, 1, 1), index[2], device=self.device)
            seen = self.visible(row, torch.arange(self.kv_length, device=self.device).view(1, 1, -1))
            dtype = self.arguments.get("dtype", torch.get_default_dtype())
            row = additive(seen.expand(self.batch_size, 1, -1).unsqueeze(1), dtype)
            return row[index[0], index[1], 0, index[3]]
        return self if takes_all(index, self.shape) else self.as_tensor()[index]

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """As a tensor's; lazy still where only the device changes."""
        held = (*args, *kwargs.values())
        if any(isinstance(x, torch.Tensor) or (isinstance(x, torch.dtype) and x != torch.bool) for x in held):
            return self.as_tensor().to(*args, **kwargs)
        device = kwargs.get("device", next((x for x in args if isinstance(x, (torch.device, str, int))), None))
        return super().to(device)

    def touch(self) -> None:
        """To be called before it is used as a tensor."""
        if (call := innermost()) is not None:
            call.give_up_state()

    def as_tensor(self) -> torch.Tensor:
        """The boolean mask that it stands for."""
        self.touch()
        return self.cached("tensor", lambda: self.dense().expand(self.shape))

    def as_additive(self, dtype: torch.dtype) -> torch.Tensor:
        """0 where a key is seen, the least number of ``dtype`` where not: what is added to scores."""
        self.touch()
        return self.cached(("additive", dtype), lambda: additive(self.as_tensor(), dtype))

    def over_all_tokens(self, state: State, seen: int | None) -> "LazyMask":
        """The mask of the queries and of all tokens so far, whatever other layers of the cache hold of them.

        That of one token of a static cache is as long as the cache: no shape and no number changes from token to token.

        Args:
            state: of the attention, which stands for the tokens before the queries.
            seen: how many these are; None in a compiled step, which is for any number of them.

        Raises:
            ValueError: it has seen other tokens than the cache that the mask was made for.
        """
        if seen is not None:
            before = self.q_offset
            if isinstance(before, torch.Tensor):
                before = self.cached("q_offset", lambda: int(self.q_offset))
            if seen != before:
                raise ValueError(
                    f"the cache has seen {before} tokens, and {seen} in the layer of this attention; it is of "
                    "another model, or broken by an error in an earlier call"
                )
        if self.fixed_length and self.q_length == 1:
            return self.cached(("one", state.fixed_length), lambda: self._for_one(state))
        if self.kv_offset or self.fixed_length:
            return self.cached("whole", lambda: self._for_all(state.seen))
        return self

    def _for_one(self, state: State) -> "LazyMask":
        sizes: dict[str, Any] = {"kv_length": state.fixed_length, "kv_offset": 0}
        asked = {**self.arguments, **sizes}
        return self._copy(
            **sizes, padding_BK=asked["attention_mask"], first_B=None, fixed_length=False, arguments=asked
        )

    def _for_all(self, seen: int) -> "LazyMask":
        number, padding_BK = seen + self.q_length, self.arguments["attention_mask"]
        if padding_BK is not None:
            padding_BK = nn.functional.pad(padding_BK, (0, max(0, number - padding_BK.shape[1])))[:, :number]
        sizes: dict[str, Any] = {"kv_length": number, "kv_offset": 0, "q_offset": seen}
        asked = {**self.arguments, **sizes, "attention_mask": padding_BK}
        padding_BK = None if padding_BK is not None and readable(padding_BK) and bool(padding_BK.all()) else padding_BK
        return self._copy(**sizes, padding_BK=padding_BK, first_B=None, fixed_length=False, arguments=asked)

    def written(self) -> "LazyMask":
        """The mask of the keys that a static cache holds so far: none of those after the last query's is written."""

        def build() -> LazyMask:
            q_offset = int(self.q_offset)
            number = min(self.kv_length, q_offset + self.q_length - self.kv_offset)
            padding_BK = None if self.padding_BK is None else self.padding_BK[:, :number]
            sizes: dict[str, Any] = {"kv_length": number, "q_offset": q_offset}
            asked = {**self.arguments, **sizes}
            if asked["attention_mask"] is not None:
                asked["attention_mask"] = asked["attention_mask"][:, : self.kv_offset + number]
            return self._copy(**sizes, padding_BK=padding_BK, fixed_length=False, arguments=asked)

        return self.cached("written", build)

    def hiding_unwritten(self) -> "LazyMask":
        """The mask of all keys of a static cache, in which those that are not written are padding."""
        position = torch.arange(self.kv_length, device=self.device) + self.kv_offset
        written_BK = (position < self.q_offset + self.q_length).unsqueeze(0)
        padding_BK = written_BK if self.padding_BK is None else self.padding_BK & written_BK
        asked = {**self.arguments, "allow_is_causal_skip": False}
        return self._copy(padding_BK=padding_BK, fixed_length=False, arguments=asked)

    def contiguous(self) -> "LazyMask":
        """Itself: generate() says it to the masks that it prepares for static caches."""
        return self

    def native(self, implementation: str) -> Any:
        """The mask that ``implementation`` would have been given for these queries and keys, once for all layers."""
        make = ALL_MASK_ATTENTION_FUNCTIONS[implementation]

        def build() -> Any:
            made = make(**self.arguments)
            if self.structure is not None and (made is None or (isinstance(made, torch.Tensor) and made.ndim == 2)):
                raise ValueError(
                    f"{implementation!r}, which serves the layers that no rule matches, takes no structure=; give them "
                    "an attention too, or load the model with attn_implementation='sdpa'"
                )
            if self.segments_BK is not None and isinstance(made, torch.Tensor) and made.ndim == 2:
                raise ValueError(
                    f"{implementation!r} cannot keep packed texts apart in rows with padding; leave out the padding, "
                    "or load the model with attn_implementation='sdpa'"
                )
            return made.to(self.device) if hasattr(made, "to") else made

        return self.cached(("native", implementation), build)


def lazy_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Callable = masking_utils.causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **others: Any,
) -> LazyMask:
    """Registered as a mask function: keeps the request and computes nothing that is N x N."""
    if isinstance(attention_mask, LazyMask):
        return attention_mask  # prepared before the forward, as generate() does for static caches
    if isinstance(q_offset, torch.Tensor):
        q_offset = q_offset.clone()  # a static layer's own counter, which it moves on in this very forward
        if attention_mask is not None and q_length == 1:
            attention_mask = steady(attention_mask, q_offset, kv_length)
    arguments = {
        "batch_size": batch_size,
        "q_length": q_length,
        "kv_length": kv_length,
        "q_offset": q_offset,
        "kv_offset": kv_offset,
        "mask_function": mask_function,
        "attention_mask": attention_mask,
        "use_vmap": use_vmap,
        "device": device,
        **others,
    }
    causal, plain, segments_BK = structure_of(mask_function)
    chunked = others.get("local_size") is not None and bool(getattr(others.get("config"), "attention_chunk_size", None))
    packed = packing.packed_rule(
        mask_function, segments_BK, batch_size, q_length, kv_length, causal=causal, chunked=chunked
    )
    if packed is not None:
        mask_function, segments_BK = packed
        arguments |= {"mask_function": mask_function, **UNSKIPPED}
    structure = None
    structured = structures.in_mask(mask_function, batch_size, q_length, kv_length, (q_offset, kv_offset), device)
    if structured is not None:
        rule, structure = structured
        arguments |= {"mask_function": rule, **UNSKIPPED}
    padding_BK = first_B = None
    if attention_mask is not None:
        first_B = attention_mask.long().argmax(dim=1) - kv_offset if kv_offset else None
        padding_BK = attention_mask[:, kv_offset : kv_offset + kv_length]
        if (short := kv_length - padding_BK.shape[1]) > 0:
            padding_BK = nn.functional.pad(padding_BK, (0, short))
        if readable(padding_BK) and bool(padding_BK.all()):
            padding_BK = None
    return LazyMask(
        batch_size,
        q_length,
        kv_length,
        causal=causal,
        plain=plain,
        padding_BK=padding_BK,
        segments_BK=segments_BK,
        rule=mask_function,
        vectorised=not use_vmap,
        q_offset=q_offset,
        kv_offset=kv_offset,
        first_B=first_B,
        structure=structure,
        device=device,
        arguments=arguments,
    )


def steady(attention_mask: torch.Tensor, q_offset: torch.Tensor, kv_length: int) -> torch.Tensor | None:
    """A mask of tokens that grows with each of them, in a shape that stays, so that one compiled step serves them all.

    None where all tokens so far are real: what it says, or that it says nothing, is then the same for each.
    """
    number = attention_mask.shape[1]
    if readable(attention_mask):
        to_come = torch.arange(number, device=attention_mask.device) > q_offset.to(attention_mask.device)
        if bool((attention_mask | to_come).all()):
            return None
    room = kv_length if kv_length >= number else 1 << (number - 1).bit_length()  # a sliding layer's, which has no end
    return nn.functional.pad(attention_mask, (0, room - number))

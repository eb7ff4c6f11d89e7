"""What transformers calls: the mask function that returns a lazy mask, and the attention function that uses slots."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import masking_utils
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from attn_plugins.attention import Attention, AttentionConfig
from attn_plugins.hf import packing
from attn_plugins.hf.arguments import refuse_unknown
from attn_plugins.hf.dense_masks import additive, read_dense
from attn_plugins.hf.grids import grid_of
from attn_plugins.hf.heads import fitted
from attn_plugins.hf.interface import USUAL, call_of
from attn_plugins.hf.mask_rules import read_rule
from attn_plugins.hf.recording import weights_wanted
from attn_plugins.hf.tensors import stands_for_a_tensor, takes_all
from attn_plugins.mask import AttentionMask
from attn_plugins.ops.rotary import Rotary
from attn_plugins.state import State
from attn_plugins.tracing import readable

IMPLEMENTATION = AttentionConfig._attn_implementation
"""The name under which both functions are registered, and which config.json carries."""

SLOT = "attn_plugin"
"""Attribute of an attention module that holds its Attention."""

BASE = "_attn_plugin_base"
"""Attribute of an attention module: the implementation that serves it where it has no slot."""

ROLE = "_attn_plugin_role"
"""Attribute of an attention module: encoder, decoder or cross."""


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
        self.state: State | None = None
        """What the module that it was sent to has kept, where it attends from a state."""
        self.spent = False
        """Whether the module has attended from it: the state has taken the new tokens in."""
        self.rotary: Rotary | None = None
        """What that module turns its queries by, where its attention wants to know."""
        self.fixed_length = isinstance(self.q_offset, torch.Tensor) or (
            self.causal and self.kv_offset + self.kv_length > self.q_offset + self.q_length
        )
        """Whether it is for a cache of fixed length, with room for tokens to come."""
        self.last_queries = False
        """Whether queries are known to be the last of more keys, where nothing follows them (prefix tuning)."""
        self.release: Callable[[], None] | None = None
        """Gives the state up for an ordinary cache: a dense mask would be read beside the keys of all tokens."""

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.batch_size, 1, self.q_length, self.kv_length))

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return self.ndim

    def __getitem__(self, index: Any) -> Any:
        self.touch()
        return self if takes_all(index, self.shape) else self.as_tensor()[index]

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """As a tensor's; lazy still where only the device changes."""
        held = (*args, *kwargs.values())
        if any(isinstance(x, torch.Tensor) or (isinstance(x, torch.dtype) and x != torch.bool) for x in held):
            return self.as_tensor().to(*args, **kwargs)
        device = kwargs.get("device", next((x for x in args if isinstance(x, (torch.device, str, int))), None))
        return super().to(device)

    def touch(self) -> None:
        """To be said before it is used as a tensor."""
        if self.release is not None:
            self.release()
            self.state = self.release = None

    def as_tensor(self) -> torch.Tensor:
        """The boolean mask that it stands for."""
        self.touch()
        return self.once("tensor", lambda: self.dense().expand(self.shape))

    def as_additive(self, dtype: torch.dtype) -> torch.Tensor:
        """0 where a key is seen, the least number of ``dtype`` where not: what is added to scores."""
        self.touch()
        return self.once(("additive", dtype), lambda: additive(self.as_tensor(), dtype))

    def with_state(self, state: State) -> "LazyMask":
        """For the module whose state this is: the mask of its queries and of all tokens so far, whatever is cached.

        Layers of one model share what is computed from it. That of one token of a static cache is as long as the cache:
        no shape and no number changes from token to token.
        """
        one = self.fixed_length and self.q_length == 1
        if not torch.compiler.is_compiling():
            seen, before = state.seen, self.once("q_offset", lambda: int(self.q_offset))
            if seen != before:
                raise ValueError(
                    f"the cache has seen {before} tokens, and {seen} in the layer of this attention; it is of "
                    "another model, or broken by an error in an earlier call"
                )
        whole: LazyMask = self
        if one:
            whole = self.once(("one", state.fixed_length), lambda: self._for_one(state))
        elif self.kv_offset or self.fixed_length:
            whole = self.once("whole", lambda: self._for_all(state.seen))
        return whole.sent(state=state)

    def _for_one(self, state: State) -> "LazyMask":
        sizes: dict[str, Any] = {"kv_length": state.fixed_length, "kv_offset": 0}
        return self._copy(**sizes, padding_BK=self.arguments["attention_mask"], first_B=None, fixed_length=False)

    def _for_all(self, seen: int) -> "LazyMask":
        number, padding_BK = seen + self.q_length, self.arguments["attention_mask"]
        if padding_BK is not None:
            padding_BK = nn.functional.pad(padding_BK, (0, max(0, number - padding_BK.shape[1])))[:, :number]
            padding_BK = None if readable(padding_BK) and bool(padding_BK.all()) else padding_BK
        sizes: dict[str, Any] = {"kv_length": number, "kv_offset": 0, "q_offset": seen}
        return self._copy(**sizes, padding_BK=padding_BK, first_B=None, fixed_length=False)

    def written(self) -> "LazyMask":
        """The mask of the keys that a static cache holds so far: none of those after the last query's is written."""

        def build() -> LazyMask:
            q_offset = int(self.q_offset)
            number = min(self.kv_length, q_offset + self.q_length - self.kv_offset)
            padding_BK = None if self.padding_BK is None else self.padding_BK[:, :number]
            sizes: dict[str, Any] = {"kv_length": number, "q_offset": q_offset}
            return self._copy(**sizes, padding_BK=padding_BK, fixed_length=False)

        return self.once("written", build)

    def hiding_unwritten(self) -> "LazyMask":
        """The mask of all keys of a static cache, in which those that are not written are padding."""
        position = torch.arange(self.kv_length, device=self.device) + self.kv_offset
        written_BK = (position < self.q_offset + self.q_length).unsqueeze(0)
        padding_BK = written_BK if self.padding_BK is None else self.padding_BK & written_BK
        return self._copy(padding_BK=padding_BK, fixed_length=False)

    def sent(self, **along: Any) -> "LazyMask":
        """The same mask, for one module, with what goes along; all share what is computed from it."""
        copied = self._copy(**along)
        copied.memo = self.memo
        return copied

    def contiguous(self) -> "LazyMask":
        """Itself: generate() says it to the masks that it prepares for static caches."""
        return self

    def native(self, implementation: str) -> Any:
        """The mask that ``implementation`` would have been given, made once for all layers."""
        make = ALL_MASK_ATTENTION_FUNCTIONS[implementation]

        def build() -> Any:
            made = make(**self.arguments)
            if self.segments_BK is not None and isinstance(made, torch.Tensor) and made.ndim == 2:
                raise ValueError(
                    f"{implementation!r} cannot keep packed texts apart in rows with padding; leave out the padding, "
                    "or load the model with attn_implementation='sdpa'"
                )
            return made.to(self.device) if hasattr(made, "to") else made

        return self.once(("native", implementation), build)


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
    causal, plain, segments_BK = read_rule(mask_function)
    chunked = others.get("local_size") is not None and bool(getattr(others.get("config"), "attention_chunk_size", None))
    packed = packing.packed_rule(
        mask_function, segments_BK, batch_size, q_length, kv_length, causal=causal, chunked=chunked
    )
    if packed is not None:
        mask_function, segments_BK = packed
        unskipped = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        arguments |= {"mask_function": mask_function, **unskipped}
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


def attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    position_bias: torch.Tensor | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Registered as an attention function: the module's slot attends, or its base implementation where it has none."""
    slot, base = getattr(module, SLOT, None), getattr(module, BASE, None)
    if base is None:
        raise ValueError(
            f"{type(module).__name__} was told to use attn_plugins, but no attention has been put into its model; "
            "load the whole model with from_pretrained, or call attn_plugins.swap_attention(model, ...)"
        )
    ours = isinstance(attention_mask, AttentionMask)
    packing.check(attention_mask.segments_BK is not None if ours else None if attention_mask is not None else False)
    if base in ("eager", "sdpa") or slot is not None:
        attention_mask = chosen_keys(module, query, key, attention_mask, kwargs)
    weighed = weights_wanted(module, kwargs)
    if slot is None:
        given = {"is_causal": is_causal, "position_bias": position_bias, "softcap": softcap, "s_aux": s_aux}
        given = {name: extra for name, extra in given.items() if extra is not None}
        if weighed and base != "eager":  # the others give none, and the layers with a slot do
            attention_mask, base = explicit(module, query, key, attention_mask, is_causal), "eager"
        native_mask = attention_mask.native(base) if isinstance(attention_mask, LazyMask) else attention_mask
        if base == "eager" and getattr(native_mask, "dtype", None) == torch.bool:
            # Made from a mask of ours, which is boolean, by a model that would have got one to add under this name.
            native_mask = additive(native_mask, query.dtype)
        return native_attention(module, base)(
            module, query, key, value, native_mask, scaling=scaling, dropout=dropout, **given, **kwargs
        )
    if kwargs.get("cache") is not None:
        raise ValueError("attn_plugins cannot serve paged caches (continuous batching); use generate() without it")
    refuse_unknown(module, kwargs)
    causal, role = getattr(module, "is_causal", True) if is_causal is None else is_causal, getattr(module, ROLE)
    if base == "eager":
        causal = False  # where a model makes no mask, only sdpa and the like are causal by themselves (BridgeTower)
    state = attention_mask.state if isinstance(attention_mask, LazyMask) else None
    if state is not None:
        if attention_mask.spent:
            raise ValueError(
                f"{type(module).__name__} calls its attention more than once in a forward pass; allowed: once, where "
                f"a cache holds the state of {slot_of(module)!r}; generate with use_cache=False"
            )
        attention_mask.spent = True
    mask, bias = attention_mask, None
    query, key, value = fitted(type(module).__name__, query, key, value)
    if state is None:
        # Bidirectional self-attention has as many keys as queries, unless a cache holds some before them or the model
        # has pooled some (SegFormer) or added some (perceivers): then nothing says which key is where a query is.
        behind = isinstance(attention_mask, LazyMask) and attention_mask.last_queries
        cross = role == "cross" or (role == "encoder" and query.shape[2] != key.shape[2] and not behind)
        static = isinstance(attention_mask, LazyMask) and attention_mask.fixed_length and not cross
        if static and key.shape[2] == attention_mask.kv_length:
            one = torch.compiler.is_compiling() and query.shape[2] == 1
            if one and getattr(slot_of(module), "unwritten_keys", False):
                attention_mask = attention_mask.hiding_unwritten()
            else:
                attention_mask = attention_mask.written()
                number = attention_mask.kv_length
                key, value = key[:, :, :number], value[:, :, :number]
                position_bias = position_bias if position_bias is None else position_bias[..., :number]
        mask, bias = as_mask(attention_mask, query, key, causal=causal, cross=cross)
    if bias is not None:
        position_bias = bias if position_bias is None else position_bias + bias
    before = None if state is None or torch.compiler.is_compiling() else state.seen
    attended = slot(
        query,
        key,
        value,
        mask=mask,
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        dropout=dropout,
        position_bias=position_bias,
        softcap=softcap,
        sinks=s_aux,
        rotary=getattr(attention_mask, "rotary", None),
        grid_size=grid_of(module, query),
        state=state,
        need_weights=weighed,
    )
    if before is not None and state is not None and state.seen != before + key.shape[2]:
        raise ValueError(
            f"{slot_of(module)!r} has not taken in the {key.shape[2]} tokens that its state was to grow by: a hook "
            "on its slot has kept the state from it; hooks have to hand on state= as it is"
        )
    return attended


def explicit(module: nn.Module, query: torch.Tensor, key: torch.Tensor, mask: Any, is_causal: bool | None) -> Any:
    """The mask for "eager" of a module that was to be served by sdpa, which is causal by itself without one."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if mask is not None or not causal or query.shape[2] == 1:
        return mask
    sizes = (len(query), query.shape[2], key.shape[2])
    return AttentionMask(*sizes, causal=True, q_offset=0, device=query.device).dense()


def chosen_keys(module: nn.Module, query: torch.Tensor, key: torch.Tensor, mask: Any, kwargs: dict[str, Any]) -> Any:
    """The mask, without keys that the model's own indexer has not chosen.

    Models that choose keys for each query (DeepSeek 3.2, MiniMax M3) put the choice into the mask where they know the
    attention function by name. To others they hand it over, and it is taken out of ``kwargs`` here.
    """
    indices, blocks = kwargs.pop("indices", None), kwargs.pop("block_indices", None)
    if indices is not None:
        chosen = torch.zeros(query.shape[0], query.shape[2], key.shape[2], dtype=torch.bool, device=key.device)
        chosen = chosen.scatter(-1, indices.long(), 1).unsqueeze(1)
        if mask is None:
            mask = AttentionMask(query.shape[0], query.shape[2], key.shape[2], causal=True, device=key.device).dense()
        if isinstance(mask, LazyMask) or mask.dtype == torch.bool:
            return mask & chosen
        return mask.masked_fill(~chosen, torch.finfo(mask.dtype).min)
    if blocks is not None:
        first = key.shape[2] - query.shape[2]
        positions = torch.arange(first, key.shape[2], device=key.device).expand(query.shape[0], -1)
        positions = positions if kwargs.get("position_ids") is None else kwargs["position_ids"].expand(len(query), -1)
        build: Any = module.indexer.build_block_mask  # type: ignore[union-attr]
        return build(blocks, mask, key.shape[2], query.dtype, key.device, positions)
    return mask


def as_mask(
    given: Any, query: torch.Tensor, key: torch.Tensor, *, causal: bool, cross: bool
) -> tuple[AttentionMask, torch.Tensor | None]:
    """Whatever a model passes for a mask as (AttentionMask, additive bias (B, 1 or H, Q, K) or None).

    Raises:
        ValueError: the mask is of another size than queries and keys, or of a kind that is not known.
    """
    batch_size, q_length, kv_length, device = query.shape[0], query.shape[2], key.shape[2], query.device
    if isinstance(given, AttentionMask):
        if given.q_length == 1 and q_length > 1 and given.plain and not given.causal and given.segments_BK is None:
            given = given.for_queries(q_length)  # one row for all queries: padding, as in a tensor below (BridgeTower)
        if (given.q_length, given.kv_length) != (q_length, kv_length):
            raise ValueError(
                f"the mask is for {given.q_length} queries and {given.kv_length} keys, "
                f"the attention has {q_length} and {kv_length}"
            )
        return (given.as_cross() if cross else given), None
    causal = causal and not cross
    sizes: dict[str, Any] = {"batch_size": batch_size, "q_length": q_length, "kv_length": kv_length, "device": device}
    if given is None:
        return AttentionMask(**sizes, causal=causal, cross=cross), None
    if not isinstance(given, torch.Tensor) or given.ndim not in (2, 3, 4):
        got = tuple(given.shape) if isinstance(given, torch.Tensor) else type(given).__name__
        raise ValueError(f"cannot read the attention mask {got}; allowed: None, or a tensor of 2, 3 or 4 dimensions")
    fits = {2: [batch_size], 3: [batch_size, q_length], 4: [batch_size, query.shape[1], q_length]}[given.ndim]
    if given.shape[-1] < kv_length or any(n not in (1, fit) for n, fit in zip(given.shape, fits, strict=False)):
        allowed = ", ".join([*(f"1 or {fit}" for fit in fits), f"{kv_length} or more"])
        raise ValueError(f"the attention mask is of shape {tuple(given.shape)}; allowed here: ({allowed})")
    if given.ndim == 2:
        return AttentionMask(**sizes, causal=causal, cross=cross, padding_BK=given[:, -kv_length:].bool()), None
    if given.dtype != torch.bool and not given.is_floating_point():
        raise ValueError(
            f"the attention mask {tuple(given.shape)} is of dtype {given.dtype}, which does not say if it is to be "
            "added; allowed: bool, True where a key is seen, or a floating dtype, to be added to scores"
        )
    read, bias = read_dense(given, q_length, kv_length, query.dtype, causal=causal, cross=cross)
    return AttentionMask(**sizes, **read, cross=cross), bias


def slot_of(module: nn.Module) -> Attention | None:
    """The attention in a module's slot, also where PEFT has put its own module around it."""
    slot = getattr(module, SLOT, None)
    if slot is None or isinstance(slot, Attention):
        return slot
    return next((inner for inner in slot.modules() if isinstance(inner, Attention)), None)


def turns(module: nn.Module) -> bool:
    """Whether a module gives its queries rotary positions in a way that :func:`rotary_of` knows."""
    forward = inspect.unwrap(type(module).forward)
    return (
        "apply_rotary_pos_emb" in forward.__globals__ and "position_embeddings" in inspect.signature(forward).parameters
    )


def rotary_of(module: nn.Module, kwargs: dict[str, Any]) -> Rotary | None:
    """What a module was told to turn its queries by, and its own function that does it, where it has both."""
    given = kwargs.get("position_embeddings")
    turn = inspect.unwrap(type(module).forward).__globals__.get("apply_rotary_pos_emb")
    if turn is None or not isinstance(given, tuple):
        return None
    return Rotary(given[0], given[1], lambda x, cos, sin: turn(x, x, cos, sin)[0])


def native_attention(module: nn.Module, implementation: str) -> Callable:
    """The function that the module itself would have called under ``implementation``.

    Raises:
        ValueError: the module does not show the function that it calls.
    """
    call = call_of(type(module))
    default: Any = None if call is None else call.eager
    found = None if call is None else call.interface.get_interface(implementation, default)
    if found is None:
        raise ValueError(
            f"cannot find the {implementation!r} attention of {type(module).__name__}; name it {USUAL}, in the file "
            "that calls the attention interface"
        )
    return found

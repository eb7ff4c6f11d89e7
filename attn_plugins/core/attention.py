"""The contract of one attention, and the legend of dimension letters that shape suffixes use.

    B batch   H query heads   G key/value heads (H is a multiple of G)   Q queries   K keys
    D head dimension   V value dimension   F features of a feature map   N blocks or chunks   C block or chunk length
    E size of a hidden state, which is the input of the module that an attention serves

``q_BHQD`` is a tensor of shape (B, H, Q, D). Queries are the last Q of the K positions when there is a cache.
"""

import dataclasses
import math
import warnings
from typing import Any, ClassVar

import torch
from torch import nn

from attn_plugins.core.backend import FORMS, Backend, attend_from, fastest, forced
from attn_plugins.core.capabilities import check_numbers, refuse_lacking
from attn_plugins.core.decode_state import State
from attn_plugins.core.gradients import with_gradients_to
from attn_plugins.core.grid import GridSize
from attn_plugins.core.heads import HeadShape
from attn_plugins.core.mask import AttentionMask
from attn_plugins.core.options import AttentionConfig
from attn_plugins.core.part import Part
from attn_plugins.core.rotary import Rotary
from attn_plugins.core.tracing import recorded

CAUSAL_SINKS = 4
"""First tokens that pretrained causal models look at from everywhere (Xiao et al. 2023, arXiv:2309.17453)."""


def sink_tokens(prefix_tokens: int | None) -> int:
    """First tokens that all others go on seeing, unless a rule says how many: an encoder's prefix, or 4.

    What None stands for in an option whose field has ``metadata={"settled": sink_tokens}``.
    """
    return CAUSAL_SINKS if prefix_tokens is None else prefix_tokens


class Attention(nn.Module):
    """One attention, in the slot ``attn_plugin`` of a transformers attention module.

    A subclass has a nested ``Config`` (frozen keyword-only dataclass on :class:`AttentionConfig`), declares with class
    attributes what it can honour, and implements

    - ``reference``: the dense form, the definition of correctness, which also yields the effective weights;
    - ``attend``: the form whose cost is what the method promises, equal to ``reference`` in outputs and gradients;
    - ``attend_batched``: the same for devices that are not a CPU, where ``attend`` runs a loop in Python;
    - ``reset_parameters``: where it has weights or buffers, initialise all of them, in place. What a checkpoint brings
      is kept, however they are written.

    Both forms take ``(q_BHQD, k_BGKD, v_BGKV, *, mask, scale, dropout)`` and, of ``position_bias``, ``softcap`` and
    ``sinks``, those that the class declares and the call brings. ``reference`` returns ``(out_BHQV, weights_BHQK)``,
    ``attend`` returns ``out_BHQV``. A query that sees nothing gives zeros. Weights that a call has no use for get a
    gradient of zero.

    When text is generated, keys and values of all tokens are kept, and the queries are the last of them. A causal
    attention that needs less than that can say so: ``new_state`` makes what it keeps instead, and ``attend_from``
    attends from there.
    """

    name: ClassVar[str]
    """Set by :func:`attn_plugins.register_attention`."""
    family: ClassVar[str] = "other"
    """Where it is listed: dense, local, sparse, linear, low_rank, additive, or a family of its own."""
    cost: ClassVar[str]
    """Time of one head in N (length) and the options, such as ``O(N window_size D)``."""
    keeps: ClassVar[str] = "all keys and values"
    """What a cache holds for a key/value head when text is generated: what ``new_state`` makes, if it makes one."""
    paper: ClassVar[str]
    """Who described it, with year and a reference that can be found."""
    when: ClassVar[str] = ""
    """When to pick it, in a sentence or two, for the documentation."""
    variants: ClassVar[str] = ""
    """What tables name beside it in brackets, such as its feature maps."""

    causal: ClassVar[bool] = False
    """Serves modules whose queries don't see what follows them."""
    bidirectional: ClassVar[bool] = False
    """Serves modules whose queries see the whole sequence."""
    cross: ClassVar[bool] = False
    """Serves queries and keys that come from different sequences."""
    any_mask: ClassVar[bool] = False
    """Serves masks beyond causal, padding and segments: a model's own sliding window, prefixes, image blocks."""
    segments: ClassVar[bool] = False
    """Serves packed sequences."""
    position_bias: ClassVar[bool] = False
    """Serves scores with an added bias_BHQK (T5)."""
    softcap: ClassVar[bool] = False
    """Serves scores limited by softcap * tanh(score / softcap) (Gemma 2)."""
    sinks: ClassVar[bool] = False
    """Serves learned sink logits, one a head, in the softmax's denominator (gpt-oss)."""
    dropout: ClassVar[bool] = False
    """Drops weights in training with the probability that the model asks for.

    The one thing that is not refused where it is lacking, since a method may have nothing to drop: it is left out, and
    a warning says so."""

    unwritten_keys: ClassVar[bool] = False
    """One query is served beside keys that a static cache has not written yet, hidden as padding behind its own.

    Such an attention keeps all keys and values, and the compiled step of one token holds for any number of them. Others
    that keep all get the keys that are written, of another number in each step."""

    convex: ClassVar[bool] = True
    """The output is ``weights @ v`` for the effective weights, which are not negative and sum to 1.

    Less than 1 with learned sinks, and where a query finds nothing that it is similar to."""
    linear_in_values: bool = True
    """With its options the output is ``weights @ v``, weights of either sign, gates made of values held as they are."""
    gated_by_values: bool = False
    """Whether, with its options, weights depend on values: its forms may get ``gates_of_BGKV``, in place of v there."""
    heads_multiple_of: ClassVar[int] = 1
    """The number of query heads has to be a multiple of this, where heads work in pairs or larger sets."""
    heads_alike: ClassVar[bool] = True
    """Without weights, a head does the same whichever and among however many it is, as under tensor parallelism."""
    head_weights: tuple[str, ...] | None = None
    """Names of the weights, or patterns such as "*", whose first dimension is query heads or key/value heads.

    By saying so it can be shared by heads, as under tensor parallelism: each process has its heads' part of these, all
    of the other weights and of the buffers, and :attr:`heads` is then what a call has, with the first of its heads by
    number. Without it (None), an attention that :attr:`needs_all_heads` is refused there."""
    subquadratic: ClassVar[bool] = True
    """``attend`` never holds a tensor of Q x K elements."""
    clean_padding: ClassVar[bool] = False
    """In its fast form infinities and NaN at padded positions stay there.

    Elsewhere, as in torch's own attention and in every reference form, they meet a weight of 0, which gives NaN."""
    any_length: ClassVar[bool] = True
    """Serves sequences of every length; else it raises a ValueError for those that it cannot, such as a part of a grid.

    The contract tests leave it out, its own tests call them at lengths that it serves."""
    symbolic_length: bool = False
    """With its options, ``reference`` computes with lengths as it does with tensors: a recorded graph serves them all.

    Else a graph serves the lengths that it was recorded with."""
    limit: ClassVar[dict[str, Any] | None] = None
    """Options under which it equals softmax attention on 50 tokens, or None where it never does."""
    branches: ClassVar[tuple[str, ...]] = ()
    """Parts that can be measured alone: one of them in the attribute ``branch`` of a module leaves out the others.

    What ``branch`` holds before is all of them."""
    examples: ClassVar[tuple[dict[str, Any], ...]] = ({},)
    """Options that matter on a few dozen tokens: the contract tests run each, the docs list them."""

    wants_rotary: bool = False
    """Whether, with its options, it needs to know the rotary positions that queries and keys have in them."""

    wants_grid: bool = False
    """Whether, with its options, it gets ``grid_size``: how patches lie, None where only ``HeadShape`` may tell."""

    wants_hidden: bool = False
    """Whether, with its options, it needs the hidden states that queries are made of: ``attend`` and ``reference`` get
    ``hidden_BQE``, ``attend_from`` gets ``hidden_BKE`` of the new tokens. Queries may be fewer than keys."""

    wants_hidden_of_keys: bool = False
    """Whether, with its options, it :attr:`wants_hidden` of every key too, as a gate on what is taken in does.

    No cache holds them, so only a state can attend to keys of earlier calls: others are refused."""

    in_parts: bool = False
    """Whether, with its options, it serves texts of which each process has a part (context parallelism):
    :meth:`attend_part`. The others are refused there."""

    Config: ClassVar[type[AttentionConfig]] = AttentionConfig
    config: Any
    branch: str

    def __init__(
        self,
        config: AttentionConfig,
        heads: HeadShape | None = None,
        *,
        backend: str = "auto",
    ):
        super().__init__()
        self.config, self.heads, self.backend = config, heads, backend
        if isinstance(config, AttentionConfig):
            self.config = config.settled(None if heads is None else heads.prefix_tokens)
        if heads is not None:
            self._check_heads(heads.num_heads)

    def forward(
        self,
        q_BHQD: torch.Tensor,
        k_BGKD: torch.Tensor,
        v_BGKV: torch.Tensor,
        *,
        mask: AttentionMask,
        scale: float,
        dropout: float = 0.0,
        position_bias: torch.Tensor | None = None,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
        rotary: Rotary | None = None,
        grid_size: GridSize | None = None,
        hidden: torch.Tensor | None = None,
        state: State | None = None,
        part: Part | None = None,
        gates_of: torch.Tensor | None = None,
        need_weights: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend.

        Args:
            q_BHQD, k_BGKD, v_BGKV: queries, keys and values; keys and values arrive with their own number of heads.
            mask: what each query may see.
            scale: factor on the scores, usually D ** -0.5.
            dropout: probability with which a weight is dropped; 0 outside training. Left out, with a warning, where
                :attr:`dropout` is False.
            position_bias: added to the scores, broadcastable to (B, H, Q, K).
            softcap: limit of the scores.
            sinks: (H,) logits that take part in the softmax without a value.
            rotary: the rotary positions of the queries, where :attr:`wants_rotary`.
            grid_size: how the patches of these images or videos lie, where :attr:`wants_grid` and it is known.
            hidden: (B, Q, E) what the queries are made of, where :attr:`wants_hidden`.
            state: of :meth:`new_state`, standing for all tokens before these queries and keys, which are then as many;
                ``mask`` is that of all tokens. It takes these in.
            part: which part of longer rows these queries, keys and values are, where :attr:`in_parts`; ``mask`` is then
                that of the whole rows.
            gates_of: (B, G, K, V) values that gates are made of, not ``v``, where :attr:`gated_by_values`.
            need_weights: also return the effective weights, through the dense form.

        Returns:
            (out_BQHV, weights_BHQK or None), transposed as transformers' attention functions return it.

        Raises:
            ValueError: the call needs something that this attention cannot honour.
        """
        extras: dict[str, Any] = {}
        if position_bias is not None:
            extras["position_bias"] = position_bias
        if softcap is not None:
            extras["softcap"] = softcap
        if sinks is not None:
            extras["sinks"] = sinks
        self._refuse(q_BHQD, k_BGKD, mask, extras)
        if dropout or softcap is not None or not (isinstance(scale, float) and 0 < scale < math.inf):
            check_numbers(scale, dropout, softcap)
        if dropout > 0 and not type(self).dropout and not torch.compiler.is_compiling():
            warn_of_dropout(type(self), dropout)
        if state is not None:
            state.check(q_BHQD, k_BGKD, v_BGKV, mask, need_weights=need_weights)
        device = q_BHQD.device.type
        usual = self.backend == "auto" and device == "cpu" and not recorded(q_BHQD, k_BGKD, v_BGKV)
        chosen = "torch" if usual else self.chosen(q_BHQD, k_BGKD, v_BGKV, state=state)
        options = {"mask": mask, "scale": scale, "dropout": dropout, **extras}
        if self.wants_rotary:
            if rotary is None:
                raise ValueError(
                    f"{self.name}({self.extra_repr()}) needs the rotary positions of the queries, got none"
                )
            options["rotary"] = rotary
        if self.wants_grid:
            options["grid_size"] = grid_size
        if gates_of is not None and self.gated_by_values:
            options["gates_of_BGKV"] = gates_of
        hidden_B1QE = self._hidden(q_BHQD, k_BGKD, hidden, state) if self.wants_hidden else None
        how = chosen, state, part, options, need_weights
        if device != "meta" and torch.is_autocast_enabled(device):
            # As torch's own attention does: inputs are cast (rotary positions may leave q and k in float32 beside v in
            # bfloat16), while sums keep the precision that they are written in.
            lower = torch.get_autocast_dtype(device)
            q_BHQD, k_BGKD, v_BGKV = (x if x.dtype == torch.float64 else x.to(lower) for x in (q_BHQD, k_BGKD, v_BGKV))
            if hidden_B1QE is not None and hidden_B1QE.dtype != torch.float64:
                hidden_B1QE = hidden_B1QE.to(lower)
            with torch.autocast(device, enabled=False):
                out_BHQV, weights_BHQK = self._run_form(q_BHQD, k_BGKD, v_BGKV, hidden_B1QE, *how)
        else:
            out_BHQV, weights_BHQK = self._run_form(q_BHQD, k_BGKD, v_BGKV, hidden_B1QE, *how)
        out_BQHV = out_BHQV.transpose(1, 2).contiguous()
        if torch.is_grad_enabled():
            out_BQHV = with_gradients_to(out_BQHV, self.parameters())
        return out_BQHV, weights_BHQK

    def _run_form(
        self,
        q_BHQD: torch.Tensor,
        k_BGKD: torch.Tensor,
        v_BGKV: torch.Tensor,
        hidden_B1QE: torch.Tensor | None,
        chosen: str,
        state: State | None,
        part: Part | None,
        options: dict[str, Any],
        need_weights: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(out_BHQV, weights_BHQK or None) of a call that has been checked, by the form that serves it."""
        if state is not None and part is None:
            state.to(k_BGKD.device)  # it may have been offloaded
            new = (k_BGKD, v_BGKV) if hidden_B1QE is None else (k_BGKD, v_BGKV, hidden_B1QE)
            waiting = state.pending is not None or state.recording
            k_BGKD, v_BGKV, *hidden_B1KE = state.flush_pending(*new) if waiting else new
            if hidden_B1KE:
                options["hidden_BKE"] = hidden_B1KE[0].squeeze(1)
            return attend_from(self, q_BHQD, k_BGKD, v_BGKV, state=state, **options), None
        dense = part is None and (need_weights or chosen == "reference")
        if dense:
            q_BHQD, k_BGKD, v_BGKV = (self._fixed(x) for x in (q_BHQD, k_BGKD, v_BGKV))
        if hidden_B1QE is not None:
            options["hidden_BQE"] = (self._fixed(hidden_B1QE) if dense else hidden_B1QE).squeeze(1)
        if dense:
            return self.reference(q_BHQD, k_BGKD, v_BGKV, **options)
        if part is not None:
            return self.attend_part(q_BHQD, k_BGKD, v_BGKV, part=part, **options), None
        by = self._computed_by(chosen, q_BHQD, k_BGKD, v_BGKV, **options)
        if not isinstance(by, str):
            return by.attend(self, q_BHQD, k_BGKD, v_BGKV, **options), None
        return (self.attend_batched if by == "batched" else self.attend)(q_BHQD, k_BGKD, v_BGKV, **options), None

    def chosen(self, *tensors: torch.Tensor, state: State | None = None) -> str:
        """The backend that computes with these tensors: what was asked for, or what ``auto`` is here.

        Where that is "auto" still, it is a call on a device that is not a CPU, which decides for itself.

        Raises:
            ValueError: operations are being recorded, and it is one that looks at lengths or values.
        """
        on_cpu = len(tensors) == 0 or tensors[0].device.type == "cpu"
        if not recorded(*tensors):
            return "torch" if self.backend == "auto" and on_cpu else self.backend
        if state is not None:
            raise ValueError(
                f"what attention {self.name!r} keeps in a cache cannot be part of a recorded graph (torch.export, "
                "torch.jit.trace, make_fx, functorch); call the model without a cache (use_cache=False)"
            )
        if self.backend not in ("auto", "reference", "batched"):
            why = "it looks at lengths and values" if self.backend == "torch" else "its kernels are not recorded"
            raise ValueError(
                f"backend={self.backend!r} of attention {self.name!r} cannot be part of a recorded graph "
                f"(torch.export, torch.jit.trace, make_fx, functorch): {why}; allowed there: 'reference', 'batched', "
                "and 'auto', which then is one of these"
            )
        if self.backend == "auto":
            return "reference" if on_cpu else "batched"
        return self.backend

    def computed_by(
        self, q_BHQD: torch.Tensor, k_BGKD: torch.Tensor, v_BGKV: torch.Tensor, **options: Any
    ) -> str | Backend:
        """What computes a call without a state: a form of the attention, by name, or a backend.

        Args:
            options: those that ``attend`` gets: mask, scale, dropout, ...

        Raises:
            ValueError: a backend was asked for that cannot serve the call.
        """
        return self._computed_by(self.chosen(q_BHQD, k_BGKD, v_BGKV), q_BHQD, k_BGKD, v_BGKV, **options)

    def _computed_by(
        self, chosen: str, q_BHQD: torch.Tensor, k_BGKD: torch.Tensor, v_BGKV: torch.Tensor, **options: Any
    ) -> str | Backend:
        """The same, by what :meth:`chosen` has said."""
        if "gates_of_BGKV" in options:  # libraries make gates of v itself
            return "batched" if self.prefers_batched(q_BHQD) else "torch"
        if self.backend == "auto" and chosen in ("auto", "torch"):
            return fastest(self, q_BHQD, k_BGKD, v_BGKV, **options) or chosen.replace("auto", "batched")
        return chosen if chosen in FORMS else forced(chosen, self, q_BHQD, k_BGKD, v_BGKV, **options)

    def prefers_batched(self, tensor: torch.Tensor) -> bool:
        """Whether what comes to a state at once, on this tensor's device, goes by the batched form."""
        return self.backend == "batched" or (self.backend != "torch" and tensor.device.type != "cpu")

    def reference(
        self, q_BHQD: torch.Tensor, k_BGKD: torch.Tensor, v_BGKV: torch.Tensor, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The dense form: (out_BHQV, weights_BHQK)."""
        raise NotImplementedError(f"{type(self).__name__} has no reference form")

    def attend(self, q_BHQD: torch.Tensor, k_BGKD: torch.Tensor, v_BGKV: torch.Tensor, **options: Any) -> torch.Tensor:
        """The form whose cost the method promises: out_BHQV."""
        raise NotImplementedError(f"{type(self).__name__} has no form of its own cost")

    def attend_batched(
        self, q_BHQD: torch.Tensor, k_BGKD: torch.Tensor, v_BGKV: torch.Tensor, **options: Any
    ) -> torch.Tensor:
        """The same for devices where starting an operation costs more than running it: out_BHQV.

        The number of operations does not grow with N, none asks for a tensor's value on the host, and all of them can
        be part of a graph of torch.compile or torch.export. ``attend`` itself, where that is so already.
        """
        return self.attend(q_BHQD, k_BGKD, v_BGKV, **options)

    def attend_part(
        self, q_BHTD: torch.Tensor, k_BGTD: torch.Tensor, v_BGTV: torch.Tensor, *, part: Part, **options: Any
    ) -> torch.Tensor:
        """As ``attend``, for the T tokens that this process has of longer rows: out_BHTV, equal to that of one process.

        All processes call it, in the same order. What one needs of another's it gets by ``part.exchange``, or by what
        is built on that (``ops/parts/``).

        Args:
            part: with the mask of the whole rows, which says where padding and texts are in all of them.
            options: as those of ``attend``; ``mask`` is ``part.mask``.

        Raises:
            ValueError: a mask that cannot be served in parts, on every process alike.
        """
        raise NotImplementedError(f"attention {self.name!r} sets in_parts and has no attend_part")

    def new_state(self, fixed_length: int | None = None) -> State | None:
        """What to keep of tokens seen, at its beginning; None where that is all keys and values, in an ordinary cache.

        Args:
            fixed_length: the most tokens that will come, where shapes have to stay the same from the first call on.
        """
        return None

    def attend_from(
        self, q_BHQD: torch.Tensor, k_BGKD: torch.Tensor, v_BGKV: torch.Tensor, *, state: Any, **options: Any
    ) -> torch.Tensor:
        """As ``attend``, equal to it over all tokens so far, given only the new ones and the state before them.

        The queries are the last Q of K new tokens, Q <= K, and ``mask`` is that of Q queries and all tokens so far. The
        state takes all K in.
        """
        raise NotImplementedError(f"{type(self).__name__} has a state and nothing that attends from it")

    def reset_parameters(self) -> None:
        """Initialise the weights and buffers, all of them, in place."""
        if next(self.parameters(), None) is not None or next(self.buffers(), None) is not None:
            raise NotImplementedError(f"{type(self).__name__} has weights or buffers but no reset_parameters")

    def _fixed(self, x_BHND: torch.Tensor) -> torch.Tensor:
        """The same; a graph that is being recorded takes no other length, if ``reference`` would be wrong there."""
        length = x_BHND.shape[2]
        if self.symbolic_length or type(length) is int:
            return x_BHND
        if isinstance(length, torch.SymInt):
            raise ValueError(
                f"attention {self.name!r} cannot be exported with a dynamic length: what it computes follows from the "
                "length; allowed: a fixed one"
            )
        return x_BHND.expand(-1, -1, int(length), -1)  # torch.jit.trace, where lengths are tensors

    def _hidden(
        self, q_BHQD: torch.Tensor, k_BGKD: torch.Tensor, hidden_BQE: torch.Tensor | None, state: State | None
    ) -> torch.Tensor:
        """The hidden states, (B, 1, Q, E) as of one head, after a check that they are of these queries."""
        told, queries, keys = f"{self.name}({self.extra_repr()})", q_BHQD.shape[2], k_BGKD.shape[2]
        if hidden_BQE is None:
            raise ValueError(f"{told} needs the hidden states that queries are made of, got none")
        size = hidden_BQE.shape[-1] if self.heads is None or self.heads.hidden_size is None else self.heads.hidden_size
        want = (q_BHQD.shape[0], queries, size)
        if tuple(hidden_BQE.shape) != want:
            raise ValueError(
                f"{told} needs hidden states of (batch, queries, size) = {want}, got {tuple(hidden_BQE.shape)}"
            )
        if self.wants_hidden_of_keys and state is None and queries != keys:
            raise ValueError(
                f"{told} needs the hidden states of all {keys} keys, got those of {queries} queries: a cache of keys "
                "and values does not have them; use a new cache, of the default kind"
            )
        return hidden_BQE.unsqueeze(1)

    def extra_repr(self) -> str:
        options = ", ".join(
            f"{field.name}={getattr(self.config, field.name)!r}" for field in dataclasses.fields(self.config)
        )
        return options if self.backend == "auto" else f"{options}, backend={self.backend!r}".lstrip(", ")

    @property
    def needs_all_heads(self) -> bool:
        """Whether it serves only as many heads as it was built for: it has weights a head, or tells heads apart."""
        return not self.heads_alike or next(self.parameters(), None) is not None

    def _refuse(self, q_BHQD: torch.Tensor, k_BGKD: torch.Tensor, mask: AttentionMask, extras: dict[str, Any]) -> None:
        kind, usual = type(self), not (mask.ruled or mask.cross or mask.structure is not None)
        usual = usual and not extras and mask.segments_BK is None
        if not usual or not (kind.causal if mask.causal else kind.bidirectional):
            refuse_lacking(kind, mask, extras)
        (_, number, _, size), heads = q_BHQD.shape, self.heads
        if self.heads_multiple_of > 1:
            self._check_heads(number)
        if heads is not None:
            got, want = (number, k_BGKD.shape[1], size), (heads.num_heads, heads.num_key_value_heads, heads.head_dim)
            if got != want and self.needs_all_heads:
                raise ValueError(
                    f"attention {self.name!r} was built for "
                    f"(query heads, key/value heads, head dimension) = {want}, got {got}"
                )

    def _check_heads(self, number: int) -> None:
        if number % self.heads_multiple_of:
            raise ValueError(
                f"attention {self.name!r} needs a number of query heads that is a multiple of "
                f"{self.heads_multiple_of}, got {number}"
            )


def warn_of_dropout(attention: type[Attention], dropout: float) -> None:
    """Warn that a model's dropout is left out. By default a process shows each such warning once."""
    warnings.warn(
        f"attention {attention.name!r} drops no weights: the model's attention dropout of {dropout} is left out in its "
        "modules (attentions that have it are those with dropout in `attn-plugins list`)",
        stacklevel=1,  # always the same place, so that it is the same warning at the swap and in training
    )

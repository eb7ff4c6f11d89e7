"""The abstract base of the attentions that are a recurrence over tokens."""

import abc

import torch

from attn_plugins.core.attention import Attention, HeadShape
from attn_plugins.ops.decode.running_sums import Sums
from attn_plugins.ops.recurrent.batched import ALL_AT_ONCE, recurrent_attention_batched
from attn_plugins.ops.recurrent.chunked import IN_ORDER, Prepare, dense_recurrent_attention, recurrent_attention
from attn_plugins.ops.recurrent.in_part import recurrent_attention_of_part
from attn_plugins.ops.recurrent.step import recurrent_attention_from


class RecurrentAttention(Attention, abc.ABC):
    """Recurrent attention: a subclass says what the recurrence takes of a token, and with which weights.

    Its ``Config`` has a ``chunk_size``, a power of two, and, where gates are a function of the token, a ``gate_input``:
    "value", the token's own value, or "hidden", its hidden state. The first dimension of its weights is that of heads.
    """

    in_parts = True
    head_weights = ("*",)

    def __init__(self, config, heads=None, **options):
        super().__init__(config, heads, **options)
        gate_input = getattr(config, "gate_input", None)
        self.wants_hidden = self.wants_hidden_of_keys = gate_input == "hidden"
        self.gated_by_values = gate_input == "value"

    def gate_size(self, heads: HeadShape) -> int:
        """Size of what gates are made of; a ValueError where it is not known."""
        return heads.known_hidden_size(self.name) if self.wants_hidden else heads.value_dim

    @property
    def root_of_size(self) -> float:
        """The square root of D, by which scores of unit queries and keys are scaled down."""
        assert self.heads is not None
        return self.heads.head_dim**0.5

    @abc.abstractmethod
    def prepare(self, scale: float) -> Prepare:
        """A function of queries, keys, values and :meth:`weights` alone that makes
        :class:`attn_plugins.ops.recurrent.chunked.Tokens` of them. With hidden states these are a fourth argument,
        before the weights."""

    @abc.abstractmethod
    def weights(self) -> list[torch.Tensor]:
        """The weights that :meth:`prepare` takes, in its order."""

    def reference(self, q_BHQD, k_BGKD, v_BGKV, *, mask, scale, dropout, hidden_BQE=None, gates_of_BGKV=None):
        new = _of_keys(k_BGKD, v_BGKV, hidden_BQE, gates_of_BGKV)
        return dense_recurrent_attention(q_BHQD, new, mask, self.prepare(scale), self.weights())

    def attend(self, q_BHQD, k_BGKD, v_BGKV, *, mask, scale, dropout, hidden_BQE=None, gates_of_BGKV=None):
        new = _of_keys(k_BGKD, v_BGKV, hidden_BQE, gates_of_BGKV)
        recurrence = self.prepare(scale), self.weights()
        return recurrent_attention(q_BHQD, new, mask, *recurrence, chunk_size=self.config.chunk_size)

    def attend_batched(self, q_BHQD, k_BGKD, v_BGKV, *, mask, scale, dropout, hidden_BQE=None, gates_of_BGKV=None):
        new = _of_keys(k_BGKD, v_BGKV, hidden_BQE, gates_of_BGKV)
        recurrence = self.prepare(scale), self.weights()
        return recurrent_attention_batched(q_BHQD, new, mask, *recurrence, chunk_size=self.config.chunk_size)

    def attend_part(self, q_BHTD, k_BGTD, v_BGTV, *, part, mask, scale, dropout, hidden_BQE=None):
        recurrence, new = (self.prepare(scale), self.weights()), _of_keys(k_BGTD, v_BGTV, hidden_BQE)
        rules = ALL_AT_ONCE if self.prefers_batched(q_BHTD) else IN_ORDER
        options = {"chunk_size": self.config.chunk_size, "rules": rules}
        return recurrent_attention_of_part(q_BHTD, new, part, *recurrence, **options)

    def new_state(self, fixed_length=None):
        return Sums(fixed_length)

    def attend_from(self, q_BHQD, k_BGKD, v_BGKV, *, state, mask, scale, dropout, hidden_BKE=None, step=None):
        recurrence, new = (self.prepare(scale), self.weights()), _of_keys(k_BGKD, v_BGKV, hidden_BKE)
        rules = ALL_AT_ONCE if self.prefers_batched(q_BHQD) else IN_ORDER
        options = {"chunk_size": self.config.chunk_size, "rules": rules, "step": step}
        return recurrent_attention_from(q_BHQD, new, mask, state, *recurrence, **options)


def _of_keys(k_BGKD, v_BGKV, hidden_BKE, gates_of_BGKV=None):
    """What a recurrence takes of its tokens beside queries: keys, values, and what gates are made of if not of these.

    That is hidden states, as of one head, or other values.
    """
    if hidden_BKE is not None:
        return k_BGKD, v_BGKV, hidden_BKE.unsqueeze(1)
    return (k_BGKD, v_BGKV) if gates_of_BGKV is None else (k_BGKD, v_BGKV, gates_of_BGKV)

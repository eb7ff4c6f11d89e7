"""The abstract base of the attentions that are a recurrence over tokens."""

import abc

import torch

from attn_plugins.core.attention import Attention
from attn_plugins.ops.decode.running_sums import Sums
from attn_plugins.ops.recurrent.chunked import Prepare, dense_recurrent_attention, recurrent_attention
from attn_plugins.ops.recurrent.step import recurrent_attention_from


class RecurrentAttention(Attention, abc.ABC):
    """Recurrent attention: a subclass says what the recurrence takes of a token, and with which weights.

    Its ``Config`` has a ``chunk_size``, a power of two.
    """

    @abc.abstractmethod
    def prepare(self, scale: float) -> Prepare:
        """A function of queries, keys, values and :meth:`weights` alone that makes
        :class:`attn_plugins.ops.recurrent.chunked.Tokens` of them."""

    @abc.abstractmethod
    def weights(self) -> list[torch.Tensor]:
        """The weights that :meth:`prepare` takes, in its order."""

    def reference(self, q_BHQD, k_BGKD, v_BGKV, *, mask, scale, dropout):
        return dense_recurrent_attention(q_BHQD, k_BGKD, v_BGKV, mask, self.prepare(scale), self.weights())

    def attend(self, q_BHQD, k_BGKD, v_BGKV, *, mask, scale, dropout):
        recurrence, chunk_size = (self.prepare(scale), self.weights()), self.config.chunk_size
        return recurrent_attention(q_BHQD, k_BGKD, v_BGKV, mask, *recurrence, chunk_size=chunk_size)

    def new_state(self, fixed_length=None):
        return Sums(fixed_length)

    def attend_from(self, q_BHQD, k_BGKD, v_BGKV, *, state, mask, scale, dropout):
        recurrence, chunk_size = (self.prepare(scale), self.weights()), self.config.chunk_size
        return recurrent_attention_from(q_BHQD, k_BGKD, v_BGKV, mask, state, *recurrence, chunk_size=chunk_size)

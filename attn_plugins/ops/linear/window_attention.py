"""The abstract base of attentions that are softmax over sinks and a window and sums of features over all else."""

import abc
import functools
from typing import Any

import torch

from attn_plugins.core.attention import Attention
from attn_plugins.core.mask import AttentionMask
from attn_plugins.ops.decode.running_sums import Sums
from attn_plugins.ops.linear import window, window_in_part
from attn_plugins.ops.linear.features import FeatureMap, Prepared


class WindowAndSumsAttention(Attention, abc.ABC):
    """Softmax over sinks and a window, linear attention over what has left it, under one denominator.

    A subclass says what is made of queries and keys for the sums, and which map to features comes after it. Its
    ``Config`` has ``window_size``, ``num_sink_tokens`` and ``chunk_size``.
    """

    @property
    @abc.abstractmethod
    def phi(self) -> FeatureMap:
        """The map to features."""

    @abc.abstractmethod
    def prepare(
        self, q_BHQD: torch.Tensor, k_BGKD: torch.Tensor, mask: AttentionMask, scale: float, since: Any = None
    ) -> tuple[Prepared, dict[str, Any]]:
        """What :attr:`phi` is applied to, and the options of
        :func:`attn_plugins.ops.linear.window.dense_linear_window`. ``since``, which token it is, comes with one token
        from a state: see :func:`attn_plugins.ops.linear.features.prepare`."""

    def reference(self, q_BHQD, k_BGKD, v_BGKV, *, mask, scale, dropout):
        prepared, options = self.prepare(q_BHQD, k_BGKD, mask, scale)
        return window.dense_linear_window(q_BHQD, k_BGKD, v_BGKV, prepared, mask, **options)

    def attend(self, q_BHQD, k_BGKD, v_BGKV, *, mask, scale, dropout, forms=window.PLAIN):
        prepared, options = self.prepare(q_BHQD, k_BGKD, mask, scale)
        options |= {"chunk_size": self.config.chunk_size, "forms": forms}
        return window.linear_window_attention(q_BHQD, k_BGKD, v_BGKV, prepared, mask, **options)

    def attend_batched(self, q_BHQD, k_BGKD, v_BGKV, **options):
        return self.attend(q_BHQD, k_BGKD, v_BGKV, **options, forms=window.BATCHED)

    def attend_part(self, *tokens, **options):
        return window_in_part.attend_part(self, *tokens, **options)

    def new_state(self, fixed_length=None):
        return Sums(fixed_length, window_size=self.config.window_size, num_first=self.config.num_sink_tokens)

    def attend_from(self, q_BHQD, k_BGKD, v_BGKV, *, state, mask, scale, dropout, step=None):
        tokens, prepare = (q_BHQD, k_BGKD, v_BGKV), functools.partial(self.prepare, mask=mask, scale=scale)
        forms = window.BATCHED if self.prefers_batched(q_BHQD) else window.PLAIN
        sizes = {"chunk_size": self.config.chunk_size, "forms": forms, "step": step}
        return window.linear_window_attention_from(*tokens, mask, state, prepare, **sizes)

"""XLM: bidirectional or causal, as its config says. A causal model masks no padding."""

from typing import Any

import torch
from torch import nn
from transformers.models.xlm import modeling_xlm

from attn_plugins.hf.adapters import attend, cached, slotted

FAMILIES = ("xlm",)


class MultiHeadAttention(modeling_xlm.MultiHeadAttention):
    def is_causal_in(self, model: nn.Module, path: str) -> bool:
        return bool(getattr(model.get_submodule(path.rpartition("attentions.")[0].rstrip(".")), "causal", False))

    @property
    def layer_idx(self) -> int:
        return self.layer_id

    @slotted
    def forward(
        self,
        input: torch.Tensor,
        mask: torch.Tensor,
        kv: torch.Tensor | None = None,
        cache: Any = None,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[torch.Tensor | None, ...]:
        def heads(x: torch.Tensor) -> torch.Tensor:
            return x.unflatten(-1, (self.n_heads, self.head_dim)).transpose(1, 2)

        source = input if kv is None else kv
        key, value = cached(
            cache, self.layer_id, kv is not None, lambda: (heads(self.k_lin(source)), heads(self.v_lin(source)))
        )
        out, weights = attend(
            self, heads(self.q_lin(input)), key, value, mask, dropout=self.dropout, output_attentions=output_attentions
        )
        out = self.out_lin(out.flatten(2))
        return (out, weights) if output_attentions else (out,)

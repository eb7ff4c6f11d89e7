"""SEW-D: attention as DeBERTa-v2's, over frames of sound."""

from transformers.models.sew_d import modeling_sew_d

from attn_plugins.hf.adapters import deberta_v2

FAMILIES = ("sew_d",)


class DisentangledSelfAttention(modeling_sew_d.DisentangledSelfAttention):
    is_causal = False
    adds_position_bias = deberta_v2.DisentangledSelfAttention.adds_position_bias

    @property
    def dropped(self) -> float:
        return self.dropout.drop_prob

    forward = deberta_v2.DisentangledSelfAttention.forward

"""FlauBERT: attention as XLM's."""

from transformers.models.flaubert import modeling_flaubert

from attn_plugins.hf.adapters import xlm

FAMILIES = ("flaubert",)


class MultiHeadAttention(modeling_flaubert.MultiHeadAttention):
    is_causal_in = xlm.MultiHeadAttention.is_causal_in
    layer_idx = xlm.MultiHeadAttention.layer_idx
    forward = xlm.MultiHeadAttention.forward

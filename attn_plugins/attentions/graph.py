from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from attn_plugins.core.attention import AttentionConfig
from attn_plugins.core.registry import register_attention
from attn_plugins.ops.reference import dense_attention
from attn_plugins.ops.softmax.attention import PatternAttention
from attn_plugins.ops.softmax.patterns.all_pairs import AllPairs
from attn_plugins.ops.softmax.structured import attend_to_all, dense_labels, structured_attention


@register_attention("graph")
class GraphAttention(PatternAttention):
    """Attention over the structure of the input: neighbours in a graph, cells of a row, nodes of a tree, sections.

    ``out_i = sum_j softmax_j(scale q_i . k_j + b_label(i, j)) v_j`` over the keys j that the mask shows and that the
    structure given to the model in this call (``structure=``, an :class:`attn_plugins.Structure`) shows to query i.
    As without a mask, all pairs are visible in a call without a structure, at the cost of all; with ``required=True``
    such a call is refused.

    Biases b, one a head and label, are learned and start at zero; ``num_labels=0`` has none. Labels are part of the
    structure: of an edge, of a relation in a table or tree, or the length of the shortest path, as in Graphormer's
    spatial encoding (eq. 6 there), though over the pairs of the structure alone.

    Decoders take structures by the attentions that serve any mask: a cache holds the tokens of earlier calls, of which
    a structure would have to tell anew with every token.

    Limit case: equals softmax attention when no structure is given, or one that shows all pairs.
    """

    family = "sparse"
    cost = "O(N^2 D), and O(E D) with a structure of E pairs"
    paper = (
        "Velickovic et al. 2018, Graph Attention Networks, arXiv:1710.10903; biases: Ying et al. 2021, arXiv:2106.05234"
    )
    variants = "graphs, tables, trees, sections, biases a label"
    when = (
        "When what belongs together is known: edges of a graph, rows and columns, sections. Attentions that serve "
        "every mask take a structure too, at their own cost."
    )
    bidirectional = any_mask = segments = position_bias = softcap = sinks = dropout = True
    head_weights = ("bias_HL",)
    symbolic_length = True
    limit: ClassVar = {}

    @dataclass(frozen=True, kw_only=True)
    class Config(AttentionConfig):
        num_labels: int = 0
        """Labels that have a learned bias: all of the structures that will come, counted from 0. 0 is no biases."""
        required: bool = False
        """Whether a call without a structure is refused."""

        def __post_init__(self):
            super().__post_init__()
            self.require(self.num_labels >= 0, "num_labels", "an integer from 0 on")

    bias_HL: torch.Tensor | None

    def __init__(self, config, heads=None, *, backend="auto"):
        super().__init__(config, heads, backend=backend)
        self.bias_HL = None
        if config.num_labels:
            if heads is None:
                raise ValueError(f"num_labels={config.num_labels} needs to know how many heads there are; allowed: 0")
            self.bias_HL = nn.Parameter(torch.empty(heads.num_heads, config.num_labels))
            vars(self)["by_rules"] = None  # it is no FollowsRules: kernels that take rules know no labels

    def reset_parameters(self):
        if self.bias_HL is not None:
            nn.init.zeros_(self.bias_HL)

    def patterns(self, heads, mask, grid_size=None):
        if mask.structure is None and self.config.required:
            raise ValueError(
                "attention 'graph' needs the structure of the input, and the call has none; give the model structure=, "
                "or leave out required=True, and all pairs are visible"
            )
        if (
            self.bias_HL is not None
            and mask.structure is not None
            and mask.structure.num_labels > self.config.num_labels
        ):
            raise ValueError(
                f"the structure has {mask.structure.num_labels} labels, and attention 'graph' has biases for "
                f"num_labels={self.config.num_labels}; allowed: no more labels than biases, or num_labels=0"
            )
        return [(slice(0, heads), AllPairs())]

    def reference(self, q_BHQD, k_BGKD, v_BGKV, *, mask, position_bias=None, **options):
        self.patterns(q_BHQD.shape[1], mask)
        if self.bias_HL is not None and mask.structure is not None:
            bias_HL1 = nn.functional.pad(self.bias_HL, (0, 1))  # -1, of no label, is the last
            bias_BHQK = bias_HL1[:, dense_labels(mask)].transpose(0, 1)
            position_bias = bias_BHQK if position_bias is None else position_bias + bias_BHQK
        return dense_attention(q_BHQD, k_BGKD, v_BGKV, mask.dense(), position_bias=position_bias, **options)

    def attend(self, q_BHQD, k_BGKD, v_BGKV, *, mask, **options):
        return self._attend(q_BHQD, k_BGKD, v_BGKV, mask, False, options)

    def attend_batched(self, q_BHQD, k_BGKD, v_BGKV, *, mask, **options):
        return self._attend(q_BHQD, k_BGKD, v_BGKV, mask, True, options)

    def _attend(self, q_BHQD, k_BGKD, v_BGKV, mask, batched, options):
        self.patterns(q_BHQD.shape[1], mask)
        if mask.structure is None:
            return attend_to_all(q_BHQD, k_BGKD, v_BGKV, mask, batched=batched, **options)
        return structured_attention(q_BHQD, k_BGKD, v_BGKV, mask, label_bias=self.bias_HL, **options)

"""Attentions of other packages, to be measured beside ours. Each runs only where its package is installed."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(q, k, v), each (B, H, N, D), -> output of any layout."""


@dataclass(frozen=True, kw_only=True)
class Peer:
    """One published attention."""

    name: str
    package: str
    """What is imported, and whose absence leaves it out."""
    causal: bool
    ours: str
    """The attention of this package that computes the same, or the nearest to it."""
    note: str
    """What differs in what it computes."""
    build: Callable[[int, int, int], Attend]
    """(heads, head dimension, longest sequence) -> the attention, its own weights made."""

    @property
    def installed(self) -> bool:
        """Whether its package can be imported."""
        return importlib.util.find_spec(self.package) is not None


def _local_attention(heads: int, head_dim: int, length: int) -> Attend:
    from local_attention import LocalAttention

    attention = LocalAttention(
        window_size=256, causal=True, look_backward=1, exact_windowsize=True, autopad=True, use_rotary_pos_emb=False
    )
    return lambda q, k, v: attention(*(x.contiguous() for x in (q, k, v)))


def _performer(heads: int, head_dim: int, length: int) -> Attend:
    from performer_pytorch import FastAttention

    return FastAttention(dim_heads=head_dim, causal=True)


def _linear_attention_transformer(heads: int, head_dim: int, length: int) -> Attend:
    from linear_attention_transformer.linear_attention_transformer import causal_linear_attn

    return lambda q, k, v: causal_linear_attn(q, k, v, bucket_size=64)


def _longformer(heads: int, head_dim: int, length: int) -> Attend:
    from transformers import LongformerConfig
    from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

    config = LongformerConfig(
        hidden_size=heads * head_dim,
        num_attention_heads=heads,
        attention_window=[512],
        num_hidden_layers=1,
        attention_probs_dropout_prob=0.0,
    )
    attention = LongformerSelfAttention(config, layer_id=0)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        nobody = torch.zeros(q.shape[0], q.shape[2], device=q.device)
        masked = global_ = nobody.bool()
        options = {"is_index_masked": masked, "is_index_global_attn": global_, "is_global_attn": False}
        return attention(_hidden(q), attention_mask=nobody, **options)[0]

    return _with(attention, attend)


def _bigbird(heads: int, head_dim: int, length: int) -> Attend:
    from transformers import BigBirdConfig
    from transformers.models.big_bird.modeling_big_bird import BigBirdBlockSparseAttention, BigBirdModel

    config = BigBirdConfig(
        hidden_size=heads * head_dim,
        num_attention_heads=heads,
        block_size=64,
        num_random_blocks=3,
        max_position_embeddings=length,
        use_bias=False,
    )
    attention = BigBirdBlockSparseAttention(config, seed=0)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        everybody = torch.ones(q.shape[0], q.shape[2], device=q.device)
        blocked, band, from_mask, to_mask = BigBirdModel.create_masks_for_block_sparse_attn(everybody, 64)
        masks = {"band_mask": band, "from_mask": from_mask, "to_mask": to_mask}
        return attention(_hidden(q), **masks, from_blocked_mask=blocked, to_blocked_mask=blocked)[0]

    return _with(attention, attend)


def _hidden(x: torch.Tensor) -> torch.Tensor:
    """(B, H, N, D) -> (B, N, H D): what a module that projects for itself starts from."""
    return x.transpose(1, 2).flatten(2)


def _with(module: nn.Module, attend: Attend) -> Attend:
    """``attend``, which moves the module to where its inputs are."""

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        module.to(q.device, q.dtype).eval()
        return attend(q, k, v)

    return run


PEERS = (
    Peer(
        name="local-attention",
        package="local_attention",
        causal=True,
        ours="local",
        note="window of 256, the query not counted",
        build=_local_attention,
    ),
    Peer(
        name="performer-pytorch",
        package="performer_pytorch",
        causal=True,
        ours="linear",
        note="FAVOR+ features, its causal form without the CUDA extension",
        build=_performer,
    ),
    Peer(
        name="linear-attention-transformer",
        package="linear_attention_transformer",
        causal=True,
        ours="linear",
        note="buckets of 64; a query does not see its own bucket, so it does less",
        build=_linear_attention_transformer,
    ),
    Peer(
        name="transformers Longformer",
        package="transformers",
        causal=False,
        ours="longformer",
        note="256 to each side, its projections of queries, keys and values included",
        build=_longformer,
    ),
    Peer(
        name="transformers BigBird",
        package="transformers",
        causal=False,
        ours="bigbird",
        note="blocks of 64, 3 random, its projections of queries, keys and values included",
        build=_bigbird,
    ),
)

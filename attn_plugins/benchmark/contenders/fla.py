import os
from dataclasses import dataclass
from typing import Literal

from torch.nn.functional import elu

from attn_plugins.benchmark.contenders import (
    Contender,
    ContenderConfig,
    LeftOutError,
    register_contender,
    through_interface,
)


@register_contender("fla")
class FlashLinearAttention(Contender):
    """Kernels of flash-linear-attention on a model's own queries, keys and values, by transformers' AttentionInterface.

    ``attn`` is its softmax attention with a causal window, ``linear_attn`` its linear attention on the features elu + 1
    of Katharopoulos et al., each head's sum divided by that of its weights. Its layers, with projections and gates of
    their own, are for models that are trained from scratch. The kernels need a GPU, or Triton's interpreter.
    """

    package, distribution, install = "fla", "fla-core", "pip install flash-linear-attention"
    what = "kernels of flash-linear-attention, through transformers' AttentionInterface"
    limits = "it is put into a model in memory, which no checkpoint would tell of, and is called without a cache"

    @dataclass(frozen=True, kw_only=True)
    class Config(ContenderConfig):
        op: Literal["attn", "linear_attn"] = "attn"
        window_size: int | None = 512
        """Of attn: keys that a query sees, its own with them; null for all."""

        def __post_init__(self) -> None:
            self.require(self.window_size is None or self.window_size >= 1, "window_size", "at least 1, or null")

    def ready(self, model):
        if model.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            raise LeftOutError("fla's kernels run on a GPU, and the model is on the CPU")
        self.library()
        from fla.ops.attn import parallel_attn
        from fla.ops.linear_attn import chunk_linear_attn

        def attend(q_BHND, k_BHND, v_BHND, scale):
            q_BNHD, k_BNHD, v_BNHD = (x.transpose(1, 2).contiguous() for x in (q_BHND, k_BHND, v_BHND))
            if self.config.op == "attn":
                out_BNHD = parallel_attn(q_BNHD, k_BNHD, v_BNHD, scale=scale, window_size=self.config.window_size)
            else:
                out_BNHD, _ = chunk_linear_attn(elu(q_BNHD) + 1, elu(k_BNHD) + 1, v_BNHD, scale=1.0)
            return out_BNHD.transpose(1, 2)

        return through_interface(model, self, attend)

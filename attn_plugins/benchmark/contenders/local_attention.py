from dataclasses import dataclass

from attn_plugins.benchmark.contenders import Contender, ContenderConfig, register_contender, through_interface


@register_contender("local_attention")
class LocalAttention(Contender):
    """lucidrains' local-attention: an exact causal window in blocks, through transformers' AttentionInterface.

    Its rotary positions are left out, since the model has turned queries and keys. It has no cache and reads a padding
    mask over blocks alone, so decoding and padded rows are left out.
    """

    package, distribution, install = "local_attention", "local-attention", "pip install local-attention"
    what = "local-attention's causal window, through transformers' AttentionInterface"
    limits = "it is put into a model in memory, which no checkpoint would tell of, and has no form for a cache"

    @dataclass(frozen=True, kw_only=True)
    class Config(ContenderConfig):
        window_size: int = 512
        """Keys that a query sees, its own with them, which the package does not count."""

        def __post_init__(self) -> None:
            self.require(self.window_size >= 2, "window_size", "at least 2")

    def ready(self, model):
        size = {"window_size": self.config.window_size - 1, "look_backward": 1, "exact_windowsize": True}
        window = self.library().LocalAttention(causal=True, autopad=True, use_rotary_pos_emb=False, **size)

        def attend(q_BHND, k_BHND, v_BHND, scale):
            window.scale = scale
            return window(q_BHND.contiguous(), k_BHND.contiguous(), v_BHND.contiguous())

        return through_interface(model, self, attend)

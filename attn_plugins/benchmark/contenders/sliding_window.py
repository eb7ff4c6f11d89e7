from dataclasses import dataclass, field

from attn_plugins.benchmark.contenders import Contender, ContenderConfig, LeftOutError, register_contender
from attn_plugins.export.families import FAMILIES, windows_in
from attn_plugins.export.native import native_model


@register_contender("sliding_window")
class SlidingWindow(Contender):
    """transformers' own sliding window: the model of the config that says it (``sliding_window``, ``layer_types``).

    Of a family without windows, a twin that has the same modules under the same names takes the weights: Llama's are
    Mistral's, or Ministral's where some layers see all. Where a layer has a window of its own, the narrower one counts.
    Masks, caches of the window's size and generation are transformers'.
    """

    package, distribution, install = "transformers", None, "pip install transformers"
    what = "transformers' own sliding window, said by the config of the model's family or of a twin"
    measures = ("evaluate", "finetune", "speed", "memory", "cache", "decode", "step")
    limits = "a config says the window, which brings no weights, and what is counted on paper is of this package's own"

    @dataclass(frozen=True, kw_only=True)
    class Config(ContenderConfig):
        window_size: int = 512
        """Keys that a query sees, its own with them."""
        full_layers: list[int] = field(default_factory=list)
        """Layers, from 0, that stay as they are."""

        def __post_init__(self) -> None:
            self.require(self.window_size >= 2, "window_size", "at least 2")  # its cache keeps all keys of one of 1

    def ready(self, model):
        windows = windows_in(model.config)
        family = model.config.model_type
        if not windows:
            raise LeftOutError(f"no windows of {family} are known here; known: {', '.join(FAMILIES)}")
        wrong = [layer for layer in self.config.full_layers if not 0 <= layer < len(windows)]
        if wrong:
            raise ValueError(f"full_layers has {wrong}; allowed: 0 to {len(windows) - 1}")
        for layer in set(range(len(windows))) - set(self.config.full_layers):
            windows[layer] = min(self.config.window_size, windows[layer] or self.config.window_size)
        try:
            return native_model(model, windows)
        except ValueError as error:
            raise LeftOutError(str(error)) from error

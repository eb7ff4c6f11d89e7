"""Sizes of the heads that an attention serves, and which of a module's they are."""

import dataclasses
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class HeadShape:
    """Sizes of the heads that an attention serves. Attentions without weights of their own may ignore it."""

    num_heads: int
    """Query heads, H."""
    num_key_value_heads: int
    """Key/value heads, G; H is a multiple of it."""
    head_dim: int
    """Size of one query or key, D."""
    value_dim: int
    """Size of one value, V."""
    grid_size: tuple[int, int] | None = None
    """Rows and columns of an image's patches, where the model's config tells them; an image may have others."""
    hidden_size: int | None = None
    """Size E of the hidden states that queries are made of; None where it is not known."""
    layer: int | None = None
    """Number of the layer, from 0 in its stack, as in ``layers`` of a rule; None where the heads are of no model."""
    layers: int | None = None
    """How many layers its stack has; None where the heads are of no model."""
    prefix_tokens: int | None = None
    """Tokens that stand before the rest in every input of an encoder, such as [CLS] and registers; None where attention
    is causal, or the heads are of no model."""
    first_head: int = 0
    """Number of the first of the query heads among :attr:`all_heads`."""
    all_heads: int | None = None
    """Query heads of the module in all processes that share them (tensor parallelism); None where these are all."""

    def share(self, number: int, processes: int) -> "HeadShape":
        """Heads of one of the processes that share these, each as many."""
        heads, groups = self.num_heads // processes, self.num_key_value_heads // processes
        first, total = number * heads, self.num_heads
        return dataclasses.replace(self, num_heads=heads, num_key_value_heads=groups, first_head=first, all_heads=total)

    def known_hidden_size(self, attention: str) -> int:
        """:attr:`hidden_size`, for weights of the attention of this name.

        Raises:
            ValueError: it is not known.
        """
        if self.hidden_size is None:
            raise ValueError(
                f"attention {attention!r} has weights of the size of hidden states, which is not known here"
            )
        return self.hidden_size

from dataclasses import dataclass
from typing import ClassVar

from attn_plugins.data.synthetic.listops import TOKENS, listops_rows
from attn_plugins.tasks import TrainableTask, register_task
from attn_plugins.tasks.token_classes import TokenClasses


@register_task("listops")
class ListOps(TokenClasses, TrainableTask):
    """ListOps: nested lists of digits, each with its least, greatest, median or sum (its last digit) asked for.

    Nangia and Bowman 2018 (arXiv:1804.06028), as in the Long Range Arena (Tay et al. 2020, arXiv:2011.04006), on rows
    that the task makes: the class is the digit that comes of the whole, which depends on tokens all over the row.
    """

    columns: ClassVar[tuple[str, ...]] = ()

    @dataclass(frozen=True, kw_only=True)
    class Config(TokenClasses.Config):
        min_length: int = 512
        """Tokens in a row, at least."""
        max_length: int = 1024
        """Tokens in a row, at most."""
        max_depth: int = 10
        """Lists within each other, at most."""
        max_args: int = 10
        """Arguments of a list, at most."""
        train_rows: int = 4000
        """Rows to train on."""
        rows: int = 500
        """Held-out rows that are measured."""
        seed: int = 0
        """Of the rows; a held-out one is never among those to train on, whatever the seeds."""

        def __post_init__(self) -> None:
            super().__post_init__()
            self.require(self.max_length >= 8, "max_length", "at least 8")
            self.require(1 <= self.min_length <= self.max_length // 2, "min_length", "1 to half of max_length")
            self.require(self.max_depth >= 2, "max_depth", "at least 2")
            self.require(self.max_args >= 2, "max_args", "at least 2")
            for name in ("train_rows", "rows"):
                self.require(getattr(self, name) >= 1, name, "at least 1")
            self.require(0 <= self.seed < 2**62, "seed", "0 to 2**62 - 1")

    def labels(self, data):
        return [str(digit) for digit in range(10)]

    def size(self):
        return self.config.max_length, TOKENS

    def made(self, data, model, held_out):
        config, number = self.config, self.config.rows if held_out else self.config.train_rows
        lengths = (config.min_length, config.max_length)
        return listops_rows(number, lengths, config.max_depth, config.max_args, config.seed, held_out)

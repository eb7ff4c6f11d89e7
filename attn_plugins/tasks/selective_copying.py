from dataclasses import dataclass

import torch

from attn_plugins.data.synthetic.copying import selective_rows
from attn_plugins.data.synthetic.rows import drawn
from attn_plugins.tasks import TrainableTask, register_task
from attn_plugins.tasks.answers_task import AnswersTask, upper_bounds


@register_task("selective-copying")
class SelectiveCopying(AnswersTask, TrainableTask):
    """Tokens that stand at random places among noise are to be copied in their order, without the noise.

    As in Mamba (Gu and Dao 2023, arXiv:2312.00752), after Jing et al. 2019 (arXiv:1706.02761), on rows that the task
    makes, but that each token of the copy is given those before it, as in language, and none comes twice.
    ``by_distance`` has the figures by how many tokens ago the one that is asked stood, up to the number that is named
    and more than those before.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(AnswersTask.Config):
        tokens: int = 8
        """Tokens that are to be copied."""

        def __post_init__(self) -> None:
            super().__post_init__()
            self.require(self.tokens >= 1, "tokens", "at least 1")
            least = 2 * self.tokens + 1
            self.require(self.length >= least, "length", f"at least {least}, the tokens, a separator and the copy")
            least = self.tokens + 2
            self.require(self.vocab_size >= least, "vocab_size", f"at least {least}, the tokens, separator and noise")

    def made(self, number, held_out):
        config = self.config
        rows = drawn(
            lambda some, chance: selective_rows(some, config.length, config.tokens, config.vocab_size, chance),
            number,
            seed=config.seed,
            held_out=held_out,
        )
        return {**rows, "distance": torch.bucketize(rows["distance"], torch.tensor(self.groups()["distance"]))}

    def groups(self):
        return {"distance": upper_bounds(self.config.length)}

from dataclasses import dataclass

import torch

from attn_plugins.data.synthetic.copying import induction_rows
from attn_plugins.data.synthetic.rows import drawn
from attn_plugins.tasks import TrainableTask, register_task
from attn_plugins.tasks.answers_task import AnswersTask, upper_bounds


@register_task("induction")
class Induction(AnswersTask, TrainableTask):
    """An induction head's work: a token that stood once among random ones comes again, and what followed it is asked.

    As in H3 (Fu et al. 2022, arXiv:2212.14052), after Olsson et al. 2022 (arXiv:2209.11895), on rows that the task
    makes. One thing is to be kept, and all else forgotten; ``by_distance`` has the figures by how long, up to so many
    tokens as are named and more than those before.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(AnswersTask.Config):
        def __post_init__(self) -> None:
            super().__post_init__()
            self.require(self.length >= 4, "length", "at least 4")
            self.require(self.vocab_size >= 3, "vocab_size", "at least 3")

    def made(self, number, held_out):
        config = self.config
        rows = drawn(
            lambda some, chance: induction_rows(some, config.length, config.vocab_size, chance),
            number,
            seed=config.seed,
            held_out=held_out,
        )
        return {**rows, "distance": torch.bucketize(rows["distance"], torch.tensor(self.groups()["distance"]))}

    def groups(self):
        return {"distance": upper_bounds(self.config.length)}

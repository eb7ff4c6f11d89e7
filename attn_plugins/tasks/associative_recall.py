from dataclasses import dataclass, field

import torch

from attn_plugins.data.synthetic.recall import recall_pairs
from attn_plugins.data.synthetic.rows import Draw, drawn, joined
from attn_plugins.tasks import TrainableTask, register_task
from attn_plugins.tasks.answers_task import AnswersTask, upper_bounds


@register_task("associative-recall")
class AssociativeRecall(AnswersTask, TrainableTask):
    """Multi-query associative recall: keys with their values, and then each key again: which value was its?

    As in Zoology (Arora et al. 2023, arXiv:2312.04927), on rows that the task makes: the pairs stand at the beginning,
    the questions after them, mostly soon. ``by_pairs`` has the figures by how many pairs a row tells, which is what a
    state of fixed size has to hold; ``by_distance`` by how many tokens before the question the key stood, up to the
    number that is named and more than the one before it.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(AnswersTask.Config):
        pairs: list[int] = field(default_factory=lambda: [4, 8, 16])
        """Pairs that a row tells; as many rows of each."""
        power: float = 0.01
        """Of the law by which questions come: the smaller, the sooner after the pairs; 1 is anywhere alike."""

        def __post_init__(self) -> None:
            super().__post_init__()
            apart = len(set(self.pairs)) == len(self.pairs) > 0
            self.require(apart and min(self.pairs) >= 1, "pairs", "at least one number, from 1, each once")
            most = max(self.pairs)
            self.require(self.length >= 4 * most, "length", f"at least {4 * most}, four times the most pairs")
            self.require(self.vocab_size >= 2 * most, "vocab_size", f"at least {2 * most}, twice the most pairs")
            self.require(self.power > 0, "power", "above 0")

    def made(self, number, held_out):
        parts = []
        for at, pairs in enumerate(self.config.pairs):
            its = number // len(self.config.pairs) + (at < number % len(self.config.pairs))
            rows = drawn(self._draw(pairs), its, seed=self.config.seed, held_out=held_out)
            parts.append({**rows, "pairs": torch.full((its, 1), at)})
        rows = joined(parts)
        return {**rows, "distance": torch.bucketize(rows["distance"], torch.tensor(self.groups()["distance"]))}

    def _draw(self, pairs: int) -> Draw:
        length, vocab_size, power = self.config.length, self.config.vocab_size, self.config.power
        return lambda number, chance: recall_pairs(number, length, pairs, vocab_size, power, chance)

    def groups(self):
        return {"pairs": self.config.pairs, "distance": upper_bounds(self.config.length)}

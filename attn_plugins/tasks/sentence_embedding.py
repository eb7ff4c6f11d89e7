from dataclasses import dataclass, field

import torch

from attn_plugins.tasks import TrainableTask, register_task
from attn_plugins.tasks.sentence_pairs import SentencePairs, embeddings


@register_task("sentence-embedding")
class SentenceEmbedding(SentencePairs, TrainableTask):
    """How well the other text of a pair is found among those of all pairs, by the cosine of their embeddings.

    ``mrr`` is the mean of 1 / rank of a text's own pair among the ``candidates``, ``recall_at_1`` the share of texts
    whose pair comes first. Of equals the own comes last, so that embeddings that are all the same find nothing; a text
    that has several pairs is not held to account for the others. More candidates make it harder.

    Trained with in-batch negatives (Henderson et al. 2017, https://arxiv.org/abs/1705.00652, in sentence-transformers
    MultipleNegativesRankingLoss): of all second texts of a batch, the own is to be the nearest.
    """

    metric, columns = "mrr", ("text", "text_pair")

    @dataclass(frozen=True, kw_only=True)
    class Config(SentencePairs.Config):
        recall_at: list[int] = field(default_factory=lambda: [1, 10])
        """Also the shares of texts whose pair is among the nearest so many."""
        scale: float = 20.0
        """What cosines are multiplied by in the loss: 1 / temperature."""

        def __post_init__(self) -> None:
            super().__post_init__()
            self.require(all(number >= 1 for number in self.recall_at), "recall_at", "numbers from 1")
            self.require(self.scale > 0, "scale", "greater than 0")

    def loss(self, losses, model):
        return losses.MultipleNegativesRankingLoss(model, scale=self.config.scale)

    def make_trainer(self, **parts):
        rows, data = parts["args"].per_device_train_batch_size, parts["train_dataset"]
        if hasattr(data, "__len__"):  # which a stream has not
            rows = min(rows, len(data))
        if rows < 2:
            raise ValueError(
                f"batches of {rows} pair have no other to tell a text's own from; allowed: at least 2 rows, and "
                "per_device_train_batch_size at least 2"
            )
        return super().make_trainer(**parts)

    def prepare(self, data, processing, model):
        batches = super().prepare(data, processing, model)
        found = len({other for batch in batches for _, other in batch["rows"]})
        if found < 2:
            raise ValueError(
                f"the held-out rows have {found} different second texts; allowed: at least 2 to choose from"
            )
        return batches

    def finish(self, sums):
        vectors, rows = embeddings(sums)
        texts, others = torch.tensor(rows).unbind(1)
        candidates, own = others.unique(return_inverse=True)
        right: dict[int, list[int]] = {}
        for text, place in zip(texts.tolist(), own.tolist(), strict=True):
            right.setdefault(text, []).append(place)
        ranks = []
        for part in torch.arange(len(rows)).split(1024):
            likeness = vectors[texts[part]] @ vectors[candidates].T
            wanted = likeness.gather(1, own[part, None])
            for row, text in zip(likeness, texts[part].tolist(), strict=True):
                row[right[text]] = -torch.inf
            ranks.append(1 + (likeness >= wanted).sum(1))
        rank = torch.cat(ranks).double()
        return {
            "mrr": float((1 / rank).mean()),
            **{f"recall_at_{number}": float((rank <= number).double().mean()) for number in self.config.recall_at},
            "candidates": len(candidates),
            "rows": len(rows),
        }

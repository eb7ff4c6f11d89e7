from dataclasses import dataclass
from typing import Literal

from attn_plugins.config.extras import need
from attn_plugins.tasks import TrainableTask, register_task
from attn_plugins.tasks.sentence_pairs import SentencePairs, embeddings


@register_task("sentence-similarity")
class SentenceSimilarity(SentencePairs, TrainableTask):
    """Spearman's correlation of the cosine of two texts' embeddings with the score of the two; and Pearson's.

    Any scale of scores will do where higher is more alike. 0 where all cosines are the same.
    """

    metric, columns = "spearman", ("text", "text_pair", "score")

    @dataclass(frozen=True, kw_only=True)
    class Config(SentencePairs.Config):
        loss: Literal["cosent", "cosine"] = "cosent"
        """cosent: pairs are to come in the order of their scores (CoSENTLoss). cosine: the cosine is to be the score,
        which is from -1 to 1 (CosineSimilarityLoss)."""

    def loss(self, losses, model):
        made = losses.CoSENTLoss if self.config.loss == "cosent" else losses.CosineSimilarityLoss
        return made(model)

    def examples(self, data, processing, model):
        least, most = min(data["score"]), max(data["score"])
        if self.config.loss == "cosine" and not -1 <= least <= most <= 1:
            raise ValueError(f"scores from {least} to {most}; allowed with loss='cosine': -1 to 1")
        if least == most:
            raise ValueError(f"the {len(data)} rows to train on all have the score {least}; allowed: at least two")
        return super().examples(data, processing, model)

    def prepare(self, data, processing, model):
        batches = super().prepare(data, processing, model)
        scores = {score for batch in batches for *_, score in batch["rows"]}
        if len(scores) < 2:
            raise ValueError(f"the held-out rows have the scores {sorted(scores)}; allowed: at least two to compare")
        return batches

    def finish(self, sums):
        stats = need("scipy.stats", "embedding")
        vectors, rows = embeddings(sums)
        first, second, scores = zip(*rows, strict=True)
        cosines = (vectors[list(first)] * vectors[list(second)]).sum(1).tolist()
        same = len(set(cosines)) == 1
        return {
            "spearman": 0.0 if same else float(stats.spearmanr(cosines, scores).statistic),
            "pearson": 0.0 if same else float(stats.pearsonr(cosines, scores).statistic),
            "rows": len(rows),
        }

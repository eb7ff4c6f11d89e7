"""ROUGE-1, 2, L and Lsum, 0 to 1, as rouge-score computes them: the mean F-measure of the rows (Lin, W04-1013)."""

import datasets
import evaluate
from rouge_score import rouge_scorer

TEXT = datasets.Value("string")
TYPES = ("rouge1", "rouge2", "rougeL", "rougeLsum")


class Rouge(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=__doc__,
            citation="https://aclanthology.org/W04-1013",
            inputs_description="predictions: texts. references: a text each, or several, of which the best counts.",
            features=[
                datasets.Features({"predictions": TEXT, "references": datasets.Sequence(TEXT)}),
                datasets.Features({"predictions": TEXT, "references": TEXT}),
            ],
        )

    def _compute(
        self,
        predictions,
        references,
        rouge_types=TYPES,
        use_aggregator=True,
        use_stemmer=False,
        split_summaries=False,
        tokenizer=None,
    ):
        """The plain mean, where the hub's module draws the rows again and again: the same in every run.

        Args:
            use_aggregator: the mean; else a list with each row's.
            use_stemmer, split_summaries, tokenizer: those of rouge_scorer.RougeScorer.
        """
        scorer = rouge_scorer.RougeScorer(
            list(rouge_types), use_stemmer=use_stemmer, split_summaries=split_summaries, tokenizer=tokenizer
        )
        rows = [
            scorer.score(wanted, got) if isinstance(wanted, str) else scorer.score_multi(wanted, got)
            for got, wanted in zip(predictions, references, strict=True)
        ]
        found = {kind: [row[kind].fmeasure for row in rows] for kind in rouge_types}
        return {kind: sum(each) / len(each) for kind, each in found.items()} if use_aggregator else found

"""chrF of a corpus, 0 to 100, as sacrebleu computes it: F-score of character n-grams (Popović, WMT 2015, W15-3049)."""

import datasets
import evaluate
import sacrebleu

TEXT = datasets.Value("string")


class Chrf(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=__doc__,
            citation="https://aclanthology.org/W15-3049",
            inputs_description="predictions: texts. references: a text each, or the same number of texts each.",
            features=[
                datasets.Features({"predictions": TEXT, "references": datasets.Sequence(TEXT)}),
                datasets.Features({"predictions": TEXT, "references": TEXT}),
            ],
        )

    def _compute(self, predictions, references, **options):
        """Options are those of sacrebleu.CHRF: char_order, word_order (2 for chrF++), beta, lowercase, ..."""
        if isinstance(references[0], str):
            references = [[text] for text in references]
        if len({len(texts) for texts in references}) != 1:
            raise ValueError("chrf takes the same number of references for each prediction")
        metric = sacrebleu.CHRF(**options)
        found = metric.corpus_score(predictions, list(zip(*references, strict=True)))
        return {
            "score": found.score,
            "char_order": found.char_order,
            "word_order": found.word_order,
            "beta": found.beta,
            "signature": str(metric.get_signature()),
        }

"""Word error rate, 0 at best, as jiwer computes it: wrong, missing and added words by words of the references."""

import datasets
import evaluate
import jiwer

TEXT = datasets.Value("string")


class Wer(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=__doc__,
            citation="https://github.com/jitsi/jiwer",
            inputs_description="predictions: texts. references: a text each.",
            features=datasets.Features({"predictions": TEXT, "references": TEXT}),
        )

    def _compute(self, predictions, references):
        return jiwer.wer(references, predictions)

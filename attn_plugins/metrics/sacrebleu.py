"""BLEU of a corpus, 0 to 100, as sacrebleu computes it (Post, https://arxiv.org/abs/1804.08771)."""

import datasets
import evaluate
import sacrebleu

TEXT = datasets.Value("string")


class Sacrebleu(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=__doc__,
            citation="https://arxiv.org/abs/1804.08771",
            inputs_description="predictions: texts. references: a text each, or the same number of texts each.",
            features=[
                datasets.Features({"predictions": TEXT, "references": datasets.Sequence(TEXT)}),
                datasets.Features({"predictions": TEXT, "references": TEXT}),
            ],
        )

    def _compute(self, predictions, references, **options):
        """Options are those of sacrebleu.BLEU: lowercase, tokenize, smooth_method, ..."""
        if isinstance(references[0], str):
            references = [[text] for text in references]
        if len({len(texts) for texts in references}) != 1:
            raise ValueError("sacrebleu takes the same number of references for each prediction")
        metric = sacrebleu.BLEU(**options)
        found = metric.corpus_score(predictions, list(zip(*references, strict=True)))
        return {
            "score": found.score,
            "counts": found.counts,
            "totals": found.totals,
            "precisions": found.precisions,
            "bp": found.bp,
            "sys_len": found.sys_len,
            "ref_len": found.ref_len,
            "signature": str(metric.get_signature()),
        }

"""Kinds of models: what each is loaded with, and what makes its inputs."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ModelKind:
    """What the models of a kind are loaded with, by names of classes."""

    auto: tuple[str, ...]
    """Auto classes, the first of which that knows a model's config loads it."""
    processing: str | None = "AutoTokenizer"
    """Auto class of what turns texts, pictures or sound into inputs; None where tasks make tokens themselves."""
    classes: bool = False
    """Whether its head has classes, whose names the config tells."""
    pads: bool = True
    """Whether rows are padded to the batch, so that a tokenizer without a padding token takes its end token for it."""
    library: str = "transformers"
    """Module that its classes are imported from."""


KINDS = {
    "causal-lm": ModelKind(auto=("AutoModelForCausalLM",), pads=False),
    "causal-tokens": ModelKind(auto=("AutoModelForCausalLM",), processing=None, pads=False),
    "token-classes": ModelKind(auto=("AutoModelForSequenceClassification",), processing=None, classes=True, pads=False),
    "classification": ModelKind(auto=("AutoModelForSequenceClassification",), classes=True),
    "masked-lm": ModelKind(auto=("AutoModelForMaskedLM",)),
    "token-classification": ModelKind(auto=("AutoModelForTokenClassification",), classes=True),
    "question-answering": ModelKind(auto=("AutoModelForQuestionAnswering",)),
    "image-to-text": ModelKind(auto=("AutoModelForImageTextToText",), processing="AutoProcessor"),
    "image-classification": ModelKind(
        auto=("AutoModelForImageClassification",), processing="AutoImageProcessor", classes=True, pads=False
    ),
    "text-to-text": ModelKind(auto=("AutoModelForSeq2SeqLM", "AutoModelForCausalLM")),
    "embedding": ModelKind(auto=("SentenceTransformer",), library="sentence_transformers"),
    "speech-to-text": ModelKind(auto=("AutoModelForSpeechSeq2Seq", "AutoModelForCTC"), processing="AutoProcessor"),
}
"""By the name that a task gives in ``model``."""

PEFT_TASKS = {
    "AutoModelForCausalLM": "CAUSAL_LM",
    "AutoModelForSeq2SeqLM": "SEQ_2_SEQ_LM",
    "AutoModelForSequenceClassification": "SEQ_CLS",
    "AutoModelForTokenClassification": "TOKEN_CLS",
    "AutoModelForQuestionAnswering": "QUESTION_ANS",
}
"""Auto class -> PEFT's type of task, for those that it knows."""

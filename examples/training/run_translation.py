"""Train an encoder-decoder to translate, with transformers' Seq2SeqTrainer and an attention of your choice.

    python examples/training/run_translation.py --model MODEL --data PAIRS.jsonl --output-dir out --attention local
    accelerate launch examples/training/run_translation.py --attention '{"type": "local", "roles": ["encoder"]}' ...

This is plain transformers: take it and change it. What puts another attention into the model is the import of
attn_plugins, and `attn_plugin=` where the model is loaded; what is saved comes back with it. A rule's roles choose
among encoder, decoder and cross-attention. Rows are {"translation": {"en": ..., "fr": ...}}. Beside the options here,
those of Seq2SeqTrainingArguments are taken, such as --max-steps 100 --generation-num-beams 4 --bf16. A run whose output
folder holds a checkpoint goes on from it.
"""

import json
from dataclasses import dataclass, field

import datasets
import numpy as np
import sacrebleu
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    EvalPrediction,
    HfArgumentParser,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

import attn_plugins  # noqa: F401  from here on, transformers knows the flag


@dataclass
class Arguments:
    model: str = field(metadata={"help": "A folder, or a name on the hub: BART, Marian, T5, Pegasus."})
    data: str = field(metadata={"help": "JSONL or Parquet file, or a data set on the hub."})
    subset: str | None = field(default=None, metadata={"help": "Of a data set on the hub, such as en-fr."})
    attention: str = field(default="null", metadata={"help": "A name, or a rule as JSON; null is the model's own."})
    source: str = field(default="en", metadata={"help": "Language to translate."})
    target: str = field(default="fr", metadata={"help": "Language to translate to."})
    prefix: str = field(default="", metadata={"help": "Before each source; T5: 'translate English to French: '."})
    max_source_length: int = field(default=256, metadata={"help": "Tokens; longer sources are cut."})
    max_target_length: int = field(default=256, metadata={"help": "Tokens; longer targets are cut."})
    held_out: float = field(default=0.05, metadata={"help": "Share of the rows to measure on."})


def main() -> None:
    arguments, training = HfArgumentParser((Arguments, Seq2SeqTrainingArguments)).parse_args_into_dataclasses()
    training.predict_with_generate = True
    training.generation_max_length = training.generation_max_length or arguments.max_target_length
    set_seed(training.seed)
    text = arguments.attention
    attention = json.loads(text) if text.startswith(("{", "[", "null")) else text

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForSeq2SeqLM.from_pretrained(arguments.model, attn_plugin=attention)

    def tokenize(batch: dict[str, list[dict[str, str]]]) -> dict[str, list[list[int]]]:
        sources = [arguments.prefix + row[arguments.source] for row in batch["translation"]]
        targets = [row[arguments.target] for row in batch["translation"]]
        rows = tokenizer(sources, max_length=arguments.max_source_length, truncation=True)
        wanted = tokenizer(text_target=targets, max_length=arguments.max_target_length, truncation=True)
        return {**rows, "labels": wanted["input_ids"]}

    if arguments.data.endswith((".jsonl", ".parquet")):
        reader = "json" if arguments.data.endswith(".jsonl") else "parquet"
        data = datasets.load_dataset(reader, data_files=arguments.data, split="train")
    else:
        data = datasets.load_dataset(arguments.data, arguments.subset, split="train")
    parts = data.train_test_split(arguments.held_out, seed=training.seed)
    with training.main_process_first(desc="tokenizing"):
        rows = parts.map(tokenize, batched=True, remove_columns=data.column_names)

    def figures(found: EvalPrediction) -> dict[str, float]:
        written, wanted = (
            tokenizer.batch_decode(np.where(ids == -100, tokenizer.pad_token_id, ids), skip_special_tokens=True)
            for ids in (found.predictions, found.label_ids)
        )
        scores = {"bleu": sacrebleu.corpus_bleu(written, [wanted]), "chrf": sacrebleu.corpus_chrf(written, [wanted])}
        return {name: score.score for name, score in scores.items()}

    trainer = Seq2SeqTrainer(
        model=model,
        args=training,
        train_dataset=rows["train"],
        eval_dataset=rows["test"],
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
        compute_metrics=figures,
    )
    result = trainer.train(resume_from_checkpoint=get_last_checkpoint(training.output_dir))
    trainer.save_model()
    measured = trainer.evaluate()
    trainer.log_metrics("train", result.metrics)
    trainer.log_metrics("eval", measured)
    trainer.save_metrics("eval", measured)


if __name__ == "__main__":
    main()

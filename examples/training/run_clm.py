"""Train a causal language model on the text of a file, with transformers' Trainer and an attention of your choice.

    python examples/training/run_clm.py --model MODEL --data TEXT.jsonl --output-dir out --attention local
    accelerate launch examples/training/run_clm.py --model MODEL --attention '{"type": "local", "window_size": 256}' ...

This is plain transformers: take it and change it. What puts another attention into the model is the import of
attn_plugins, and `attn_plugin=` where the model is loaded (or made); what is saved comes back with it. Beside the
options here, those of TrainingArguments are taken, such as --max-steps 100 --learning-rate 1e-4 --bf16. A run whose
output folder holds a checkpoint goes on from it.
"""

import json
import math
from dataclasses import dataclass, field
from itertools import chain

import datasets
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

import attn_plugins  # noqa: F401  from here on, transformers knows the flag


@dataclass
class Arguments:
    model: str = field(metadata={"help": "A folder, or a name on the hub."})
    data: str = field(metadata={"help": "JSONL, CSV, Parquet or text file, or a data set on the hub."})
    attention: str = field(default="null", metadata={"help": "A name, or a rule as JSON; null is the model's own."})
    column: str = field(default="text", metadata={"help": "Of the text."})
    length: int = field(default=1024, metadata={"help": "Tokens of a row."})
    held_out: float = field(default=0.05, metadata={"help": "Share of the texts to measure on."})
    from_scratch: bool = field(default=False, metadata={"help": "New weights, for the model's config."})


def read(source: str) -> datasets.Dataset:
    """The texts to train on."""
    readers = {"jsonl": "json", "json": "json", "csv": "csv", "parquet": "parquet", "txt": "text"}
    suffix = source.rpartition(".")[2]
    if suffix in readers:
        return datasets.load_dataset(readers[suffix], data_files=source, split="train")
    return datasets.load_dataset(source, split="train")


def main() -> None:
    arguments, training = HfArgumentParser((Arguments, TrainingArguments)).parse_args_into_dataclasses()
    set_seed(training.seed)
    text = arguments.attention
    attention = json.loads(text) if text.startswith(("{", "[", "null")) else text

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    if arguments.from_scratch:
        config = AutoConfig.from_pretrained(arguments.model)
        model = AutoModelForCausalLM.from_config(config, attn_plugin=attention)
    else:
        model = AutoModelForCausalLM.from_pretrained(arguments.model, attn_plugin=attention)

    def blocks(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        """Texts laid end to end, each with its end token, cut into rows of one length; the rest is left out."""
        end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
        ids = tokenizer(batch[arguments.column], add_special_tokens=False, verbose=False)["input_ids"]
        tokens = list(chain.from_iterable([*one, *end] for one in ids))
        whole = len(tokens) // arguments.length * arguments.length
        rows = [tokens[start : start + arguments.length] for start in range(0, whole, arguments.length)]
        return {"input_ids": rows, "labels": rows}

    parts = read(arguments.data).train_test_split(arguments.held_out, seed=training.seed)
    with training.main_process_first(desc="tokenizing"):
        rows = parts.map(blocks, batched=True, remove_columns=parts["train"].column_names)

    trainer = Trainer(
        model=model,
        args=training,
        train_dataset=rows["train"],
        eval_dataset=rows["test"],
        processing_class=tokenizer,
        data_collator=default_data_collator,
    )
    result = trainer.train(resume_from_checkpoint=get_last_checkpoint(training.output_dir))
    trainer.save_model()
    measured = trainer.evaluate()
    measured["perplexity"] = math.exp(measured["eval_loss"])
    trainer.log_metrics("train", result.metrics)
    trainer.log_metrics("eval", measured)
    trainer.save_metrics("eval", measured)


if __name__ == "__main__":
    main()

"""Fine-tune a classifier of pictures with plain transformers, and another attention by one line.

    python examples/training/run_image_classification.py --model facebook/dinov2-small --data pictures/ \\
        --attention neighborhood_2d --option kernel_size=7 --output-dir runs/pictures

``--data`` is a folder with a folder of pictures for each class, or a data set on the hub with the columns image and
label. ``attn-plugins finetune`` with configs/train/image_classification.yaml does this and more, without a script.
"""

import argparse
import json

import datasets
import numpy as np
import torch
import transformers

import attn_plugins  # noqa: F401, teaches from_pretrained the flag


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a folder, or a name on the hub")
    parser.add_argument("--data", required=True, help="a folder of pictures, or a data set on the hub")
    parser.add_argument("--attention", help="name of an attention (default: the model's own)")
    parser.add_argument(
        "--option", action="append", default=[], metavar="NAME=JSON", help="of the attention; repeat it"
    )
    parser.add_argument("--output-dir", required=True)
    parser.add_argument("--steps", type=int, default=500, help="default %(default)s")
    parser.add_argument("--batch-size", type=int, default=32, help="default %(default)s")
    parser.add_argument("--learning-rate", type=float, default=5e-5, help="default %(default)s")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    rows = datasets.load_dataset(args.data, split="train").train_test_split(test_size=0.1, seed=0)
    names = rows["train"].features["label"].names

    flag = None
    if args.attention:
        options = {name: json.loads(value) for name, _, value in (option.partition("=") for option in args.option)}
        flag = {"type": args.attention, **options}
    processor = transformers.AutoImageProcessor.from_pretrained(args.model)
    model = transformers.AutoModelForImageClassification.from_pretrained(
        args.model,
        id2label=dict(enumerate(names)),
        label2id={name: number for number, name in enumerate(names)},
        ignore_mismatched_sizes=True,  # of a head with other classes
        attn_plugin=flag,  # the one line
    )

    def inputs(batch: dict[str, list]) -> dict[str, list]:
        """Pictures are decoded as batches ask for them."""
        pictures = [picture.convert("RGB") for picture in batch["image"]]
        return {**processor(pictures, return_tensors="pt"), "labels": batch["label"]}

    def collate(examples: list[dict]) -> dict[str, torch.Tensor]:
        pictures = torch.stack([example["pixel_values"] for example in examples])
        return {"pixel_values": pictures, "labels": torch.tensor([example["labels"] for example in examples])}

    def accuracy(predicted: transformers.EvalPrediction) -> dict[str, float]:
        return {"accuracy": float(np.mean(predicted.predictions.argmax(-1) == predicted.label_ids))}

    trainer = transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(
            output_dir=args.output_dir,
            max_steps=args.steps,
            per_device_train_batch_size=args.batch_size,
            per_device_eval_batch_size=args.batch_size,
            learning_rate=args.learning_rate,
            warmup_steps=args.steps // 10,
            dataloader_pin_memory=torch.accelerator.is_available(),
            remove_unused_columns=False,  # "image" is no argument of the model, and what inputs are made of
            report_to="none",
        ),
        train_dataset=rows["train"].with_transform(inputs),
        eval_dataset=rows["test"].with_transform(inputs),
        data_collator=collate,
        processing_class=processor,
        compute_metrics=accuracy,
    )
    trainer.train()
    figures = trainer.evaluate()
    trainer.save_model()
    print(f"accuracy {figures['eval_accuracy']:.4f} of {len(rows['test'])} pictures, saved in {args.output_dir}")


if __name__ == "__main__":
    main()

"""A fine-tune on a stream: what Trainer is told of rows whose number nobody knows."""

from typing import Any

from attn_plugins.config.extras import need
from attn_plugins.data.stream import Stream
from attn_plugins.tasks import TrainableTask
from attn_plugins.training.processes import asked_for


def check_steps_known(streaming: bool, training: dict[str, Any]) -> None:
    """Raise a ValueError where nothing says when a fine-tune on a stream ends."""
    steps = training.get("max_steps")
    if streaming and (steps is None or steps < 1):
        raise ValueError(
            "data.streaming reads rows whose number nobody knows, and training.max_steps has to say how many steps to "
            f"train; got {steps}, allowed: at least 1"
        )


def read_by_each(accelerator: Any) -> None:
    """Have each process read its own share of a stream.

    Accelerate would have one read and hand out parts of its batches, which can't be where these are padded to several
    lengths, or are one row of the model.

    Args:
        accelerator: ``accelerator_config`` of TrainingArguments.

    Raises:
        ValueError: one process was asked to read for all, or several to read the same.
    """
    if asked_for("PARALLELISM_CONFIG"):
        raise ValueError(
            "accelerate was asked for a parallelism config, by which several processes work on the same rows; allowed "
            "with data.streaming: data parallelism alone"
        )
    for name in ("dispatch_batches", "split_batches"):
        if getattr(accelerator, name):
            raise ValueError(f"training.accelerator_config.{name}=true; allowed with data.streaming: false")
    accelerator.dispatch_batches = False


def classes(trained: TrainableTask, train: Any) -> list[str] | None:
    """Names of the classes that the rows to train on have; of a stream, its first. ValueError as ``trained.labels``."""
    if not isinstance(train, Stream):
        return trained.labels(train)
    try:
        return trained.labels(train.first)
    except ValueError as error:
        raise ValueError(f"{error}; of a stream, the first chunk_rows={train.chunk_rows} tell the classes") from error


def endless(
    trained: TrainableTask, train: Stream, processing: Any, model: Any, arguments: Any, *, first: Any, seed: int
) -> Any:
    """Examples of a stream without end, of which each process and each worker of its DataLoader reads a share.

    Args:
        arguments: Trainer's.
        first: examples of the first rows.
    """
    made_by_trainer = trained.collator(processing, model) is None  # of columns, which it has to know
    return train.examples(
        lambda rows: trained.examples(rows, processing, model),
        seed=seed,
        shares=arguments.world_size * max(1, arguments.dataloader_num_workers),
        features=first.features if made_by_trainer else None,
    )


def train_no_more(trainer: Any) -> None:
    """Give Trainer rows of a known number instead of a stream, which it would begin anew after the last step."""
    if not hasattr(trainer.train_dataset, "__len__"):
        columns = next(iter(trainer.train_dataset))
        trainer.train_dataset = need("datasets", "train").Dataset.from_dict({name: [0] for name in columns})

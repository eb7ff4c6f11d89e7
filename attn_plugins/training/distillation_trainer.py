"""Trainer that distils a swapped model from itself."""

from typing import Any

from transformers import Trainer

from attn_plugins.training.distillation import Distilled, distillation_loss


class DistillationTrainer(Trainer):
    """Trainer whose loss is :func:`distillation_loss`."""

    def __init__(self, *args: Any, loss: Distilled, temperature: float, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.distilled: Any = {"loss": loss, "temperature": temperature}
        self.model_accepts_loss_kwargs = False  # a mean over a batch: Trainer divides it by the batches of a step

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        unwrapped = self.accelerator.unwrap_model(model)
        loss, outputs = distillation_loss(unwrapped, inputs, call=model, **self.distilled)
        return (loss, outputs) if return_outputs else loss

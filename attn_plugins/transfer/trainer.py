"""Stage 1 on transformers' Trainer: each layer's slot gets the gradient of its own error while the model runs."""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import transformers
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.utils.data import DataLoader, IterableDataset

from attn_plugins.core.attention import Attention
from attn_plugins.hf.names import SLOT
from attn_plugins.hf.observe import Observed, own_attention
from attn_plugins.transfer.body import heads_that_learn, run_body
from attn_plugins.transfer.errors import (
    Error,
    Loss,
    choice_error,
    computed_in,
    output_error,
    real_queries,
    weights_error,
)


class NewWeights(nn.Module):
    """The slots of a model alone, under the names that their weights have in the model."""

    def __init__(self, slots: Mapping[str, Attention]):
        super().__init__()
        for path, slot in slots.items():
            here: nn.Module = self
            for name in path.split("."):
                if name not in here._modules:
                    here.add_module(name, nn.Module())
                here = here.get_submodule(name)
            here.add_module(SLOT, slot)

    def forward(self) -> None:
        """Nothing is called by way of this: the model around calls the slots."""


class Rounds(IterableDataset):
    """Batches over and over, of which this process takes every n-th, from its own number on."""

    def __init__(self, batches: Iterable[Mapping[str, Any]], process: int, processes: int):
        self.batches, self.process, self.processes = batches, process, processes

    def __iter__(self) -> Iterator[dict[str, Any]]:
        endless = itertools.chain.from_iterable(itertools.repeat(self.batches))
        return (dict(batch) for batch in itertools.islice(endless, self.process, None, self.processes))


class TransferTrainer(transformers.Trainer):
    """Trains the slots of a model that it does not know itself.

    The model runs without gradients and is nothing that Trainer would move, wrap, shard or save: checkpoints hold the
    new weights, their optimizer and schedule. Gradients are made in the layers, past the hooks with which PyTorch's
    data parallelism averages them, and are averaged here.
    """

    def __init__(
        self,
        body: Any,
        slots: Mapping[str, Attention],
        batches: Iterable[Mapping[str, Any]],
        args: transformers.TrainingArguments,
        *,
        loss: Loss,
        body_dtype: torch.dtype | None,
    ):
        super().__init__(model=NewWeights(slots), args=args)
        self.accelerator.device_placement = False
        self.body, self.slots, self.batches = body, slots, batches
        self.loss, self.body_dtype = loss, body_dtype
        self.tokens: torch.Tensor | int = 0
        """Real queries of the module that has most of them, in this process."""

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        """Slots stay where their modules are."""

    def get_train_dataloader(self) -> DataLoader:
        """The batches as they are, nothing joined or split."""
        return DataLoader(Rounds(self.batches, self.args.process_index, self.args.world_size), batch_size=None)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """One batch: gradients to all slots. Batches count alike, whichever process has them.

        Returns:
            the mean of the layers' losses.
        """
        share = 1 / self.current_gradient_accumulation_steps
        losses: list[torch.Tensor] = []
        queries: list[torch.Tensor] = []
        trained = set(self.slots.values())

        def see(observed: Observed) -> None:
            if observed.slot not in trained:
                return
            real_BQ = real_queries(observed, inputs)
            with torch.autocast(observed.query_BHQD.device.type, enabled=False), torch.enable_grad():
                error_H = self._error(observed, real_BQ).mean_H()
                loss = error_H[heads_that_learn(observed.slot, len(error_H))].mean()
                (share * loss).backward()
            losses.append(loss.detach().to(self.args.device))
            every_BQ = observed.query_BHQD[:, 0, :, 0]
            real = torch.ones_like(every_BQ, dtype=torch.bool) if real_BQ is None else real_BQ.expand_as(every_BQ)
            queries.append(real.sum().to(self.args.device))

        with own_attention(self.body, see):
            run_body(self.body, self.slots, inputs, self.body_dtype)
        if self.accelerator.sync_gradients and self.args.world_size > 1:
            self._average_gradients()
        self.tokens = self.tokens + torch.stack(queries).max()
        return share * torch.stack(losses).mean().to(torch.float32)

    def _error(self, observed: Observed, real_BQ: torch.Tensor | None) -> Error:
        """Errors of a slot on what it was shown, with gradients to its weights.

        Those of its choice, where its weights choose keys: nothing else has a gradient to them then.
        """
        error = choice_error(observed, real_BQ, computed_in(observed))
        if error is not None:
            return error
        if self.loss == "output":
            out_BQHV, _ = observed.attend(grad=True, dtype=computed_in(observed))
            return output_error(out_BQHV, observed.own_BQHV, real_BQ)
        _, weights_BHQK = observed.attend(grad=True, need_weights=True, dtype=computed_in(observed))
        assert weights_BHQK is not None
        return weights_error(weights_BHQK, observed.own_weights(), real_BQ)

    def _average_gradients(self) -> None:
        """Over the processes, all at once."""
        weights = [weight for slot in self.slots.values() for weight in slot.parameters()]
        gradients = [torch.zeros_like(w) if w.grad is None else w.grad for w in weights]
        vector_to_parameters(self.accelerator.reduce(parameters_to_vector(gradients), "mean"), gradients)
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient

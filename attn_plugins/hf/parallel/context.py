"""Rows longer than a device: each process has a part of them, and swapped attentions exchange what they need.

torch's context parallelism cuts the tensors and serves its own attention. This one does as well, in order along the
rows, and knows of the processes for swapped models: what their rows hold is read once a forward, where a model is
given it, and goes with the masks that it makes.
"""

import contextlib
import functools
import inspect
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from attn_plugins.core.mask import AttentionMask
from attn_plugins.core.part import Exchange, Part
from attn_plugins.core.registry import get_attention, list_attentions
from attn_plugins.hf.masks import packing
from attn_plugins.hf.names import BASE, ROLE, slot_of

ALONE = "give each process whole rows (data parallelism, FSDP), or choose another attention"
_entered: list[Exchange] = []
"""The contexts that are entered. Of the process and not of a thread: autograd's own threads run checkpoints again."""


@contextlib.contextmanager
def context_parallel(
    mesh: DeviceMesh,
    *,
    buffers: Sequence[torch.Tensor] | None = None,
    buffer_seq_dims: Sequence[int] | None = None,
    no_restore_buffers: set[torch.Tensor] | None = None,
) -> Iterator[Exchange]:
    """Cut tensors along their rows, a part for each process, for models with swapped attentions inside.

    In place of ``torch.distributed.tensor.experimental.context_parallel``, with the same arguments, for models without
    swapped attentions too. Parts follow one another: torch's balancing, which gives each process a piece from the front
    and one from the back, is off, and ``context_parallel_unshard`` is to be called inside. Gradients of weights are
    those of a process's own tokens, to be added up over the processes.

    Args:
        mesh: of one dimension.
        buffers: tensors that are cut in place and put back at the end: ``input_ids``, ``position_ids``, the padding
            mask, and ``shift_labels``, which are the labels moved by one before they are cut.
        buffer_seq_dims: the dimension of each along the rows.
        no_restore_buffers: those that need not be put back.

    Yields:
        what the processes send each other: ``bytes_sent`` counts the bytes that this one has sent so far.

    Raises:
        ValueError: the mesh has more dimensions, or rows are not a multiple of the processes.
    """
    from torch.distributed.tensor.experimental import _attention as torchs

    buffers, buffer_seq_dims = list(buffers or ()), list(buffer_seq_dims or ())
    if mesh.ndim != 1:
        raise ValueError(f"the mesh has {mesh.ndim} dimensions; allowed: one, such as mesh['cp']")
    for buffer, dim in zip(buffers, buffer_seq_dims, strict=True):
        if buffer.shape[dim] % mesh.size():
            raise ValueError(
                f"rows of {buffer.shape[dim]} tokens cannot be cut into {mesh.size()} equal parts; pad them, on the "
                "right, with 0 in attention_mask and -100 in labels"
            )
    exchange, balanced = Exchange(mesh.get_group()), torchs._cp_options.enable_load_balance
    torchs._cp_options.enable_load_balance = False
    none = torch.empty(mesh.size(), device=mesh.device_type)  # torch's own takes no call without buffers
    cut: dict[str, Any] = {
        "buffers": buffers or [none],
        "buffer_seq_dims": buffer_seq_dims or [0],
        "no_restore_buffers": no_restore_buffers,
    }
    _entered.append(exchange)
    try:
        with torchs.context_parallel(mesh, **cut):
            yield exchange
    finally:
        _entered.remove(exchange)
        RUNNING[:] = [held for held in RUNNING if held[1].exchange is not exchange]  # what Ctrl-C left behind
        torchs._cp_options.enable_load_balance = balanced


def entered() -> Exchange | None:
    """The exchange of the context that is entered, or None."""
    return _entered[-1] if _entered else None


class WholeRows:
    """What a model's call, which has a part of its rows, says of the whole of them.

    Args:
        positions_BT, real_BT: position in its text of each token of this part, and which are no padding.
        given: the call's keyword arguments.
    """

    def __init__(self, exchange: Exchange, positions_BT: torch.Tensor, real_BT: torch.Tensor, given: dict[str, Any]):
        self.given = given
        self.exchange, (self.batch_size, self.length) = exchange, real_BT.shape
        told = torch.stack([positions_BT.expand_as(real_BT).long(), real_BT.long()])
        positions_BN, real_BN = torch.cat(exchange.gathered(told), dim=2)
        self.padding_BN = None if bool(real_BN.all()) else real_BN.bool()
        begins_BN = packing.fallen(positions_BN, self.padding_BN)
        self.jumps = bool(((positions_BN.diff(dim=1) != 1) & ~begins_BN[:, 1:]).any())
        """Whether positions go on within a text with another than the next."""
        self.stop = int(positions_BN.max()) + 1
        self.texts_BN = begins_BN.long().cumsum(dim=1) if bool(begins_BN.any()) else None
        self._parts: dict[tuple[bool, torch.device], Part] = {}

    def part(self, causal: bool, device: torch.device) -> Part:
        """This process's part, with the mask of all rows, for all layers of a call."""
        if (causal, device) not in self._parts:
            length = self.length * self.exchange.number
            padding, texts = (None if x is None else x.to(device) for x in (self.padding_BN, self.texts_BN))
            tables: dict[str, Any] = {"padding_BK": padding, "segments_BK": texts}
            mask = AttentionMask(self.batch_size, length, length, causal=causal, device=device, **tables)
            self._parts[causal, device] = Part(mask, self.exchange)
        return self._parts[causal, device]


RUNNING: list[tuple[nn.Module, WholeRows]] = []
"""The outermost model with swapped modules that is called in a context, while it is."""


def whole_rows() -> WholeRows | None:
    """What the running model was told."""
    return RUNNING[-1][1] if RUNNING else None


def begin(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Before a model's forward in a context: read what its part of the rows holds.

    Returns:
        its keyword arguments, without a cache, which would hold keys of a part.

    Raises:
        ValueError: it cannot be served in parts; on every process alike, and before anything has run.
    """
    exchange = entered()
    if exchange is None or RUNNING:
        return kwargs
    _refuse_model(model)
    names = _parameters(model)
    given = {name: x for name, x in {**dict(zip(names, args, strict=False)), **kwargs}.items() if x is not None}
    text = given.get("inputs_embeds", given.get("input_ids"))
    if text is None:
        raise _refusal("tokens are expected as input_ids or inputs_embeds")
    if given.get("output_router_logits", getattr(model.config, "output_router_logits", False)):
        raise _refusal("output_router_logits=True adds a loss of which experts all tokens took; allowed: False")
    for name in ("past_key_values", "cu_seq_lens_q", "cu_seq_lens_k", "seq_idx", "labels"):
        if name in given and not (name == "labels" and ("shift_labels" in given or not _is_causal(model))):
            raise _refusal(_INSTEAD.get(name, f"{name} tells of a part of the rows; tell of texts by position_ids"))
    shape = text.shape[:2]
    positions, real = given.get("position_ids"), given.get("attention_mask")
    if "position_ids" not in names:
        raise _refusal(f"{type(model).__name__} takes no position_ids, and would count each part from its beginning")
    if positions is None or positions.shape not in (shape, (1, shape[1])):
        got = "none" if positions is None else f"a tensor {tuple(positions.shape)}"
        raise _refusal(f"position_ids of shape {tuple(shape)} are needed, cut as the tokens are, got {got}")
    if real is not None and (not isinstance(real, torch.Tensor) or real.shape != shape):
        got = f"a tensor {tuple(real.shape)}" if isinstance(real, torch.Tensor) else type(real).__name__
        raise _refusal(f"attention_mask may be the padding of shape {tuple(shape)}, cut as the tokens are, got {got}")
    for name, x in given.items():
        if name not in _CHECKED and isinstance(x, torch.Tensor) and x.ndim and x.shape[:2] != shape:
            raise _refusal(f"{name} {tuple(x.shape)} has no value for each token {tuple(shape)} of the part")
    told = torch.ones(shape, dtype=torch.bool, device=text.device) if real is None else real.bool()
    rows = WholeRows(exchange, positions, told, kwargs)
    if real is None and rows.jumps:
        raise _refusal(
            "position_ids leave out or repeat some within a row, which may begin a text; where it does not, give "
            "attention_mask, of ones"
        )
    if rows.stop > (longest := _longest(model)):
        raise _refusal(
            f"position_ids up to {rows.stop - 1} change the rotary frequencies of {type(model).__name__} in all of the "
            f"row, and a part does not see that; allowed: rows of {longest} tokens; {ALONE}"
        )
    RUNNING.append((model, rows))
    return {**kwargs, "use_cache": False} if "use_cache" in names else kwargs


def end(model: nn.Module, output: Any) -> None:
    """After it, also after an error.

    Raises:
        ValueError: what it gives is not of each token: a head has pooled what it found in a part.
    """
    if not RUNNING or RUNNING[-1][0] is not model:
        return
    rows = RUNNING.pop()[1]
    given = output.items() if isinstance(output, dict) else enumerate(output) if isinstance(output, tuple) else ()
    for name, x in given:
        if isinstance(x, torch.Tensor) and x.ndim and x.shape[:2] != (rows.batch_size, rows.length):
            raise _refusal(
                f"output {name} {tuple(x.shape)} of {type(model).__name__} is not one for each token: it was made of a "
                "part"
            )


_CHECKED = ("position_ids", "attention_mask", "num_items_in_batch")
_INSTEAD = {
    "past_key_values": "a cache would hold the keys of a part; call the model without past_key_values",
    "labels": "labels are moved by one within a part, whose last token has its label in the next; give shift_labels, "
    "which are the labels moved by one before they are cut",
}


def _mixes(module: nn.Module) -> bool:
    """Whether tokens meet their neighbours in a module that is no attention."""
    kernel = getattr(module, "kernel_size", 1) if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) else 1
    return isinstance(module, nn.RNNBase) or kernel not in (1, (1,), (1, 1), (1, 1, 1))


def _longest(model: nn.Module) -> float:
    """How long rows may be for rotary angles to follow from a token's position alone (LongRoPE, dynamic ones)."""
    found = [math.inf]
    module: Any
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        for layer, kind in (kinds if isinstance(kinds, dict) else {None: kinds}).items():
            if kind == "longrope":
                told = module.config.rope_parameters
                found.append((told if layer is None else told[layer])["original_max_position_embeddings"])
            elif isinstance(kind, str) and "dynamic" in kind:
                found.append(module.original_max_seq_len)
    return min(found)


def _refusal(why: str) -> ValueError:
    return ValueError(f"in context_parallel each process has a part of the rows: {why}")


def _parameters(model: nn.Module) -> list[str]:
    return list(inspect.signature(inspect.unwrap(type(model).forward)).parameters)[1:]


def _is_causal(model: nn.Module) -> bool:
    return any(getattr(module, ROLE, None) == "decoder" for module in model.modules())


def _refuse_model(model: nn.Module) -> None:
    config: Any = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False) or config.get_text_config() is not config:
        raise _refusal(f"{type(model).__name__} has sequences of more than one kind; {ALONE}")
    if getattr(config, "token_dropout", False):
        raise _refusal(f"token_dropout of {type(model).__name__} counts the masked tokens of a row; allowed: False")
    mixing = {"linear_attention"} & set(getattr(config, "layer_types", None) or ())
    mixing |= {type(module).__name__ for module in model.modules() if _mixes(module)}
    if mixing:
        raise _refusal(f"{', '.join(sorted(mixing))} of {type(model).__name__} mixes tokens too; {ALONE}")
    for path, module in model.named_modules():
        if getattr(module, ROLE, None) == "cross":
            raise _refusal(f"{path} attends to another sequence; {ALONE}")
        if hasattr(module, BASE) and (slot := slot_of(module)) is not None:
            _refuse_attention(path, slot)


def _refuse_attention(path: str, slot: Any) -> None:
    serve = [name for name in list_attentions() if get_attention(name).in_parts]
    if not slot.in_parts:
        options = f"({slot.extra_repr()})" if slot.name in serve else ""
        raise _refusal(
            f"attention {slot.name!r}{options} of {path} cannot attend there; those that can: {', '.join(serve)}"
        )
    if slot.backend not in ("auto", "torch", "batched"):
        raise _refusal(f"backend={slot.backend!r} of {path} is not served there; allowed: 'auto', 'torch', 'batched'")


def causal_loss(original: Any, *args: Any, **kwargs: Any) -> Any:
    """Around transformers' loss of next tokens, which a model's forward reaches past :func:`begin` if called as such.

    Raises:
        ValueError: it would move labels of a part.
    """
    if entered() is None:
        return original(*args, **kwargs)
    if inspect.signature(original).bind(*args, **kwargs).arguments.get("shift_labels") is None:
        raise _refusal(_INSTEAD["labels"])
    return original(*args, **kwargs)


def loss_of_rows(original: Any, *args: Any, **kwargs: Any) -> Any:
    """The same around losses of a row's class and of spans in it.

    Raises:
        ValueError: a part is not a row.
    """
    if entered() is not None:
        raise _refusal(f"{original.__name__} is a loss of whole rows; {ALONE.split(',')[0]}")
    return original(*args, **kwargs)


LOSSES = {
    "ForCausalLMLoss": causal_loss,
    "ForSequenceClassificationLoss": loss_of_rows,
    "ForQuestionAnsweringLoss": loss_of_rows,
}
"""Losses of transformers.loss.loss_utils, and what goes around them."""


def prepare_accelerator(original: Any, accelerator: Any, *prepared: Any) -> Any:
    """In place of accelerate's function, whose hooks take masks away, which swapped modules need, and whose context is
    torch's own: once a model with swapped modules is prepared, the context is :func:`context_parallel`.
    """
    swapped = [one for one in prepared if isinstance(one, nn.Module) and _has_slots(one)]
    ours = getattr(getattr(accelerator, "_cp_context", None), "func", None) is context_parallel
    original(accelerator, *(one for one in prepared if all(one is not model for model in swapped)))
    if swapped or ours:
        accelerator._cp_context = functools.partial(context_parallel, mesh=accelerator.torch_device_mesh["cp"])
    return prepared


def prepare_inputs(original: Any, trainer: Any, model: Any, inputs: Any) -> Any:
    """In place of Trainer's function, which asks the model for nothing but whether its attention is torch's.

    Raises:
        ValueError: Trainer would compute with labels or logits of a part as if they were of whole rows.
    """
    config = getattr(trainer.accelerator, "parallelism_config", None)
    if config is not None and config.cp_enabled and _has_slots(model):
        if trainer.label_smoother is not None:
            raise _refusal("label_smoothing_factor moves labels by one within a part; allowed: 0")
        if trainer.compute_metrics is not None and not model.training:
            raise _refusal("compute_metrics would get logits of parts; evaluate without it, or in one process")
    return original(trainer, None if _has_slots(model) else model, inputs)


def predict(
    original: Any, trainer: Any, model: Any, inputs: Any, prediction_loss_only: bool, *args: Any, **kw: Any
) -> Any:
    """Around Trainer's step of an evaluation.

    Raises:
        ValueError: it would put logits of parts below each other, as if they were of other rows.
    """
    config = getattr(trainer.accelerator, "parallelism_config", None)
    if config is not None and config.cp_enabled and _has_slots(model) and not prediction_loss_only:
        raise _refusal("predict() and compute_metrics would get logits of parts; evaluate without them")
    return original(trainer, model, inputs, prediction_loss_only, *args, **kw)


def _has_slots(model: nn.Module) -> bool:
    return any(slot_of(module) is not None for module in model.modules())

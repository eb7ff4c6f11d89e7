"""The size that pictures get, and whether a model takes it: its positions are those of the size it was trained on."""

import copy
import inspect
from typing import Any

import torch
from transformers import PreTrainedModel

from attn_plugins.data.pictures import pixels, set_size

INTERPOLATE = "interpolate_pos_encoding"
"""What models whose positions are interpolated on demand take; others always do, or have none of the picture."""


def sized(processing: Any, model: Any, image_size: int | None, *, save: bool = False) -> tuple[Any, dict[str, Any]]:
    """A processor that makes pictures of one size, and what the model is to be told with them.

    Args:
        model: that of pictures, or of a model of texts too its :func:`vision_part`.
        image_size: height and width; None for what the processor says.
        save: change the processor that was given, so that the size is saved with it, and not a copy.

    Returns:
        (processor, keyword arguments of the model).

    Raises:
        ValueError: the model takes no pictures of that size.
    """
    from PIL import Image

    if image_size is not None:
        processing = processing if save else copy.deepcopy(processing)
        set_size(processing, image_size)
    probe = pixels(processing, [Image.new("RGB", (48, 32))])
    size = tuple(probe.shape[-2:])
    model = _without_adapter(model)
    trained = getattr(getattr(model.config, "vision_config", model.config), "image_size", None)
    if trained is None or size == (tuple(trained) if isinstance(trained, (list, tuple)) else (trained, trained)):
        return processing, {}
    takes = INTERPOLATE in inspect.signature(model.forward).parameters
    told = {INTERPOLATE: True} if takes else {}
    _try(model, probe, told, size, trained)
    return processing, told


def vision_part(model: Any) -> Any:
    """The model of pictures inside a model that writes texts of them: the first part that takes pixels."""
    model = _without_adapter(model)
    parts = [part for path, part in model.named_modules() if path and isinstance(part, PreTrainedModel)]
    return next((part for part in parts if part.main_input_name == "pixel_values"), model)


def _without_adapter(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _try(model: Any, probe: torch.Tensor, told: dict[str, Any], size: tuple[int, ...], trained: Any) -> None:
    """Raise a ValueError where one picture of this size does not pass the model."""
    weight = next(model.parameters())
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            model(pixel_values=probe.to(weight.device, weight.dtype), **told)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"the model, trained on pictures of {trained} px, takes none of {size[0]} x {size[1]} px: {reason}"
        ) from error
    finally:
        model.train(was_training)

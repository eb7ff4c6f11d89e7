"""Weights that a model is to read from disk in each call (``device_map`` with "disk"), and its checkpoint has not."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.integrations.accelerate import get_device

from attn_plugins.hf.names import SLOT

FILE = "attn_plugins.safetensors"
"""In the folder for what is offloaded: what slots have that no checkpoint brought."""


def dispatch(
    original: Any, model: PreTrainedModel, quantizer: Any, places: Any, folder: Any, index: Any, buffers: bool
) -> None:
    """In place of transformers' accelerate_dispatch, which has no file to read a new weight from on disk.

    Args:
        places: the device map.
        folder: offload_folder.
        index: name of each weight on disk -> its file; None where all of them are yet to be written.
        buffers: offload_buffers.

    Raises:
        ValueError: there is something to write, and no folder.
    """
    held = {name: weight for name, weight in model.state_dict().items() if SLOT in name.split(".")}
    if not buffers:
        weights = dict(model.named_parameters())
        held = {name: weight for name, weight in held.items() if name in weights}
    if index is not None:
        new = {name: x for name, x in held.items() if name not in index and get_device(places, name) == "disk"}
        if new and folder is None:
            raise ValueError(
                f"the device map puts {next(iter(new))} on disk, and the checkpoint does not have it; pass "
                "offload_folder=..., where it can be written"
            )
        if new:
            from safetensors.torch import save_file

            file = str(Path(folder, FILE))
            save_file({name: x.detach().cpu().contiguous() for name, x in new.items()}, file)
            for name, x in new.items():
                index[name] = {"safetensors_file": file, "weight_name": name, "dtype": str(x.dtype)[6:]}
    original(model, quantizer, places, folder, index, buffers)

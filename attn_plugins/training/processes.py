"""The processes that `accelerate launch` or torchrun has started together, on GPUs or on the CPU alike."""

import os
from pathlib import Path
from typing import Any

import torch

from attn_plugins.config.extras import need
from attn_plugins.training.launch import SIZES

FULL, SHARDED = "FULL_STATE_DICT", "SHARDED_STATE_DICT"


def start_processes() -> None:
    """Join the other processes, where several were started."""
    if several() and not torch.distributed.is_initialized():
        ask_for_cpu()
        need("accelerate", "train").PartialState(cpu=in_cpu_run())


def several() -> bool:
    """Whether this process was started with others."""
    return any(int(os.environ.get(name, "1")) > 1 for name in SIZES)


def ask_for_cpu() -> bool:
    """Tell accelerate of several processes without an accelerator, each of which it would else have train alone.

    Returns:
        whether there are such processes.
    """
    here = several() and not torch.accelerator.is_available()
    if here and not asked_for("DEEPSPEED"):  # which it would leave out without a word
        os.environ.setdefault("ACCELERATE_USE_CPU", "true")
    return here


def asked_for(kind: str) -> bool:
    """Whether accelerate was asked for FSDP, DEEPSPEED or a PARALLELISM_CONFIG."""
    return os.environ.get(f"ACCELERATE_USE_{kind}", "false").lower() == "true"


def in_cpu_run() -> bool:
    """Whether accelerate was asked for the CPU."""
    return os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true", "yes")


def shard_on_cpu(arguments: Any) -> None:
    """Have FSDP where it was asked for on a CPU too: accelerate (1.15) would leave it out without a word.

    Args:
        arguments: Trainer's, before it makes an Accelerator of them.
    """
    kinds = need("accelerate.utils", "train").DistributedType
    if (arguments.fsdp or asked_for("FSDP")) and arguments.distributed_state.distributed_type == kinds.MULTI_CPU:
        arguments.distributed_state.distributed_type = kinds.MULTI_GPU  # of which it makes FSDP, on the same device


def read_whole() -> None:
    """Have each process read all weights, where FSDP was asked for and nothing is trained, so that nothing is sharded.

    With cpu_ram_efficient_loading all but the first would have none.
    """
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"


def check_kept(trainer: Any, checkpoint: str) -> None:
    """Raise a ValueError where a checkpoint was kept in another way than the one that this run would read.

    DeepSpeed keeps its optimizer in as many parts as there are processes, and reads no other number.
    """
    names = {path.name for path in Path(checkpoint).iterdir()}
    kept, asked = "each process with all weights", "each process with all weights"
    if "latest" in names:
        parts = {path.name for path in Path(checkpoint).glob("global_step*/*optim_states.pt")}
        kept = f"DeepSpeed on {len(parts)} processes"
    elif any(name.startswith("pytorch_model_fsdp") for name in names):
        kept = f"FSDP with {FULL if 'pytorch_model_fsdp.bin' in names else SHARDED}"
    if trainer.is_deepspeed_enabled:
        asked = f"DeepSpeed on {trainer.args.world_size} processes"
    elif trainer.is_fsdp_enabled:
        whole = FULL in str(trainer.accelerator.state.fsdp_plugin.state_dict_type)
        asked = f"FSDP with {FULL if whole else SHARDED}"
    if kept != asked:
        raise ValueError(
            f"{checkpoint} was written by {kept}, and this run was asked for {asked}; go on with what it was begun with"
        )


def is_main_process() -> bool:
    return (
        not (torch.distributed.is_available() and torch.distributed.is_initialized())
        or torch.distributed.get_rank() == 0
    )

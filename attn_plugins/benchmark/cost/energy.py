"""Energy of a piece of work, by the counter of an NVIDIA GPU; other devices have none that is asked here."""

import importlib
import time
from collections.abc import Callable

import torch

LEAST = 0.5
"""Seconds that are measured at least: the counter moves some ten times a second."""


def joules(run: Callable[[], None], device: torch.device) -> float | None:
    """Joules of one run of what follows another on the device, idle power included; None where no counter tells."""
    counter = energy_counter(device)
    if counter is None:
        return None
    torch.accelerator.synchronize(device)
    before, started, runs = counter(), time.perf_counter(), 0
    while runs == 0 or time.perf_counter() - started < LEAST:
        run()
        torch.accelerator.synchronize(device)
        runs += 1
    return (counter() - before) / runs


def energy_counter(device: torch.device) -> Callable[[], float] | None:
    """Joules that a device has taken so far; None where NVML (package nvidia-ml-py) does not tell."""
    if device.type != "cuda":
        return None
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        return None
    try:
        nvml.nvmlInit()
        handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except nvml.NVMLError:  # of GPUs before Volta, in parts of a GPU, in some containers
        return None
    return lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000

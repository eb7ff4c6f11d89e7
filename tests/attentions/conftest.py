"""ATTN_PLUGINS_TEST_DEVICE=cuda runs these tests on another device than the CPU."""

import os

import torch

if "ATTN_PLUGINS_TEST_DEVICE" in os.environ:
    torch.set_default_device(os.environ["ATTN_PLUGINS_TEST_DEVICE"])

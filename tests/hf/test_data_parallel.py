"""Training on two processes: each waits for a gradient to every weight, however short its texts are."""

import subprocess
import sys

import torch

WORKER = """
import sys
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

import attn_plugins as ap

folder, rank = sys.argv[1], int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
torch.manual_seed(0)
sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
model = ap.swap_attention(LlamaForCausalLM(LlamaConfig(**sizes)), "linear_window", window_size=8)
parallel = DistributedDataParallel(model)
texts = [torch.arange(5).view(1, 5), torch.arange(40).view(1, 40)]  # within the window, and beyond it
for _ in range(2):  # what was left out of the first step is an error in the second
    model.zero_grad()
    parallel(input_ids=texts[rank], labels=texts[rank]).loss.backward()
gradients = {name: weight.grad for name, weight in model.named_parameters()}
if rank == 0:
    alone = []
    for text in texts:
        model.zero_grad()
        model(input_ids=text, labels=text).loss.backward()
        alone.append({name: weight.grad for name, weight in model.named_parameters()})
    torch.save([gradients, alone], f"{folder}/gradients.pt")
dist.destroy_process_group()
"""


def test_short_texts_beside_long_ones(tmp_path):
    command = [sys.executable, "-c", WORKER, str(tmp_path)]
    first = subprocess.Popen([*command, "0"], stderr=subprocess.PIPE, text=True)
    second = subprocess.run([*command, "1"], capture_output=True, text=True, timeout=240)
    said = first.communicate(timeout=240)[1]
    assert (first.returncode, second.returncode) == (0, 0), said + second.stderr
    together, alone = torch.load(tmp_path / "gradients.pt")
    for name, gradient in together.items():
        torch.testing.assert_close(gradient, (alone[0][name] + alone[1][name]) / 2, msg=name)

"""Training on two processes: each waits for a gradient to every weight, however short its texts are."""

import programs
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
    started = [programs.start("-c", WORKER, tmp_path, rank) for rank in range(2)]
    done = [program.wait() for program in started]
    assert [one.returncode for one in done] == [0, 0], "".join(one.stderr for one in done)
    together, alone = torch.load(tmp_path / "gradients.pt")
    for name, gradient in together.items():
        torch.testing.assert_close(gradient, (alone[0][name] + alone[1][name]) / 2, msg=name)

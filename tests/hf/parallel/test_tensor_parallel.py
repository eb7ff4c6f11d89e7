"""Tensor parallelism as transformers loads it: heads shared by processes, and the weights of slots with them."""

import types

import programs
import pytest
import tiny
import torch
import transformers as tf
from torch import nn
from torch.distributed.tensor import Replicate, Shard
from transformers.distributed import DistributedConfig, mixin

import attn_plugins as ap
from attn_plugins.core.attention import Attention, HeadShape
from attn_plugins.core.registry import get_attention
from attn_plugins.hf import patches
from attn_plugins.hf.names import slot_of
from attn_plugins.hf.parallel.tensor_parallel import share

WORKER = """
import sys
import warnings
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

sys.path.insert(0, {tests!r})
import attn_plugins as ap
import tiny

folder, rank, processes = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
warnings.filterwarnings("ignore", "Passing .tp_plan. directly", FutureWarning)
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{{folder}}/store", rank=rank, world_size=processes)
given, how = tiny.inputs("llama"), {{"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}}


def load(name, **options):
    torch.manual_seed(0 if options.get("tp_plan") is None else rank)  # other draws in each process
    return AutoModelForCausalLM.from_pretrained(f"{{folder}}/{{name}}", **options)


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gradients(model):
    model(**given, labels=given["input_ids"]).loss.backward()
    return {{name: whole(weight.grad) for name, weight in model.named_parameters()}}


def assert_same(got, want, exactly=False):
    assert got.keys() == want.keys()
    bounds = {{"rtol": 0, "atol": 0}} if exactly else {{"rtol": 1e-4, "atol": 1e-5}}
    for name in want:
        both = whole(got[name]).detach(), want[name].detach()
        torch.testing.assert_close(*both, **bounds, msg=lambda why: f"{{name}}: {{why}}")


def compare(both, one):
    with torch.no_grad():
        torch.testing.assert_close(both(**given).logits, one(**given).logits, atol=1e-5, rtol=1e-5)
    for more in ({{}}, {{"cache_implementation": "static"}}):
        assert torch.equal(both.generate(**given, **how, **more), one.generate(**given, **how, **more)), more


def refused(work, *said):
    try:
        work()
    except ValueError as error:
        assert all(part in str(error) for part in said), error
    else:
        raise AssertionError("not refused")

{work}
dist.destroy_process_group()
"""

EQUAL = """
for number, flag in enumerate(FLAGS):
    one, new = load("plain", attn_plugin=flag), load("plain", attn_plugin=flag, tp_plan="auto")
    assert_same(dict(new.state_dict()), one.state_dict(), exactly=True)  # what a checkpoint lacks is drawn once
    assert str(ap.describe_attention(new)) == str(ap.describe_attention(one))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in one.named_parameters():
            if "attn_plugin" in name:
                weight.add_(0.3 * torch.randn(weight.shape, generator=generator))
    if rank == 0:
        torch.save(one.state_dict(), f"{folder}/state{number}")
    one.save_pretrained(f"{folder}/swapped{number}")
    dist.barrier()
    both = load(f"swapped{number}", tp_plan="auto")
    compare(both, one)
    assert_same(gradients(both), gradients(one))
    both.save_pretrained(f"{folder}/saved{number}")
    dist.barrier()
    assert_same(load(f"saved{number}").state_dict(), one.state_dict(), exactly=True)
"""

LIVE = """
plain = load("plain")
for flag in FLAGS:
    torch.manual_seed(0)
    one = ap.swap_attention(load("plain"), flag)
    both = load("plain", tp_plan="auto")
    torch.manual_seed(rank)
    ap.swap_attention(both, flag)
    assert_same(dict(both.state_dict()), one.state_dict(), exactly=True)
    compare(both, one)
    before = {name: id(weight) for name, weight in both.named_parameters()}
    ap.swap_attention(both, flag)  # what is there already keeps its part
    assert before == {name: id(weight) for name, weight in both.named_parameters()}
    ap.restore_attention(both)
    assert_same(dict(both.state_dict()), plain.state_dict(), exactly=True)
    with torch.no_grad():
        torch.testing.assert_close(both(**given).logits, plain(**given).logits, atol=1e-5, rtol=1e-5)
swapped = ap.swap_attention(load("plain", tp_plan="auto"), "local", window_size=4)
was = swapped(**given).logits
refused(lambda: ap.swap_attention(swapped, "linear", kv_heads=[0]), "of which it needs all in one")
assert torch.equal(swapped(**given).logits, was)
"""

GRID = """
from transformers.distributed import DistributedConfig

for flag in FLAGS:
    one, grid = load("plain", attn_plugin=flag), DistributedConfig(tp_size=2, fsdp_size=2)
    both = load("plain", attn_plugin=flag, distributed_config=grid)
    assert_same(dict(both.state_dict()), one.state_dict(), exactly=True)
    compare(both, one)
    assert_same(gradients(both), gradients(one))
    both.save_pretrained(f"{folder}/shards", distributed_checkpoint=True)
    dist.barrier()
    for other in (grid, DistributedConfig(tp_size=4)):
        again = load("shards", distributed_config=other)
        assert_same(dict(again.state_dict()), one.state_dict(), exactly=True)
"""

REFUSED = """
said = "model.layers.0.self_attn has 8 query heads and 2 key/value heads, which 4 processes cannot share"
for flag in ("local", "linear"):
    refused(lambda: load("few", attn_plugin=flag, tp_plan="auto"), said, "allowed numbers of processes: 1, 2")
some = {"type": "linear", "kv_heads": [0]}
refused(lambda: load("plain", attn_plugin=some, tp_plan="auto"), "of which it needs all in one")
"""

FLAGS = [
    {"type": "linear"},
    [{"type": "gated_delta", "gate_input": "hidden", "layers": 0}, {"type": "shifted_block", "group_size": 4}],
    [{"type": "gated_linear", "layers": [0, 1]}, {"type": "differential", "layers": 2}],
    [
        {"type": "local", "window_size": 4, "kv_heads": [0, 3]},
        {"type": "linear", "feature_map": "favor", "num_features": 8, "kv_heads": [1], "layers": [0, 1]},
    ],
]
"""Weights of queries and of keys, gates on hidden states, numbers of heads, draws, weights that all heads share, rules
for heads: of four, of which two processes have two each."""

MORE = [
    {"type": "local", "window_size": 4},
    {"type": "retention"},
    {"type": "linear", "feature_map": "taylor", "feature_dim": 3},
    {"type": "linear", "feature_map": "favor", "num_features": 8},
    {"type": "linear_window", "window_size": 4},
    {"type": "native_sparse", "kernel_size": 4, "kernel_stride": 2, "block_size": 4, "topk": 4, "gate_input": "hidden"},
    {"type": "lsh", "num_hashes": 2, "num_buckets": 4, "bucket_size": 4},
    {"type": "delta"},
    {"type": "additive", "hidden_dim": 4},
    {"type": "fastformer"},
    {"type": "stick_breaking"},
]


def save(folder, name, groups):
    config = tiny.config_of("llama")
    config.num_attention_heads, config.num_key_value_heads, config.head_dim, config.vocab_size = 8, groups, 4, 100
    torch.manual_seed(0)
    model = tf.LlamaForCausalLM(config)
    for weight in model.parameters():
        if weight.ndim > 1:
            nn.init.normal_(weight, std=0.15)
    model.save_pretrained(folder / name)


def together(folder, processes, work, flags=()):
    """Run the code in so many processes, each with all of it; what any says on its way to fail is in the error."""
    save(folder, "plain", 4)
    code = WORKER.format(tests=tiny.__file__.rpartition("/")[0], work=f"FLAGS = {flags!r}\n{work}")
    told = {"WORLD_SIZE": str(processes), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    started = [
        programs.start("-c", code, folder, rank, processes, env={**told, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(processes)
    ]
    done = [program.wait() for program in started]
    assert [one.returncode for one in done] == [0] * processes, "".join(one.stderr for one in done)


def test_two_processes_give_what_one_gives(tmp_path):
    together(tmp_path, 2, EQUAL, FLAGS)


@pytest.mark.slow
def test_two_processes_give_what_one_gives_for_more_attentions(tmp_path):
    together(tmp_path, 2, EQUAL, MORE)


@pytest.mark.slow
def test_four_processes_give_what_one_gives_or_it_is_refused_at_load(tmp_path):
    save(tmp_path, "few", 2)
    flags = [FLAGS[0], {"type": "gated_linear", "gate_input": "hidden"}, "shifted_block", FLAGS[3]]
    together(tmp_path, 4, EQUAL + REFUSED, flags)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(DistributedConfig, "dp_replicate_size"), reason="transformers has no two ways at once")
def test_heads_are_shared_by_two_processes_and_layers_sharded_by_two(tmp_path):
    """FSDP around tensor parallelism, and checkpoints of shards."""
    together(tmp_path, 4, GRID, FLAGS[1:3])


@pytest.mark.slow
def test_a_model_that_is_parallel_is_swapped_and_restored(tmp_path):
    together(tmp_path, 2, LIVE, FLAGS)


class Processes:
    """A mesh, as far as it is looked at before anything is shared."""

    ndim = 1

    def __init__(self, number):
        self.number = number

    def size(self):
        return self.number

    def get_local_rank(self):
        return 1


def parallel(processes, style="rowwise"):
    """A model of 4 query heads and 2 key/value heads that so many processes share by a plan, and a module of it."""
    model = tiny.build("llama")
    model._tp_size, model._device_mesh = processes, Processes(processes)
    model._tp_plan = {"model.layers.*.self_attn.q_proj": "colwise", "model.layers.*.self_attn.o_proj": style}
    return model, model.model.layers[0].self_attn


def attention(name, **options):
    cls = get_attention(name)
    return cls(cls.Config(**options), HeadShape(num_heads=4, num_key_value_heads=2, head_dim=8, value_dim=8))


@pytest.mark.parametrize("name", ["local", "linear"])
def test_heads_that_processes_cannot_share_are_refused(name):
    model, _ = parallel(4)
    said = r"has 4 query heads and 2 key/value heads, which 4 processes cannot share .*; allowed .*: 1, 2$"
    with pytest.raises(ValueError, match=rf"^model\.layers\.0\.self_attn {said}"):
        ap.swap_attention(model, name)
    assert all(slot_of(layer.self_attn) is None for layer in model.model.layers)


def test_heads_that_work_in_pairs_stay_together():
    model, _ = parallel(4)
    slot = attention("differential")
    slot.heads = HeadShape(num_heads=4, num_key_value_heads=4, head_dim=8, value_dim=8)
    with pytest.raises(ValueError, match=r"'differential' needs .* a multiple of 2 in each process, got 4 of model"):
        share(model, "model.layers.0.self_attn", model.model.layers[0].self_attn, slot)


class Undeclared(Attention):
    """An attention of a third party."""

    name, cost, paper = "undeclared", "", ""

    def __init__(self, heads_alike):
        heads = HeadShape(num_heads=4, num_key_value_heads=2, head_dim=8, value_dim=8)
        super().__init__(self.Config(), heads)
        self.heads_alike = heads_alike
        if heads_alike:
            self.weight = nn.Parameter(torch.zeros(4))


@pytest.mark.parametrize(("heads_alike", "why"), [(True, "has weights"), (False, "tells its heads apart")])
def test_what_declares_nothing_of_its_weights_is_refused_and_told_what_to_declare(heads_alike, why):
    model, module = parallel(2)
    with pytest.raises(ValueError, match=rf"'undeclared' {why} and does not declare which .* \(head_weights\); choose"):
        share(model, "model.layers.0.self_attn", module, Undeclared(heads_alike))


def test_slots_stay_whole_where_each_process_has_all_heads():
    """OLMo 2 gathers queries and keys, over which it takes norms; and each process of FSDP has all heads."""
    for model, module in (parallel(2, "rowwise_split_input"), parallel(1), (tiny.build("llama"), None)):
        slot = attention("linear")
        share(model, "model.layers.0.self_attn", module or model.model.layers[0].self_attn, slot)
        assert slot.heads.num_heads == 4
        assert not slot._forward_pre_hooks


def test_the_card_is_written_by_the_process_that_saves(tmp_path, monkeypatch):
    model = ap.swap_attention(tiny.build("llama"), "local")
    monkeypatch.setattr(model, "should_save_on_this_rank", lambda is_main_process: False)
    model.save_pretrained(tmp_path / "other")
    assert not (tmp_path / "other" / "README.md").exists()
    monkeypatch.undo()
    model.save_pretrained(tmp_path / "first")
    assert (tmp_path / "first" / "README.md").exists()


def test_transformers_shares_heads_by_the_function_that_is_changed():
    """Fails when transformers splits heads by another, of which slots would know nothing."""
    assert hasattr(mixin.apply_tensor_parallelism, patches._MARK)
    assert "apply_tensor_parallelism" in mixin.DistributedMixin.maybe_distribute_model.__func__.__code__.co_names


class OfAMesh(nn.Parameter):
    """A weight as another program than transformers' tensor parallelism leaves it, as far as it is looked at."""

    def __new__(cls, name, where):
        made = super().__new__(cls, torch.zeros(32, 32))
        made.device_mesh = types.SimpleNamespace(mesh_dim_names=name and (name,))
        made.placements = (where,)
        return made


def test_heads_that_another_program_has_split_are_refused_where_an_attention_needs_all():
    model = tiny.build("llama")
    module = model.model.layers[0].self_attn
    slots = {name: attention(name) for name in ("linear", "shifted_block", "local")}

    def check(mesh, where):
        module.q_proj.weight = OfAMesh(mesh, where)
        for name, slot in slots.items():
            share(model, f"layer of {name}", module, slot)

    check("dp_shard", Shard(0))  # gathered before it is used
    check("tp", Replicate())
    check(None, Shard(0))  # as fully_shard makes a mesh
    for name in ("linear", "shifted_block"):
        with pytest.raises(
            ValueError, match=rf"layer of {name} is under tensor parallelism.*only transformers' own tp_plan"
        ):
            check("tp", Shard(0))
        slots.pop(name)
    check("tp", Shard(0))

"""Stage 1 by what it may change, what it computes, and what it leaves out."""

import json
import math

import pytest
import tiny
import torch
import transformers as tf
from torch import nn

import attn_plugins as ap
from attn_plugins.hf.observe import own_attention
from attn_plugins.transfer.body import learning, run_body, slots_of
from attn_plugins.transfer.errors import measure_errors, output_error, weights_error

HEDGEHOG = {"type": "linear", "feature_map": "hedgehog"}


def llama(rules=HEDGEHOG, **changes):
    """With weights so large that attention is not the mean of all tokens."""
    torch.manual_seed(1)
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**tiny.GROUPED, initializer_range=0.4, **changes)).eval()
    return ap.swap_attention(model, rules)


def texts(count=6, rows=2, length=24, seed=0):
    chance = torch.Generator().manual_seed(seed)
    drawn = torch.randint(3, tiny.VOCABULARY, (count, rows, length), generator=chance)
    return [{"input_ids": ids, "labels": ids} for ids in drawn]


def transfer(model, batches, steps=3, **options):
    return ap.transfer_attention(model, batches, steps, progress=False, **options)


def weights_of(model):
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def learned(model, batches, **options):
    """The new weights after three steps."""
    transfer(model, batches, **options)
    return {path: torch.cat([w.flatten() for w in slot.parameters()]) for path, slot in slots_of(model).items()}


def dense_hedgehog(slot, query, key, value):
    """Causal linear attention over softmax(x W) and softmax(-x W), as its paper has it; W = I + the slot's weights."""
    eye = torch.eye(query.shape[-1], dtype=query.dtype)

    def features(x, weight):
        y = x @ (eye + weight).mT
        return torch.cat([y.softmax(-1), (-y).softmax(-1)], -1)

    groups = query.shape[1] // key.shape[1]
    keys = features(key, slot.key_weight).repeat_interleave(groups, 1)
    scores = (features(query, slot.query_weight) @ keys.mT).tril()
    weights = scores / (scores.sum(-1, keepdim=True) + 1e-6)
    return weights @ value.repeat_interleave(groups, 1), weights


@pytest.mark.parametrize("loss", ["output", "weights"])
def test_gradients_are_those_of_the_dense_definition(loss, monkeypatch):
    model = llama().double()
    batch = texts(1)[0]
    expected = {}

    def see(observed):
        slot = observed.slot
        with torch.enable_grad():
            out, weights = dense_hedgehog(slot, observed.query_BHQD, observed.key_BGKD, observed.value_BGKV)
            own = observed.own_BQHV.transpose(1, 2)
            if loss == "output":
                errors = (out - own).square().sum((2, 3)) / own.square().sum((2, 3))
            else:
                errors = -(observed.own_weights() * weights.clamp_min(1e-12).log()).sum(-1).mean(-1)
            expected[slot] = torch.autograd.grad(errors.mean(), [slot.query_weight, slot.key_weight])

    with own_attention(model, see):
        run_body(model, slots_of(model), batch)
    found = {}

    def step(optimizer, *args, **kwargs):
        for slot in slots_of(model).values():
            found[slot] = [slot.query_weight.grad.clone(), slot.key_weight.grad.clone()]

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    transfer(model, [batch], 1, loss=loss)
    assert len(found) == 3
    for slot, gradients in expected.items():
        for one, other in zip(found[slot], gradients, strict=True):
            assert other.abs().max() > 1e-5
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-8)


def test_the_error_falls_and_nothing_but_new_weights_changes():
    model = llama()
    before = weights_of(model)
    report = transfer(model, texts(), 30)
    assert report.after < report.before - 0.04
    assert [layer.learned for layer in report.layers] == [[0, 1, 2, 3]] * 3
    assert (report.steps, report.tokens, report.measured_on) == (30, 30 * 2 * 24, "the first batches")
    assert [entry["step"] for entry in report.losses] == list(range(3, 31, 3))
    for name, weight in weights_of(model).items():
        assert torch.equal(weight, before[name]) == ("attn_plugin" not in name), name


def test_each_update_is_adams_with_a_cosine_to_a_tenth():
    """No decay, no clipping over layers, whose gradients have nothing to do with each other."""
    model, batches = llama(), texts(10)
    expected = llama()
    weights = [weight for slot in slots_of(expected).values() for weight in slot.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=1e-2, weight_decay=0.0)
    for number, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (0.1 + 0.9 * (1 + math.cos(math.pi * number / 10)) / 2)

        def see(observed):
            out, _ = observed.attend(grad=True)
            with torch.enable_grad():
                output_error(out, observed.own_BQHV, None).of_BH.mean().backward()

        with own_attention(expected, see):
            run_body(expected, slots_of(expected), batch)
        optimizer.step()
        optimizer.zero_grad()
    transfer(model, batches, 10)
    for name, weight in expected.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), weight, rtol=0, atol=1e-6)


def test_held_out_batches_are_what_is_measured():
    model, held_out = llama(), texts(seed=5)
    expected = measure_errors(model, slots_of(model), held_out)
    report = transfer(model, texts(), held_out=held_out)
    assert report.measured_on == "held-out batches"
    assert {layer.path: layer.before for layer in report.layers} == expected
    assert {layer.path: layer.after for layer in report.layers} == measure_errors(model, slots_of(model), held_out)


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(fails):
    model = llama(attention_dropout=0.5).train()
    model.model.layers[1].eval()
    model.model.embed_tokens.weight.requires_grad_(False)
    next(iter(slots_of(model).values())).requires_grad_(False)
    wanted = {name: weight.requires_grad for name, weight in model.named_parameters()}
    modes = {name: module.training for name, module in model.named_modules()}
    if fails:
        with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
            transfer(model, [*texts(5), {"input_ids": None}], 6)
    else:
        transfer(model, texts())
    assert {name: weight.requires_grad for name, weight in model.named_parameters()} == wanted
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(weight.grad is None for weight in model.parameters())


def gpt2():
    torch.manual_seed(1)
    sizes = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128, "vocab_size": tiny.VOCABULARY}
    return ap.swap_attention(tf.GPT2LMHeadModel(tf.GPT2Config(**sizes, initializer_range=0.4)).eval(), HEDGEHOG)


@pytest.mark.parametrize("make", [lambda: llama(attention_dropout=0.5), gpt2])
def test_layers_are_shown_what_the_model_was_without_a_swap(make):
    """Bit for bit, without dropout (GPT-2's is in its body too), while the model trains; its head is not run."""
    model, batch = make().train(), texts(1)[0]
    states, heads = [], []
    last = model.base_model.norm if hasattr(model.base_model, "norm") else model.base_model.ln_f
    last.register_forward_hook(lambda module, args, out: states.append(out))
    model.lm_head.register_forward_hook(lambda module, args, out: heads.append(out))
    transfer(model, [batch])
    assert not heads
    own = ap.restore_attention(model.eval())(input_ids=batch["input_ids"]) and states.pop()
    assert len(states) >= 3
    for seen in states:
        assert torch.equal(seen, own)


def test_what_trains_with_checkpoints_of_activations_is_called_once():
    plain, checkpointed = llama(), llama()
    checkpointed.gradient_checkpointing_enable()
    checkpointed.train()
    for one, other in zip(learned(plain, texts()).values(), learned(checkpointed, texts()).values(), strict=True):
        assert torch.equal(one, other)
    assert checkpointed.is_gradient_checkpointing


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("loss", ["output", "weights"])
def test_padding_changes_nothing(side, loss):
    mask = torch.ones(2, 24, dtype=torch.long)
    mask[0, slice(0, 9) if side == "left" else slice(15, 24)] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    found = []
    for seed in range(2):
        batches = texts(2)
        for batch in batches:
            ids = batch["input_ids"]
            garbage = torch.randint(3, 97, ids.shape, generator=torch.Generator().manual_seed(seed))
            batch |= {"input_ids": ids.where(mask.bool(), garbage), "attention_mask": mask, "position_ids": positions}
        found.append(learned(llama(), batches, loss=loss))
    for path, weights in found[0].items():
        torch.testing.assert_close(found[1][path], weights, rtol=0, atol=1e-6)
    unmasked = learned(llama(), [{"input_ids": batch["input_ids"]} for batch in batches], loss=loss)
    assert all((unmasked[path] - found[1][path]).abs().max() > 1e-4 for path in unmasked)


def test_a_batch_is_the_mean_of_its_rows():
    """As gradients of several batches and of several processes are."""
    rows = [{"input_ids": ids[None]} for batch in texts(2) for ids in batch["input_ids"]]
    joint = [{"input_ids": torch.cat([row["input_ids"] for row in rows])}]
    accumulated = {"training": {"gradient_accumulation_steps": 4}}
    parts = learned(llama(), rows, **accumulated)
    one, other = (transfer(llama(), *given, **more) for given, more in (((rows, 1), accumulated), ((joint, 1), {})))
    assert one.losses[0]["loss"] == pytest.approx(other.losses[0]["loss"], rel=1e-4)
    for path, weights in learned(llama(), joint).items():
        torch.testing.assert_close(parts[path], weights, rtol=0, atol=2e-5)


def test_packed_texts_do_not_see_each_other():
    ids = texts(1, rows=1)[0]["input_ids"]
    positions = torch.arange(24).repeat(2)[None]
    packed = {"input_ids": ids.repeat(1, 2), "position_ids": positions, "attention_mask": None}
    (alone,), (both,) = ([transfer(llama(), [batch], 1).layers[1].before] for batch in ({"input_ids": ids}, packed))
    assert both == pytest.approx(alone, rel=1e-4)


def test_a_hybrid_trains_what_has_weights_and_says_what_has_none(transformers_log):
    model = llama([{"type": "local", "window_size": 4, "layers": [0]}, {**HEDGEHOG, "layers": [1]}])
    report = transfer(model, texts(), 5)
    assert "no weights to train in 1 of 2 slots: model.layers.0.self_attn" in transformers_log.text
    local, linear = report.layers
    assert (local.attention, local.learned, local.before) == ("local", [], local.after)
    assert (linear.attention, linear.learned) == ("linear", [0, 1, 2, 3])
    assert (linear.layer, linear.role) == (1, "decoder")
    assert report.before == pytest.approx(sum(linear.before) / 4)
    assert report.worst is linear


def test_of_a_split_module_the_heads_with_weights_learn():
    rules = [{**HEDGEHOG, "layers": [0], "kv_heads": [1]}, {"type": "local", "window_size": 4, "layers": [1]}]
    rules += [{**HEDGEHOG, "layers": [2], "kv_heads": [0]}, {"type": "local", "window_size": 4, "layers": [2]}]
    model = llama(rules)
    report = transfer(model, texts(), 20)
    own, _, both = report.layers
    assert [layer.learned for layer in report.layers] == [[2, 3], [], [0, 1]]
    assert [layer.attention for layer in report.layers] == ["linear + own", "local", "linear + local"]
    assert max(own.before[:2] + own.after[:2]) < 1e-10
    assert both.before[2:] == both.after[2:]
    assert own.mean() < own.mean("before")
    assert report.after == pytest.approx((sum(own.after[2:]) + sum(both.after[:2])) / 4)
    first = transfer(llama(rules), texts(1), 1)
    assert first.losses[0]["loss"] == pytest.approx(first.before, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_new_weights_learn_in_float32_whatever_the_body_runs_in(dtype, monkeypatch):
    model, seen = llama().to(dtype), []
    states = []
    model.model.layers[0].mlp.register_forward_hook(lambda module, args, out: states.append(out.dtype))
    step = torch.optim.AdamW.step

    def watched(optimizer, *args, **kwargs):
        seen.extend(weight.dtype for group in optimizer.param_groups for weight in group["params"])
        return step(optimizer, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    body = "bfloat16" if dtype == torch.float32 else None
    report = transfer(model, texts(), 20, body_dtype=body)
    assert set(states) == {torch.bfloat16}
    assert set(seen) == {torch.float32}
    assert {weight.dtype for weight in model.parameters()} == {dtype}
    assert report.after < report.before - 0.03
    assert model(input_ids=texts(1)[0]["input_ids"]).logits.isfinite().all()


def test_compiled_models_are_called_without_their_graphs():
    model = llama()
    transfer(torch.compile(model, backend="eager"), texts())
    expected = learned(llama(), texts())
    for path, slot in slots_of(model).items():
        assert torch.equal(torch.cat([weight.flatten() for weight in slot.parameters()]), expected[path])


def test_an_iterator_gives_as_many_batches_as_there_are_steps():
    endless = ({"input_ids": batch["input_ids"]} for number in range(1000) for batch in texts(1, seed=number))
    transfer(llama(), endless, 3)
    assert torch.equal(next(endless)["input_ids"], texts(1, seed=3)[0]["input_ids"])


def test_a_row_without_tokens_counts_for_nothing():
    own = torch.randn(2, 5, 4, 8)
    real = torch.tensor([[True] * 5, [False] * 5])
    out = torch.randn(2, 5, 4, 8, requires_grad=True)
    error = output_error(out, own, real)
    assert torch.equal(error.mean_H(), error.of_BH[0])
    error.mean_H().sum().backward()
    assert out.grad.isfinite().all()
    weights = torch.rand(2, 4, 5, 5).softmax(-1)
    entropy = weights_error(weights, weights, real)
    assert torch.equal(entropy.mean_H(), entropy.of_BH[0])


def test_what_diverges_is_not_taken_for_right():
    assert output_error(torch.full((1, 2, 1, 4), torch.nan), torch.ones(1, 2, 1, 4), None).mean_H().isnan().all()


def test_a_report_is_a_table_json_and_a_picture(tmp_path):
    report = transfer(llama(), texts(), 5)
    lines = str(report).splitlines()
    assert lines[0].split() == ["path", "attention", "before", "after", "worst", "head"]
    assert lines[1].split()[:3] == ["model.layers.0.self_attn", "linear", f"{sum(report.layers[0].before) / 4:.3f}"]
    assert json.loads(json.dumps(report.as_dict()))["after"] == report.after
    report.plot(tmp_path / "errors.png")
    assert (tmp_path / "errors.png").stat().st_size > 1000


class Broken(nn.Module):
    """Not a transformers model."""


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda: llama("local"), {}, r"nothing could learn: what is in the slots \(local\) has no weights of its own"),
        (lambda: ap.restore_attention(llama()), {}, "no attention module of this model is swapped"),
        (Broken, {}, "got a Broken; allowed: a transformers PreTrainedModel"),
        (llama, {"loss": "mse"}, "loss='mse'; allowed: output, weights"),
        (lambda: llama("gated_delta"), {"loss": "weights"}, "those of gated_delta do not; allowed here: loss='output'"),
        (llama, {"steps": 0}, "steps=0; allowed: at least 1"),
        (llama, {"learning_rate": 0.0}, "learning_rate=0.0; allowed: greater than 0"),
        (llama, {"body_dtype": "int8"}, "body_dtype='int8'; allowed: bfloat16, float16, or None"),
        (llama, {"batches": []}, "batches holds no batch"),
        (llama, {"held_out": []}, "held_out holds no batch"),
        (llama, {"batches": {"input_ids": torch.ones(1, 4)}}, "batches is one batch; allowed: an iterable of them"),
        (llama, {"training": {"max_steps": 3}}, "training.max_steps is not for a transfer; use steps"),
        (llama, {"training": {"bf16": True}}, "training.bf16 is not for a transfer; use body_dtype"),
        (llama, {"training": {"save_stps": 3}}, "save_stps"),
        (llama, {"resume": True}, "resume goes with output_dir"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_changes(make, options, message):
    model = make()
    wanted = {name: weight.requires_grad for name, weight in model.named_parameters()}
    with pytest.raises(ValueError, match=message):
        transfer(model, **{"batches": texts(1), **options})
    assert {name: weight.requires_grad for name, weight in model.named_parameters()} == wanted


def test_adapters_come_after_a_transfer():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["attn_plugin"]))
    with pytest.raises(ValueError, match=r"has adapters of PEFT; transfer comes before them"):
        transfer(model, texts(1))


def test_weights_that_are_nowhere_are_refused():
    with torch.device("meta"):
        model = llama()
    with pytest.raises(ValueError, match=r"a weight of the slot of model.layers.0.self_attn has no data"):
        transfer(model, texts(1))


def test_learning_puts_back_what_it_changed_in_half_precision():
    model = llama().bfloat16()
    before = weights_of(model)
    with learning(model, slots_of(model)):
        assert all(weight.dtype == torch.float32 for s in slots_of(model).values() for weight in s.parameters())
    for name, weight in weights_of(model).items():
        assert weight.dtype == torch.bfloat16
        assert torch.equal(weight, before[name])

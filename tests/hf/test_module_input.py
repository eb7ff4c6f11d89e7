"""Hidden states in models: each attention that wants them gets the input of its own module, however it is called."""

import copy
import threading

import adapter_cases
import pytest
import tiny
import torch
import transformers as tf
from hidden_attentions import GatedOutput, GatedSum, Pairs
from torch import nn
from transformers import DynamicCache, StaticCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import attn_plugins as ap
from attn_plugins.core import registry
from attn_plugins.hf import arguments
from attn_plugins.hf import call as calls
from attn_plugins.hf.arguments import Argument, hidden_argument
from attn_plugins.hf.caches.cache_layers import before_attention
from attn_plugins.hf.call import innermost

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*torch.jit.script.*:DeprecationWarning"
)  # DeBERTa in transformers 5.17

GREEDY = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
FLAGS = ["gated_output", "gated_sum"]


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    registry.list_attentions()
    monkeypatch.setattr(registry.ATTENTIONS, "classes", dict(registry.ATTENTIONS.classes))
    for cls in (GatedOutput, GatedSum, Pairs):
        ap.register_attention(cls.name)(cls)


def watched(model, **rule):
    """The swapped modules of a model, and what arrived at each: (module, its first argument, the hidden states)."""
    ap.swap_attention(model, {"type": "gated_output", **rule})
    found, seen = [], {}
    for row in ap.describe_attention(model):
        if row.plugin is None:
            continue
        module = model.get_submodule(row.path)

        def before(module, args, kwargs):
            name, place = hidden_argument(type(module))
            seen[module] = args[place] if place < len(args) else kwargs[name]

        def arrived(slot, args, kwargs, module=module):
            found.append((module, seen[module], kwargs["hidden"]))

        module.register_forward_pre_hook(before, with_kwargs=True)
        module.attn_plugin.register_forward_pre_hook(arrived, with_kwargs=True)
    return found


def check(model, given, **rule):
    found = watched(model, **rule)
    with torch.no_grad():
        model(**given)
    rows = [row for row in ap.describe_attention(model) if row.plugin]
    assert {id(module) for module, _, _ in found} == {id(model.get_submodule(row.path)) for row in rows}
    for module, want, got in found:
        want = want.flatten(1, 2) if want.ndim == 4 else want  # of images in rows and columns
        if hasattr(module, "hidden_given"):  # the sequence before the batch, or after the features
            want = next(x for x in (want.transpose(0, 1), want.transpose(1, 2)) if x.shape == got.shape)
        torch.testing.assert_close(got, want, rtol=0, atol=0)
        assert module.attn_plugin.heads.hidden_size == got.shape[-1]
    assert [model.get_submodule(row.path).attn_plugin.heads.layer for row in rows] == [row.layer for row in rows]
    assert innermost() is None


@pytest.mark.parametrize("name", tiny.MODELS)
def test_the_input_of_each_module_arrives(name):
    model = tiny.build(name)
    check(model, tiny.inputs(name, length=18), roles=sorted({row.role for row in ap.describe_attention(model)}))


@pytest.mark.parametrize("name", [name for name, case in adapter_cases.CASES.items() if case.in_rows])
def test_the_input_of_each_module_with_an_adapter_arrives(name):
    case = adapter_cases.CASES[name]
    cls, config = case.made()
    torch.manual_seed(0)
    check(cls._from_config(config).eval(), case.given())


def test_queries_that_come_after_values_and_keys():
    sizes = {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "dff": 48, "n_positions": 64}
    model = tf.CTRLLMHeadModel(tf.CTRLConfig(**sizes)).eval()
    (row, *_) = ap.describe_attention(model)
    assert hidden_argument(type(model.get_submodule(row.path))) == Argument("q", 2)
    check(model, {"input_ids": torch.randint(3, 90, (2, 7))})


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "gpt_oss"])
@torch.no_grad()
def test_generated_text_is_that_of_one_pass(name):
    """Greedy, beams, a chunked prompt and left padding; of queries through an ordinary cache, of keys from a state."""
    for flag in FLAGS if name in tiny.DECODERS else FLAGS[:1]:
        model, given = ap.swap_attention(tiny.build(name), flag), tiny.inputs(name, length=17)
        for how in ({}, {"num_beams": 3}, {"prefill_chunk_size": 5}):
            want = model.generate(**given, **GREEDY, num_beams=how.get("num_beams", 1), use_cache=False)
            assert torch.equal(model.generate(**given, **GREEDY, **how), want), (flag, how)


@torch.no_grad()
def test_assisted_decoding_brings_tokens_that_wait():
    model, draft = ap.swap_attention(tiny.build("llama"), "gated_sum"), tiny.build("llama", seed=3)
    given = {name: x[1:] for name, x in tiny.inputs("llama").items()}
    want = model.generate(**given, **GREEDY, use_cache=False)
    assert torch.equal(model.generate(**given, **GREEDY, assistant_model=draft), want)


@pytest.mark.parametrize("flag", FLAGS)
@torch.no_grad()
def test_static_caches_compiled_and_not(flag):
    model = ap.swap_attention(tiny.build("llama", num_hidden_layers=1), flag)
    ids = tiny.inputs("llama", padded=False)["input_ids"]
    want = model(ids).logits
    torch._dynamo.reset()
    for step in (model, torch.compile(model, backend="eager")):
        cache = StaticCache(config=model.config, max_cache_len=20)
        got = [model(ids[:, :7], past_key_values=cache).logits]
        got += [step(ids[:, at : at + 1], past_key_values=cache).logits for at in range(7, 10)]
        torch.testing.assert_close(torch.cat(got, dim=1), want[:, :10], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("flag", FLAGS)
def test_a_step_of_training_is_one_graph(flag):
    model, ids = ap.swap_attention(tiny.build("llama", num_hidden_layers=1), flag), torch.randint(3, 90, (2, 6))
    torch._dynamo.reset()
    found = []
    for call in (torch.compile(model, backend="aot_eager", fullgraph=True), model):
        model.zero_grad()
        call(ids, labels=ids, use_cache=False).loss.backward()
        found.append({name: w.grad.clone() for name, w in model.named_parameters() if w.grad is not None})
    for name, gradient in found[1].items():
        torch.testing.assert_close(found[0][name], gradient, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(flag, reentrant):
    model, given = ap.swap_attention(tiny.build("llama"), flag).train(), tiny.inputs("llama")
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model.zero_grad()
        model(**given, labels=given["input_ids"], use_cache=False).loss.backward()
        found.append({name: w.grad.clone() for name, w in model.named_parameters() if w.grad is not None})
    assert found[0]["model.layers.0.self_attn.attn_plugin.gate_weight"].any()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient)
    assert innermost() is None


@pytest.mark.parametrize("flag", FLAGS)
@torch.no_grad()
def test_packed_texts_are_those_alone(flag):
    model, ids = ap.swap_attention(tiny.build("llama"), flag), torch.randint(3, 90, (1, 12))
    positions = torch.tensor([[*range(5), *range(7)]])
    got = model(ids, position_ids=positions, use_cache=False).logits
    for part in (slice(0, 5), slice(5, 12)):
        torch.testing.assert_close(got[:, part], model(ids[:, part], use_cache=False).logits, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_threads_share_a_model():
    model = ap.swap_attention(tiny.build("llama"), "gated_output")
    ids = [torch.randint(3, 90, (1, 40)) for _ in range(4)]
    want, got = [model(one).logits for one in ids], {}

    def run(number):
        with torch.no_grad():
            got[number] = [model(ids[number]).logits for _ in range(5)]

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, made in got.items():
        for one in made:
            torch.testing.assert_close(one, want[number], rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_saved_copied_and_restored_models(tmp_path):
    plain = tiny.build("llama")
    model = ap.swap_attention(copy.deepcopy(plain), "gated_output")
    given = tiny.inputs("llama")
    want = tiny.output(model, given)
    model.save_pretrained(tmp_path)
    for same in (copy.deepcopy(model), tf.AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert torch.equal(tiny.output(same, given), want)
    module = model.model.layers[0].self_attn
    ap.restore_attention(model)
    assert torch.equal(tiny.output(model, given), tiny.output(plain, given))
    assert not hasattr(module, arguments.SIGNATURE)
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    assert not {calls.begin, calls._end, before_attention} & set(hooks)


@torch.no_grad()
def test_a_cache_of_keys_and_values_has_no_hidden_states():
    """A layer that was filled before the swap, or by a call that wanted weights, cannot be gone on from."""
    model, ids = tiny.build("llama"), tiny.inputs("llama", padded=False)["input_ids"]
    cache = DynamicCache(config=model.config)
    model(ids[:, :8], past_key_values=cache)
    ap.swap_attention(model, "gated_sum")
    with pytest.raises(
        ValueError, match="needs the hidden states of all 9 keys, got those of 1 queries: a cache of keys"
    ):
        model(ids[:, 8:9], past_key_values=cache)
    assert innermost() is None


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    weights = torch.softmax(query @ key.mT * scaling, dim=-1)
    return (weights @ value).transpose(1, 2), weights


class Flat(nn.Module):
    """Takes tokens of all texts in one row, as image encoders do that cut their images by cu_seqlens."""

    def __init__(self, config):
        super().__init__()
        self.config, self.num_heads, self.head_dim, self.is_causal = config, 4, 8, False

    def forward(self, hidden_states):
        query = hidden_states.view(-1, 4, 8).transpose(0, 1).unsqueeze(0)
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        return attention(self, query, query, query, None, scaling=0.3)[0].flatten(2)[0]


class Unnamed(Flat):
    """Its forward names nothing that it takes."""

    def forward(self, *args):
        return super().forward(*args)


class Holder(tf.PreTrainedModel):
    config_class = tf.BertConfig
    _supports_sdpa = True

    def __init__(self, config, kind):
        super().__init__(config)
        self.attention = kind(config)
        self.post_init()

    def forward(self, hidden_states):
        return self.attention(hidden_states)


def holder(kind):
    return Holder(tf.BertConfig(hidden_size=32, num_attention_heads=4), kind)


def test_a_module_that_does_not_name_its_input_is_refused_at_the_swap():
    model = holder(Unnamed)
    message = "'gated_output' needs the hidden states of attention, and the forward of Unnamed does not name its input"
    with pytest.raises(ValueError, match=message):
        ap.swap_attention(model, "gated_output")
    assert not hasattr(model.attention, "attn_plugin")


def test_an_input_of_other_sizes_is_refused_at_the_first_forward():
    model = ap.swap_attention(holder(Flat), "gated_output")
    message = (
        r"^the attention of Flat needs its input as a tensor \(1, 6, size\), as many as queries, got a tensor \(6, 32\)"
    )
    with pytest.raises(ValueError, match=message):
        model(torch.randn(6, 32))
    assert innermost() is None


class Nested(Flat):
    """Has another attend to its input before it attends to what comes of that."""

    def __init__(self, config):
        super().__init__(config)
        self.inner = Rows(config)

    def forward(self, hidden_states):
        return rows(self, hidden_states + self.inner(2 * hidden_states))


class Rows(Flat):
    """Takes (B, N, E)."""

    def forward(self, hidden_states):
        return rows(self, hidden_states)


def rows(module, x):
    query = x.unflatten(2, (4, 8)).transpose(1, 2)
    attention = ALL_ATTENTION_FUNCTIONS.get_interface(module.config._attn_implementation, eager_attention_forward)
    return attention(module, query, query, query, None, scaling=0.3)[0].flatten(2)


def test_modules_within_modules_get_their_own():
    check(holder(Nested), {"hidden_states": torch.randn(2, 5, 32)})


def test_heads_that_do_not_come_in_pairs_are_refused_at_the_swap():
    config = tf.LlamaConfig(**{**tiny.GROUPED, "hidden_size": 24, "num_attention_heads": 3, "num_key_value_heads": 1})
    model = tf.LlamaForCausalLM(config)
    with pytest.raises(ValueError, match="'pairs' needs a number of query heads that is a multiple of 2, got 3"):
        ap.swap_attention(model, "pairs")
    assert ap.swap_attention(tiny.build("llama"), "pairs") is not None

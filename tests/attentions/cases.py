"""What the contract tests run over: every attention of the registry, each with its defaults and its examples."""

import contextlib
import copy
import dataclasses
import functools
import inspect
import json
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from attn_plugins.core.attention import Attention, HeadShape
from attn_plugins.core.mask import AttentionMask
from attn_plugins.core.options import shown
from attn_plugins.core.registry import get_attention, list_attentions

SCALE = 0.4
HIDDEN_SIZE = 12


@dataclass(frozen=True)
class Case:
    """One attention with options, serving either causal or bidirectional modules."""

    cls: type[Attention]
    options: dict[str, Any]
    causal: bool

    def __repr__(self):
        options = ",".join(f"{key}={value}" for key, value in self.options.items())
        return f"{self.cls.name}({options}) {'causal' if self.causal else 'bidirectional'}"

    @property
    def batched(self):
        """Whether it has a form of its own for devices that are not a CPU."""
        return self.cls.attend_batched is not Attention.attend_batched

    def module(
        self, num_heads=4, num_key_value_heads=2, head_dim=8, value_dim=8, *, backend="torch", dtype=torch.float64
    ):
        """The attention, its weights away from a start that may hide half of it (a gate at zero)."""
        heads = head_shape(num_heads, num_key_value_heads, head_dim, value_dim)
        module = self.cls(self.cls.Config(**self.options), heads, backend=backend)
        with torch.random.fork_rng():
            torch.manual_seed(1)
            module.reset_parameters()
            with torch.no_grad():
                for weight in module.parameters():
                    weight.add_(0.3 * torch.randn(weight.shape))
        return module.to(dtype)

    def mask(self, batch, queries, keys, **options):
        return AttentionMask(batch, queries, keys, causal=self.causal, **options)


def head_shape(num_heads=4, num_key_value_heads=2, head_dim=8, value_dim=8):
    """Heads as those of :func:`inputs`, in the second of three layers of a model."""
    sizes = {"num_heads": num_heads, "num_key_value_heads": num_key_value_heads, "head_dim": head_dim}
    return HeadShape(**sizes, value_dim=value_dim, hidden_size=HIDDEN_SIZE, layer=1, layers=3)


def _cases() -> list[Case]:
    cases = []
    for name in list_attentions():
        cls = get_attention(name)
        if not cls.any_length:
            continue
        for options in {json.dumps(options): options for options in ({}, *cls.examples)}.values():
            cases += [
                Case(cls, options, causal) for causal in (True, False) if (cls.causal if causal else cls.bidirectional)
            ]
    return cases


CASES = _cases()


def _having(attributes):
    return [
        case
        for case in CASES
        if all(getattr(case if hasattr(case, name) else case.cls, name) == value for name, value in attributes.items())
    ]


def every_case(**attributes):
    """Parametrise over the cases whose attribute, or whose class's, has the given value."""
    return pytest.mark.parametrize("case", _having(attributes), ids=str)


def one_direction(*, causal, **attributes):
    """As :func:`every_case`, in one direction of attentions that serve both; the other is left to the slow run."""
    chosen = _having(attributes)
    served = {case.cls for case in chosen if case.causal == causal}
    left = [pytest.mark.slow]
    of_both = [left if case.causal != causal and case.cls in served else [] for case in chosen]
    params = [pytest.param(case, id=str(case), marks=marks) for case, marks in zip(chosen, of_both, strict=True)]
    return pytest.mark.parametrize("case", params)


def every_class():
    classes = [cls for cls in map(get_attention, list_attentions()) if cls.any_length]
    return pytest.mark.parametrize("cls", classes, ids=lambda cls: cls.name)


@contextlib.contextmanager
def naming(*what):
    """For the body of a loop: an error says in which of its rounds it came."""
    try:
        yield
    except Exception as error:
        raise AssertionError(f"{', '.join(map(str, what))}: {type(error).__name__}: {error}") from error


def rounds(names, values):
    """As pytest.mark.parametrize, in one test: for what takes less time than pytest takes for a test of its own.

    A caller that gives the arguments itself gets a round of its own choice.
    """
    names = [name.strip() for name in names.split(",")]

    def decorate(test):
        @functools.wraps(test)
        def in_rounds(*args, **arguments):
            every = [dict(zip(names, value if len(names) > 1 else [value], strict=True)) for value in values]
            for chosen in [{}] if names[0] in arguments else every:
                with naming(*(f"{name} {shown(value)}" for name, value in chosen.items())):
                    test(*args, **arguments, **chosen)

        signature = inspect.signature(test)
        rest = [parameter for name, parameter in signature.parameters.items() if name not in names]
        in_rounds.__signature__ = signature.replace(parameters=rest)
        return in_rounds

    return decorate


def cases_together(**attributes):
    """As :func:`every_case`, all cases of a class in one test. What is decorated stays there as ``of_case``."""

    def decorate(test):
        def of_class(cls):
            rounds("case", [case for case in chosen if case.cls is cls])(test)()

        chosen = _having(attributes)
        of_class.__name__, of_class.__doc__, of_class.of_case = test.__name__, test.__doc__, test
        classes = list(dict.fromkeys(case.cls for case in chosen))
        return pytest.mark.parametrize("cls", classes, ids=lambda cls: cls.name)(of_class)

    return decorate


def seeded(seed):
    """A generator for the device that the tests run on."""
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


@dataclass
class Inputs:
    """Queries, keys, values and the hidden states of the queries, and what a call may bring beside them."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    hidden: torch.Tensor
    """(B, 1, Q, E), as of one head."""
    extras: dict[str, Any] = dataclasses.field(default_factory=dict)

    def to(self, dtype):
        extras = {name: x.to(dtype) if torch.is_tensor(x) else x for name, x in self.extras.items()}
        return Inputs(*(x.to(dtype) for x in self.of_tokens()), extras)

    def rows(self, index):
        return Inputs(*(x[index] for x in self.of_tokens()), self.extras)

    def tokens(self, index):
        return Inputs(*(x[:, :, index] for x in self.of_tokens()), self.extras)

    def queries(self, index):
        """The same keys for some of the queries."""
        return Inputs(self.q[:, :, index], self.k, self.v, self.hidden[:, :, index], self.extras)

    def of_tokens(self):
        """The tensors that have a token in dimension 2."""
        return [self.q, self.k, self.v, self.hidden]

    def tensors(self):
        return [*self.of_tokens(), *(x for x in self.extras.values() if torch.is_tensor(x))]

    def run(self, module, mask, **options):
        """out_BQHV of one call."""
        return self.call(module, mask, **options)[0]

    def call(self, module, mask, **options):
        """(out_BQHV, weights_BHQK or None) of one call."""
        hidden = {"hidden": self.hidden.squeeze(1)} if module.wants_hidden else {}
        return module(self.q, self.k, self.v, **{"mask": mask, "scale": SCALE, **hidden, **self.extras, **options})


def inputs(
    batch,
    queries,
    keys=None,
    *,
    num_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    value_dim=8,
    dtype=torch.float64,
    seed=0,
):
    """Gaussian queries, keys, values and hidden states, laid out as transformers hands them over: transposed views."""
    generator = seeded(seed)

    def make(length, heads, size):
        return (
            torch.randn(batch, length, heads, size, generator=generator, dtype=torch.float64).to(dtype).transpose(1, 2)
        )

    keys = queries if keys is None else keys
    return Inputs(
        make(queries, num_heads, head_dim),
        make(keys, num_key_value_heads, head_dim),
        make(keys, num_key_value_heads, value_dim),
        make(queries, 1, HIDDEN_SIZE),
    )


def left_padding(lengths, keys):
    """(B, K): True for the last ``lengths[b]`` keys of each row."""
    return torch.arange(keys) >= keys - torch.tensor(lengths)[:, None]


def outcome(module, given: Inputs, mask, cotangent, **options):
    """Output, and gradients to the inputs and to each weight, for a loss of <cotangent, output>."""
    leaves = [x.detach().requires_grad_() for x in given.tensors()]
    named = [name for name, x in given.extras.items() if torch.is_tensor(x)]
    extras = {**given.extras, **dict(zip(named, leaves[4:], strict=True))}
    out = Inputs(*leaves[:4], extras).run(module, mask, **options)
    weights = [weight for weight in module.parameters() if weight.requires_grad]
    gradients = torch.autograd.grad(out, [*leaves, *weights], cotangent.to(out.dtype), allow_unused=True)
    names = [
        "q",
        "k",
        "v",
        "hidden",
        *named,
        *(name for name, weight in module.named_parameters() if weight.requires_grad),
    ]
    return {"out": out.detach(), **{f"gradient to {name}": g for name, g in zip(names, gradients, strict=True)}}


def assert_same(got, want, tolerance, what=""):
    """Every entry is within ``tolerance``, times the largest entry wanted where that is above 1."""
    for name in want:
        a, b = got[name], want[name]
        if a is None or b is None:
            assert a is None or not a.any(), f"{what}{name}: only one of the forms has it"
            assert b is None or not b.any(), f"{what}{name}: only one of the forms has it"
            continue
        assert a.isfinite().all(), f"{what}{name} is not finite"
        error = (a.double() - b.double()).abs().max().item() / max(1.0, b.double().abs().max().item())
        assert error <= tolerance, f"{what}{name}: differs by {error:.2e}, allowed {tolerance:.0e}"


def kept_for_backward(module, given: Inputs, mask):
    """Elements that autograd keeps of one call, each storage counted once."""
    leaves = Inputs(*(x.detach().requires_grad_() for x in given.of_tokens()), given.extras)
    kept = {}

    def note(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        leaves.run(module, mask)
    return sum(kept.values())


def choice_loss(module, given, mask):
    """A loss of the scores by which an attention chooses keys."""
    hidden = {"hidden_BQE": given.hidden.squeeze(1)} if module.wants_hidden else {}
    scores = module.choice_scores(given.q, given.k, mask=mask, scale=SCALE, **hidden)
    assert torch.equal(scores.isfinite(), mask.dense().squeeze(1).expand_as(scores)), "-inf for keys out of sight alone"
    return scores.softmax(-1).square().sum()


EXACT = 1e-9
"""Allowed difference in float64."""


def cotangent_for(given, mask, seed=7):
    """A random gradient of the output that is zero at padded queries, whose outputs nobody reads."""
    shape = (given.q.shape[0], given.q.shape[2], given.q.shape[1], given.v.shape[3])
    random = torch.randn(shape, generator=seeded(seed), dtype=torch.float64)
    if mask.padding_BK is not None and not mask.cross:
        random = random * mask.padding_BK[:, -shape[1] :, None, None]
    return random


def assert_forms_agree(case, given, mask, *, dtype=torch.float64, tolerance=EXACT, backend="torch", **shape):
    """A backend in ``dtype`` equals ``reference`` in float64: outputs of real queries, and all gradients."""
    cotangent = cotangent_for(given, mask).to(dtype)  # rounded for both, as what is given
    given = given.to(dtype)
    module = case.module(dtype=dtype, backend=backend, **shape)
    oracle = copy.deepcopy(module).double()
    oracle.backend = "reference"
    got = outcome(module, given, mask, cotangent)
    want = outcome(oracle, given.to(torch.float64), mask, cotangent)
    assert got["out"].dtype == dtype
    assert got["out"].isfinite().all()
    real = cotangent.any(dim=-1, keepdim=True)
    got["out"], want["out"] = got["out"] * real, want["out"] * real
    assert_same(got, want, tolerance)


class MostZeros(TorchDispatchMode):
    """The largest number of zeros made at once."""

    def __init__(self):
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if "zero" in func.overloadpacket.__name__:
            self.number = max(self.number, result.numel())
        return result

"""What a call costs follows the length of its text, however large the blocks, windows and chunks of the options are."""

import typing

import torch
from cases import Case, every_case, inputs, outcome, rounds
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode

LENGTH = 12
LARGE = 2048


class Elements(TorchDispatchMode):
    """Counts the elements of all tensors that operations make, those inside of the package's own operators too."""

    def __init__(self):
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        own = OPDEFS.get(func._schema.name)
        if own is not None:
            with self:
                return own._init_fn(*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.number += tensor.numel()
        return result


def elements(case, length=LENGTH, *, from_state=False):
    """(made by a forward and a backward pass over a short text, or by a state that takes it in, kept by that state)."""
    module, given = case.module(dtype=torch.float32), inputs(2, length).to(torch.float32)
    mask, state = case.mask(2, length, length), module.new_state() if from_state else None
    with Elements() as counted:
        if state is None:
            outcome(module, given, mask, torch.ones(2, length, 4, 8))
        else:
            with torch.no_grad():
                given.run(module, mask, state=state)
    return counted.number, 0 if state is None else sum(held.numel() for held in state.tensors.values())


def sizes(cls):
    """Options that are whole numbers and size no weight or buffer, which a call has to read."""
    for option, hint in typing.get_type_hints(cls.Config).items():
        if int in (hint, *typing.get_args(hint)) and option != "num_iterations":  # steps, as many as are asked for
            yield option


def with_option(case, option, value):
    """The case with that option and, where others limit it, with these as large; None where it isn't allowed."""
    for others in ({}, dict.fromkeys(sizes(case.cls), value)):
        try:
            changed = Case(case.cls, {**case.options, **others, option: value}, case.causal)
            case.cls.Config(**changed.options)
            return changed
        except ValueError:
            continue
    return None


@every_case()
@rounds("form", ["one pass", "from a state"])
def test_large_blocks_do_not_make_a_short_text_longer(case, form):
    for option in sizes(case.cls):
        small, large = (with_option(case, option, value) for value in (LENGTH, LARGE))
        if small is None or large is None:
            continue
        with torch.device("meta"):
            weights = {name: held.shape for name, held in large.module().state_dict().items()}
        if weights != {name: held.shape for name, held in small.module().state_dict().items()}:
            continue
        if form == "from a state" and not (case.causal and small.module().new_state()):
            return
        (want, _), (got, kept) = (elements(one, from_state=form == "from a state") for one in (small, large))
        # What a state is to keep, such as the first num_sink_tokens, has its place from the first token on.
        assert got <= 3 * want + 10 * kept, f"{option}={LARGE} makes {got} elements, {option}={LENGTH} {want}"


def test_operators_are_looked_into():
    """An operator of the package's own is one operation to torch: what it makes inside has to be seen all the same."""
    (case,) = [one for one in every_case(causal=True).args[1] if str(one) == "linear() causal"]
    assert elements(case)[0] > 4 * elements(case, 1)[0]

"""Whether a model's loss is divided by the number of tokens that Trainer counts over the batches of a step."""

import ast
import inspect
import textwrap
from typing import Any

from transformers import Trainer

NUMBER = "num_items_in_batch"


def scale_loss_once(trainer: Any) -> None:
    """Have Trainer scale the loss itself where the model does not.

    Trainer takes a model whose ``forward`` has ``**kwargs`` for one that divides its loss by the number that it is
    given, the tokens of all batches of a step and of all processes: it then leaves the loss undivided by the batches,
    and multiplies it by the processes. Most heads of classification and many others take that number and pass it by, so
    that gradients would be as many times too large.
    """
    if type(trainer).compute_loss is Trainer.compute_loss and trainer.compute_loss_func is None:
        model = trainer.accelerator.unwrap_model(trainer.model)
        model = model.get_base_model() if hasattr(model, "get_base_model") else model
        trainer.model_accepts_loss_kwargs = trainer.model_accepts_loss_kwargs and divides_by_number(type(model))


def divides_by_number(cls: type) -> bool:
    """Whether the code of a model's ``forward`` hands the number on to what computes its loss from labels.

    True where the code cannot be read: what Trainer takes it for.
    """
    forward = inspect.unwrap(cls.forward)  # type: ignore[attr-defined]
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
    except (OSError, TypeError, SyntaxError):
        return True
    function = tree.body[0]
    if not isinstance(function, ast.FunctionDef):
        return True
    others = function.args.kwarg.arg if function.args.kwarg else None
    return any(_hands_on(node, others) for node in ast.walk(function) if isinstance(node, ast.Call))


def _hands_on(call: ast.Call, others: str | None) -> bool:
    """Whether a call of a loss, or with labels, gets the number: by its name, or among all other keywords."""
    names = {node.id for given in [*call.args, *(k.value for k in call.keywords)] for node in _names(given)}
    of_loss = "loss" in ast.unparse(call.func).lower() or bool({"labels", "shift_labels"} & names)
    named = any(keyword.arg == NUMBER for keyword in call.keywords) or NUMBER in names
    rest = {name.id for keyword in call.keywords if keyword.arg is None for name in _names(keyword.value)}
    return of_loss and (named or others in rest)


def _names(node: ast.AST) -> list[ast.Name]:
    return [found for found in ast.walk(node) if isinstance(found, ast.Name)]

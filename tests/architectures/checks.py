"""What is checked on a tiny model of one type: that the flag works on each of its attention modules."""

import copy
import functools
import importlib.metadata
import inspect
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import tiny_model
import torch
from corrections import REASONS
from matrix import NEEDS
from subject import TOLERANCE, Modules, Subject, compare, distance, inline_attention, named_tensors
from torch import nn
from transformers import PreTrainedModel

import attn_plugins as ap
from attn_plugins.hf.discovery import inline
from attn_plugins.hf.discovery import modules as discovery

LONGEST = 6
"""Tokens of a text that is packed."""
LARGE = 1e9
PACKAGES = ("timm", "torchaudio")
"""What some models are made with and `make setup` does not bring: `make test-timm` does."""
REFUSALS = ("cannot honour", "cannot tell the number and size of the heads")
"""Of messages with which an attention is refused: the module needs what it does not have, or has no fixed heads."""


@dataclass
class Row:
    """What was found about one model type."""

    model_type: str
    model_class: str | None = None
    status: str = "passed"
    """passed, failed, refused, inline attention, no attention, or not built."""
    reason: str = ""
    modules: list[Modules] = field(default_factory=list)
    inline: list[str] = field(default_factory=list)
    """Classes of the model that attend without transformers' interface and are not reached."""
    checks: dict[str, str] = field(default_factory=dict)
    """Check -> "passed", "not applicable: why" or "failed: why"."""
    versions: dict[str, str] = field(default_factory=dict)
    """Of the packages among PACKAGES that the model is made with."""
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class NotApplicableError(Exception):
    """The check has nothing to say about this model; the message says why."""


def examine(model_type: str) -> Row:
    """Build a tiny model of the type and run every check on it; nothing is raised."""
    start, row = time.perf_counter(), Row(model_type)
    try:
        model = tiny_model.build(model_type)
        row.model_class = type(model).__name__
        row.versions = made_with(model)
        row.inline = inline_attention(model)
        if not discovery.targets(model):
            row.status, known = "inline attention" if row.inline else "no attention", inline.reasons(model)
            row.reason = "; ".join(f"{name}: {known[name]}" if name in known else name for name in row.inline)
        else:
            given = tiny_model.inputs_of(model_type, model)
            subject = Subject(model_type, model, given)
            try:
                row.modules = subject.observe()
            except Exception as error:
                if isinstance(error, ValueError) and ours(error):
                    row.status, row.reason = "refused", str(error)
                else:
                    row.checks = {"run": f"failed: {type(error).__name__}: {error}"}
            else:
                row.checks = {name: outcome(check, subject) for name, check in CHECKS.items()}
    except ImportError as error:
        package = re.search(r"requires the (\w+) library|import name '\w+' from '(\w+)", str(error))
        row.status, row.reason = (
            "not built",
            f"{NEEDS}{package.group(1) or package.group(2)}" if package else str(error),
        )
    except Exception as error:
        row.status, row.reason = "not built", f"{type(error).__name__}: {error}"
    if row.status == "not built":
        row.reason = REASONS.get(model_type, row.reason)
    failed = {name: said for name, said in row.checks.items() if said.startswith("failed")}
    if failed:
        row.status, row.reason = "failed", "; ".join(f"{name} {said}" for name, said in failed.items())
    row.reason = " ".join(row.reason.split())[:300]
    row.seconds = round(time.perf_counter() - start, 2)
    return row


def made_with(model: nn.Module) -> dict[str, str]:
    """Versions of those of PACKAGES whose modules a model holds, or whose functions the code of its class has."""
    files = {sys.modules[type(module).__module__] for module in model.modules()}
    found = {file.__name__.partition(".")[0] for file in files}
    found |= {name for name in PACKAGES for file in files if inspect.ismodule(vars(file).get(name))}
    return {name: importlib.metadata.version(name) for name in PACKAGES if name in found}


def ours(error: Exception) -> bool:
    """Whether attn_plugins raised it."""
    *_, last = traceback.extract_tb(error.__traceback__)
    return "attn_plugins" in Path(last.filename).parts


def outcome(check: Callable[[Subject], None], subject: Subject) -> str:
    try:
        check(subject)
    except NotApplicableError as reason:
        return f"not applicable: {reason}"
    except Exception as error:
        return f"failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
    finally:
        try:
            ap.restore_attention(subject.model)
        except Exception:
            subject.renew()
    return "passed"


def shapes(subject: Subject) -> None:
    """Head shapes read off the modules are those that arrive."""
    if not subject.called:
        raise NotApplicableError("no attention module is called")
    for path, seen in subject.seen.items():
        found = subject.found[path]
        if isinstance(found, Exception):  # attentions with weights are refused here
            continue
        told = (found.num_heads, found.num_key_value_heads, found.head_dim, found.value_dim)
        assert told == seen, f"{path}: found {told}, seen {seen}"


def roles(subject: Subject) -> None:
    """Roles fit what the modules are called with."""
    for target in subject.targets:
        for mask, q_length, kv_length in subject.masks[target.path]:
            got = f"{target.path} is of role {target.role} and gets {mask!r}"
            cached = target.role == "decoder" and q_length < kv_length
            assert mask.cross or cached or q_length == kv_length, got
            if mask.plain and not mask.cross and q_length > 1:
                assert mask.causal == (target.role == "decoder"), got


def limit(subject: Subject) -> None:
    """A window over the whole length changes nothing, and one of a token does: what was compared is really in use."""
    if not subject.called:
        raise NotApplicableError("no attention module is called")
    subject.swap("softmax")
    own, got = subject.own, subject.outputs()
    try:
        compare(got, own)
    except AssertionError:
        ap.restore_attention(subject.model)
        own = eager(subject)
        compare(got, own)
    try:
        served = serve(subject, "local", window_size=1 << 20)
    except NotApplicableError:
        return
    compare(subject.outputs(), own)
    if any(kv_length > 1 for path in served for _, _, kv_length in subject.masks[path]):
        subject.swap("local", served, window_size=1)
        if distance(subject.outputs(), own) > 1e-6:
            return
        # Codecs put out what was made of whole numbers. So what the modules put out is compared.
        narrow = inner(subject, served)
        subject.swap("local", served, window_size=1 << 20)
        wide = inner(subject, served)
        ap.restore_attention(subject.model)
        attended = inner(subject, served)
        compare(wide, attended)
        assert distance(narrow, attended) > 1e-6, "a window of one token changes nothing"


def inner(subject: Subject, paths: list[str]) -> dict[str, torch.Tensor]:
    """What the attention modules at these paths put out in a forward pass."""
    made: dict[str, torch.Tensor] = {}

    def note(path: str, module: nn.Module, args: Any, out: Any) -> None:
        made.update(named_tensors(out[0] if isinstance(out, tuple) else out, subject.given, path))

    modules = [(path, subject.model.get_submodule(path)) for path in paths]
    hooks = [module.register_forward_hook(functools.partial(note, path)) for path, module in modules]
    subject.outputs()
    for hook in hooks:
        hook.remove()
    return made


def eager(subject: Subject) -> dict[str, torch.Tensor]:
    """What the model makes with eager attention, where that is something else than it makes by default.

    Phi-4's images say that they are causal: without a mask, sdpa believes it and eager does not.
    """
    held = subject.model.config._attn_implementation
    subject.model.set_attn_implementation("eager")
    try:
        made = subject.outputs()
    finally:
        subject.model.set_attn_implementation(held)
    assert distance(made, subject.own) > TOLERANCE, "the outputs are those of neither sdpa nor eager"
    return made


def restore(subject: Subject) -> None:
    """The model's own attention comes back bit for bit."""
    try:
        serve(subject, "local", window_size=2)
    except NotApplicableError:
        subject.swap("softmax")
    subject.outputs()
    ap.restore_attention(subject.model)
    compare(subject.outputs(), subject.own, tolerance=0.0)


def serve(subject: Subject, name: str, **options: Any) -> list[str]:
    """Put an attention where it can serve: into modules that need no more than it declares and do not refuse it.

    Returns:
        their paths.
    """
    paths = subject.served_by(name)
    if not paths:
        needs = sorted({why for target in subject.targets for why in target.needs.values()})
        raise NotApplicableError(f"{name} serves none of its modules: {', '.join(needs)}")
    while paths:
        try:
            subject.swap(name, paths, **options)
            subject.outputs()
            return paths
        except ValueError as error:
            refusing = [p for p in paths if refuses(subject, p, name, options)]
            if not refusing:
                raise
            paths = [p for p in paths if p not in refusing]
            reason = str(error)
    raise NotApplicableError(reason)


def refuses(subject: Subject, path: str, name: str, options: dict[str, Any]) -> bool:
    try:
        subject.swap(name, [path], **options)
        subject.outputs()
    except ValueError as error:
        return any(words in str(error) for words in REFUSALS)
    return False


def trains(subject: Subject, name: str, **options: Any) -> None:
    """Forward and backward run, and every new weight gets a gradient."""
    serve(subject, name, **options)
    model = subject.model
    torch.manual_seed(0)
    reached: set[str] = set()
    hooks = [
        model.get_submodule(path).attn_plugin.register_forward_hook(functools.partial(note_gradient, reached, path))
        for path in subject.called
        if hasattr(model.get_submodule(path), "attn_plugin")
    ]
    made = named_tensors(model(**copy.deepcopy(subject.given)), subject.given)
    for hook in hooks:
        hook.remove()
    model.zero_grad()
    # Some models hide logits with the lowest number that there is.
    loss = sum(t.float()[t.abs() < LARGE].square().mean() for t in made.values() if t.requires_grad)
    if not isinstance(loss, torch.Tensor):
        raise NotApplicableError("no output has a gradient")
    assert torch.isfinite(loss), "the outputs are not finite"
    loss.backward()
    if hooks and not reached:
        raise NotApplicableError("no gradient of the outputs reaches what its modules put out")
    for path, parameter in model.named_parameters():
        if path.partition(".attn_plugin.")[0] in reached:
            assert parameter.grad is not None, f"{path} has no gradient"
            assert torch.isfinite(parameter.grad).all(), f"the gradient of {path} is not finite"
            inert = path.partition(".attn_plugin")[0] not in subject.telling
            assert inert or parameter.grad.abs().max() > 0, f"the gradient of {path} is zero"
    model.zero_grad()


def note_gradient(reached: set[str], path: str, slot: nn.Module, args: Any, made: tuple[torch.Tensor, Any]) -> None:
    """Note whether a gradient comes back to what an attention puts out: some models leave their last layers unused, or
    add them with a factor that starts at 0."""

    def note(gradient: torch.Tensor) -> None:
        if gradient.any():
            reached.add(path)

    if torch.is_grad_enabled():  # a model may compute a part without gradients
        assert made[0].requires_grad, f"what the attention of {path} puts out has no gradient"
        made[0].register_hook(note)


def saves(subject: Subject) -> None:
    """Saved and loaded back, new weights and all, it computes the same bits."""
    try:
        serve(subject, "additive")
    except NotApplicableError:
        subject.swap("softmax")
    model = subject.model
    wanted = subject.outputs()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        try:
            loaded = type(model).from_pretrained(folder).eval()
        except Exception:
            raise_own(subject)
            raise
    for tensor in (*loaded.parameters(), *loaded.buffers()):
        tensor.data = tensor.data.clone()  # a file's tensors lie at odd addresses, for which kernels round otherwise
    told, again = ap.describe_attention(model), ap.describe_attention(loaded)
    assert list(told) == list(again), "the attentions are described otherwise when loaded"
    compare(subject.outputs(loaded), wanted, tolerance=0.0)


def raise_own(subject: Subject) -> None:
    """Raise NotApplicableError where transformers does not load what it saves of the model with its own attention."""
    ap.restore_attention(subject.model)
    with tempfile.TemporaryDirectory() as folder:
        subject.model.save_pretrained(folder)
        try:
            type(subject.model).from_pretrained(folder)
        except Exception as error:
            raise NotApplicableError(f"its own from_pretrained raises {type(error).__name__}: {error}") from None


def packed(subject: Subject) -> None:
    """Texts packed into one row and told apart by their positions are computed as if each were alone."""
    model, given = subject.model, subject.given
    takes = inspect.signature(model.forward).parameters
    if not {"position_ids", "use_cache"} <= takes.keys() or model.config.is_encoder_decoder:
        raise NotApplicableError("it takes no positions")
    if set(given) - {"input_ids", "attention_mask"} or not any(t.role == "decoder" for t in subject.targets):
        raise NotApplicableError("it is no causal model of text alone")
    texts = given["input_ids"][-1:].split(LONGEST, dim=1)

    def distance_from_alone() -> float:
        def logits(texts: tuple[torch.Tensor, ...]) -> torch.Tensor:
            positions = torch.cat([torch.arange(text.shape[1]) for text in texts]).unsqueeze(0)
            row = {"input_ids": torch.cat(texts, dim=1), "position_ids": positions, "use_cache": False}
            return tiny_model.forward(model, row)[0]

        alone = torch.cat([logits((text,)) for text in texts], dim=1)
        return float((logits(texts) - alone).abs().max() / alone.abs().max())

    if distance_from_alone() > TOLERANCE:
        raise NotApplicableError("its own attention does not keep packed texts apart")
    for name, options in (("softmax", {}), ("local", {}), ("linear", {"feature_map": "elu"})):
        try:
            serve(subject, name, **options)
        except NotApplicableError:
            continue
        away = distance_from_alone()
        assert away <= TOLERANCE, f"{name}: packed texts are {away:.2g} away from the same texts alone"


def generates(subject: Subject) -> None:
    """Cached generation gives the tokens that generation without a cache gives."""
    model = subject.model
    if not model.can_generate():
        raise NotApplicableError("it does not generate")
    try:
        own = [tokens(model, subject.given, use_cache) for use_cache in (True, False)]
    except Exception as error:
        raise NotApplicableError(f"its own generate() raises {type(error).__name__}: {error}") from None
    if not torch.equal(*own):
        raise NotApplicableError("its own tokens with and without a cache differ")
    decoders = [target.path for target in subject.targets if target.role == "decoder" and target.path in subject.called]
    if not decoders:
        raise NotApplicableError("it has no causal attention module")
    for name, options in (("local", {"window_size": 4}), ("linear", {"feature_map": "elu"})):
        try:
            serve(subject, name, **options)
        except NotApplicableError:
            continue
        cached, uncached = (tokens(subject.model, subject.given, use_cache) for use_cache in (True, False))
        assert torch.equal(cached, uncached), f"{name}: {cached.tolist()} with a cache, {uncached.tolist()} without"


@torch.no_grad()
def tokens(model: PreTrainedModel, given: dict[str, Any], use_cache: bool) -> torch.Tensor:
    torch.manual_seed(0)
    forced = {getattr(model.generation_config, f"forced_{end}_token_id", None) for end in ("bos", "eos")}
    # A token of an image wants an image, and one that is forced must not be suppressed.
    special = [token for token in range(tiny_model.LAST_ID, tiny_model.VOCABULARY) if token not in forced]
    unused = () if model.config.is_encoder_decoder else ("decoder_input_ids",)  # of BLIP-2 with OPT
    given = {name: value for name, value in given.items() if name not in unused}
    made = model.generate(
        **given,
        max_new_tokens=6,
        min_new_tokens=6,
        do_sample=False,
        num_beams=1,
        use_cache=use_cache,
        suppress_tokens=special,
        pad_token_id=0,
    )
    return made if isinstance(made, torch.Tensor) else made.sequences


CHECKS: dict[str, Callable[[Subject], None]] = {
    "shapes": shapes,
    "roles": roles,
    "limit": limit,
    "linear": lambda subject: trains(subject, "linear", feature_map="hedgehog"),
    "additive": lambda subject: trains(subject, "additive"),
    "save": saves,
    "restore": restore,
    "packed": packed,
    "generate": generates,
}
"""Name -> check, in the order of the columns."""

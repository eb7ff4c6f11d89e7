"""What is checked on a tiny model of one type: that the flag works on each of its attention modules."""

import collections
import copy
import functools
import inspect
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import tiny_model
import torch
from torch import nn
from transformers import Cache, PreTrainedModel

import attn_plugins as ap
from attn_plugins.attention import HeadShape
from attn_plugins.hf import discovery

TOLERANCE = 1e-4
LONGEST = 6
"""Tokens of a text that is packed."""
ROLES = ("encoder", "decoder", "cross")
LARGE = 1e9
REFUSALS = ("cannot honour", "cannot tell the number and size of the heads")
"""Of messages with which an attention is refused: the module needs what it does not have, or has no fixed heads."""


@dataclass
class Modules:
    """Attention modules of one kind in a model."""

    role: str
    kind: str
    """vision, text, audio or other: what the part of the model that holds them reads."""
    reached: str
    count: int
    called: int
    """How many of them were called in the forward pass."""
    heads: list[tuple[int, int, int, int]]
    """(query heads, key/value heads, head dimension, value dimension) that were seen."""


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
        row.inline = inline_attention(model)
        if not discovery.targets(model):
            row.status = "inline attention" if row.inline else "no attention"
            row.reason = ", ".join(row.inline)
        else:
            given = tiny_model.inputs_of(model_type, model)
            subject = Subject(model_type, model, given)
            try:
                row.modules = subject.observe()
            except ValueError as error:
                row.status, row.reason = "refused", str(error)
            except Exception as error:
                row.checks = {"run": f"failed: {type(error).__name__}: {error}"}
            else:
                row.checks = {name: outcome(check, subject) for name, check in CHECKS.items()}
    except ImportError as error:
        package = re.search(r"requires the (\w+) library|$", str(error)).group(1)  # type: ignore[union-attr]
        row.status, row.reason = "not built", f"needs {package}" if package else str(error)
    except Exception as error:
        row.status, row.reason = "not built", f"{type(error).__name__}: {error}"
    failed = {name: said for name, said in row.checks.items() if said.startswith("failed")}
    if failed:
        row.status, row.reason = "failed", "; ".join(f"{name} {said}" for name, said in failed.items())
    row.reason = " ".join(row.reason.split())[:300]
    row.seconds = round(time.perf_counter() - start, 2)
    return row


def outcome(check: Callable[["Subject"], None], subject: "Subject") -> str:
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


class Subject:
    """A model under examination, its inputs, and what it makes of them by itself."""

    def __init__(self, model_type: str, model: PreTrainedModel, given: dict[str, Any]):
        self.model_type, self.model, self.given = model_type, model, given
        self.own = self.outputs()
        self.targets = discovery.targets(model)
        self.called: set[str] = set()
        self.seen: dict[str, tuple[int, int, int, int]] = {}
        self.found: dict[str, HeadShape | Exception] = {}
        self.masks: dict[str, list[tuple[Any, int, int]]] = collections.defaultdict(list)
        self.telling: set[str] = set()
        """Paths of the modules whose values differ from key to key: in others it is all the same what is attended."""

    def renew(self) -> None:
        self.model = tiny_model.build(self.model_type)

    def outputs(self, model: nn.Module | None = None) -> dict[str, torch.Tensor]:
        """The floating outputs of a forward pass by name, at tokens that are not padding."""
        return named_tensors(tiny_model.forward(self.model if model is None else model, self.given), self.given)

    def swap(self, name: str, paths: list[str] | None = None, **options: Any) -> PreTrainedModel:
        """Put an attention into all modules, or into those at ``paths``."""
        paths = [target.path for target in self.targets] if paths is None else paths
        return ap.swap_attention(self.model, {"type": name, **options, "roles": list(ROLES), "modules": paths})

    def served_by(self, name: str) -> list[str]:
        """Paths of the modules that were called and of which the attention has all that they need."""
        attention = ap.get_attention(name)
        return [
            t.path for t in self.targets if t.path in self.called and all(getattr(attention, need) for need in t.needs)
        ]

    def observe(self) -> list[Modules]:
        """Note what reaches every slot in a forward pass, and sum it up by role and kind."""
        self.swap("softmax")
        rows = {row.path: row for row in ap.describe_attention(self.model)}
        for target in self.targets:
            module = self.model.get_submodule(target.path)
            config = getattr(module, "config", self.model.config)
            try:
                self.found[target.path] = discovery.head_shape(module, config)
            except ValueError as error:
                self.found[target.path] = error
            module.attn_plugin.register_forward_pre_hook(functools.partial(self._note, target.path), with_kwargs=True)
        self.outputs()
        groups: dict[tuple[str, str, str], list[str]] = collections.defaultdict(list)
        for target in self.targets:
            kind = kind_of(discovery.owner(self.model, target.path))
            groups[target.role, kind, getattr(rows[target.path], "reached", "interface")].append(target.path)
        ap.restore_attention(self.model)
        return [
            Modules(*group, len(paths), len(self.called & set(paths)), sorted({*map(self.seen.get, paths)} - {None}))
            for group, paths in groups.items()
        ]

    def _note(self, path: str, slot: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        query, key, value = args
        self.called.add(path)
        self.seen[path] = (query.shape[1], key.shape[1], query.shape[3], value.shape[3])
        if (value - value[:, :, :1]).abs().max() > 1e-6:
            self.telling.add(path)
        self.masks[path].append((kwargs["mask"], query.shape[2], key.shape[2]))


def kind_of(owner: PreTrainedModel) -> str:
    """What the part of a model reads."""
    name, main = type(owner.config).__name__.lower() + type(owner).__name__.lower(), str(owner.main_input_name)
    for kind, words in (
        ("vision", "vision pixel image video vit detr"),
        ("audio", "audio speech input_features input_values codec"),
        ("text", "text input_ids"),
    ):
        if any(word in name or word in main for word in words.split()):
            return kind
    return "other"


def inline_attention(model: nn.Module) -> list[str]:
    """Classes of modules that attend by themselves: named so, with weights, and not reached, nor inside or around one
    that is."""
    reached = [path for path, _ in discovery.attention_modules(model)]
    found = {}
    for path, module in model.named_modules():
        name = type(module).__name__
        if not ("Attention" in name or "Attn" in name) or next(module.parameters(), None) is None:
            continue
        related = any(f"{r}.".startswith(f"{path}.") or f"{path}.".startswith(f"{r}.") for r in reached)
        inner = any("Attention" in type(m).__name__ for m in module.modules() if m is not module)
        if not related and not inner:
            found[name] = True
    return list(found)


def named_tensors(made: Any, given: dict[str, Any], name: str = "") -> dict[str, torch.Tensor]:
    """Floating tensors inside an output by name; rows of padding are left out."""
    if isinstance(made, torch.Tensor):
        if not made.is_floating_point():
            return {}
        mask = given.get("attention_mask")
        if mask is not None and made.ndim > 2 and made.shape[:2] == mask.shape:
            made = made[mask.bool()]
        return {name: made}
    if isinstance(made, Cache) or made is None:
        return {}
    items: Iterator[tuple[Any, Any]]
    if hasattr(made, "items"):
        # Attention maps are no outputs of a swapped model: some models put them out whenever they are there.
        items = ((key, value) for key, value in made.items() if not re.search("past|cache|attentions", str(key)))
    elif isinstance(made, (list, tuple)):
        items = ((str(i), value) for i, value in enumerate(made))
    else:
        return {}
    found = {}
    for key, value in items:
        found.update(named_tensors(value, given, f"{name}.{key}" if name else str(key)))
    return found


def compare(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], tolerance: float = TOLERANCE) -> None:
    """Raise unless all tensors are equal up to ``tolerance`` of the largest element, or of 1."""
    assert got.keys() == wanted.keys(), f"outputs are {sorted(got)}, not {sorted(wanted)}"
    for name, tensor in wanted.items():
        assert got[name].shape == tensor.shape, (
            f"{name} is of shape {tuple(got[name].shape)}, not {tuple(tensor.shape)}"
        )
        finite = torch.isfinite(tensor)
        assert torch.equal(finite, torch.isfinite(got[name])), f"{name} is not finite elsewhere"
        if finite.any():
            scale = max(1.0, tensor[finite].abs().max().item())
            away = (got[name][finite] - tensor[finite]).abs().max().item() / scale
            assert away <= tolerance, f"{name} is {away:.2g} away"


def distance(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    return max((float((got[name] - tensor).nan_to_num().abs().max()) for name, tensor in wanted.items()), default=0.0)


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
        loaded = type(model).from_pretrained(folder).eval()
    for tensor in (*loaded.parameters(), *loaded.buffers()):
        tensor.data = tensor.data.clone()  # a file's tensors lie at odd addresses, for which kernels round otherwise
    told, again = ap.describe_attention(model), ap.describe_attention(loaded)
    assert list(told) == list(again), "the attentions are described otherwise when loaded"
    compare(subject.outputs(loaded), wanted, tolerance=0.0)


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
    for name in ("softmax", "local", "linear"):
        try:
            serve(subject, name)
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
    for name, options in (("local", {"window_size": 4}), ("linear", {})):
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

"""All global state of the package: registrations and changes to transformers and PEFT, made once.

None of them does anything to a model whose config does not carry the flag, nor to an adapter of one.
"""

import copy
import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import transformers
from transformers import Cache, PreTrainedConfig, PreTrainedModel, masking_utils, modeling_utils
from transformers.distributed import mixin
from transformers.loss import loss_utils
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from attn_plugins.config.after_import import once_imported
from attn_plugins.hf import construction, structures
from attn_plugins.hf.attention_function import attention_forward
from attn_plugins.hf.caches.cache_layers import RECORDING, rollback
from attn_plugins.hf.checkpoints import live
from attn_plugins.hf.checkpoints import peft as adapters
from attn_plugins.hf.checkpoints.card import write_card
from attn_plugins.hf.checkpoints.configs import check_flags, erase, from_file, mark_saved, written
from attn_plugins.hf.checkpoints.loading import initialize_weights, load_from_state_dict, own_weights_first
from attn_plugins.hf.checkpoints.offload import dispatch
from attn_plugins.hf.masks.mask_function import lazy_mask
from attn_plugins.hf.masks.structure import COMPOSERS
from attn_plugins.hf.names import IMPLEMENTATION, SLOT
from attn_plugins.hf.parallel import context, tensor_parallel
from attn_plugins.hf.parallel.sharding import load_full_state_dict
from attn_plugins.hf.swap import attach_assigned
from attn_plugins.models import registration

_MARK = "_attn_plugins_original"


def install() -> None:
    """Make the flag known to transformers. Calling it again changes nothing."""
    AttentionInterface.register(IMPLEMENTATION, attention_forward)
    # Registering the function alone would give it mask=None even for padded batches.
    AttentionMaskInterface.register(IMPLEMENTATION, lazy_mask)

    # A config has no hook for new fields. As a class attribute, from_pretrained(path, attn_plugin=...) and config.json
    # set it like any field, and configs without the flag are saved as before.
    if not hasattr(PreTrainedConfig, "attn_plugin"):
        PreTrainedConfig.attn_plugin = ConfigField()  # type: ignore[attr-defined]

    # Rules that a file brings were right for the model that was saved. What a user says has to be right for this one.
    _wrap(PreTrainedConfig, "from_dict", _from_dict)

    # With a config at hand, arguments that it would take go to constructors, which know none of this name; and auto
    # classes may build from a part of the config that has taken it. attn_implementation= has its own way past both.
    _wrap(PreTrainedModel, "from_pretrained", _from_pretrained)
    _wrap(PreTrainedModel, "_from_config", _from_config)
    once_imported("transformers.models.auto.modeling_auto", _install_auto)

    # Auto classes find the package's own models as they find transformers'.
    once_imported("transformers.models.auto.configuration_auto", registration.register_configs)

    # Some models choose their attention classes in their constructor, by names of implementations that they know. They
    # are therefore built with their own default, also from a config.json that names ours.
    _wrap(PreTrainedModel, "__init__", construction.init)

    # Nothing public runs between a model's construction and the loading of its weights, which is when the slots have to
    # be there: post_init, which every model calls last in __init__, is that moment.
    _wrap(PreTrainedModel, "post_init", construction.post_init)

    # Copies and unpickled models are made without a constructor. Of those too it has to be known that they are alive.
    _wrap(PreTrainedModel, "__setstate__", _setstate)

    # Weights that a checkpoint lacks are initialised by the model's own _init_weights, which does not know a slot's.
    _wrap(PreTrainedModel, "_initialize_weights", initialize_weights)
    _wrap(PreTrainedModel, "initialize_weights", own_weights_first)

    # Attention weights are allowed for "eager" alone, by name: in the setter, and in what a config checks when it is
    # made or saved. Each class of configs keeps the functions that it checks with, found when the class was made.
    _allow_output_attentions()

    # A model that is loaded in parts is given its slots first, and its plan says nothing of them. What it does not name
    # transformers leaves whole, and nothing public tells when heads have been split, which is before FSDP shards more.
    _wrap(mixin, "apply_tensor_parallelism", tensor_parallel.apply)

    # A cache is told to record before its layers are exchanged for states, and ordinary layers do not remember it.
    _wrap(Cache, "activate_past_recording", _activate_past_recording)

    # It crops layer by layer, and a layer that refuses knows nothing of those that have been cropped before it.
    _wrap(Cache, "crop", rollback.crop)

    # A structure is an argument that no model's forward names. Hooks are in swapped models alone, and others, whose
    # forward takes any keyword, would drop it in silence.
    _wrap(PreTrainedModel, "__call__", structures.call)

    # It would bypass the slots in silence.
    _wrap(PreTrainedModel, "set_attn_implementation", _set_attn_implementation)

    # An edit of a config that no module was told of would be saved as if it ran. And transformers saves an adapter that
    # it has loaded itself by writing out its config. One that it exchanges for another meets nothing else of ours, and
    # before 5.18 it left out what PEFT calls modules_to_save, and logged that.
    _wrap(PreTrainedModel, "save_pretrained", _save_pretrained)
    _wrap(PreTrainedModel, "load_adapter", _load_adapter)

    # For the hub it writes README.md over what saving wrote there; after that comes only this.
    _wrap(PreTrainedModel, "_upload_modified_files", _upload_modified_files)

    # Of weights on disk it knows those that a checkpoint has, and a new one would be a KeyError in the first call.
    _wrap(modeling_utils, "accelerate_dispatch", dispatch)

    # Weights of a slot that is not there are "unexpected", and dropped in silence where loading is not strict.
    _wrap(PreTrainedModel, "_load_from_state_dict", load_from_state_dict)

    # A mask function is a closure: it says nothing of what it was made from, and torch.compile cannot look into it.
    for name, around in COMPOSERS.items():
        if (original := getattr(masking_utils, name, None)) is None:
            continue  # before 5.18
        _wrap(masking_utils, name, around)
        for module in list(sys.modules.values()):  # those that took it from there before
            if getattr(module, "__dict__", {}).get(name) is original:
                setattr(module, name, getattr(masking_utils, name))

    # Where processes have parts of rows, a model whose forward is called as such (AdaLoRA) meets nothing else of ours.
    for name, around in context.LOSSES.items():
        own = getattr(loss_utils, name)
        _wrap(loss_utils, name, around)
        for task, held in loss_utils.LOSS_MAPPING.items():
            if held is own:
                loss_utils.LOSS_MAPPING[task] = getattr(loss_utils, name)

    # Importing PEFT takes most of a second, and few programs need it.
    once_imported("peft", _install_peft)

    # It gives a model to all processes entry by entry, and has no hook for those that are not sharded.
    once_imported("accelerate.utils.fsdp_utils", _install_accelerate)

    # Under context parallelism they know torch's attention alone, by its name, and take away masks.
    once_imported("accelerate.accelerator", _install_accelerator)
    once_imported("transformers.trainer", _install_trainer)


def _install_auto() -> None:
    from transformers.models.auto import modeling_auto

    registration.register_models()
    for auto in _auto_classes(modeling_auto._BaseAutoModelClass):  # each has copies of the two methods
        _wrap(auto, "from_pretrained", _auto_from_pretrained)
        _wrap(auto, "from_config", _auto_from_config)


def _install_accelerate() -> None:
    from accelerate.utils import fsdp_utils

    _wrap(fsdp_utils, "fsdp2_load_full_state_dict", load_full_state_dict)


def _install_accelerator() -> None:
    from accelerate import accelerator

    _wrap(accelerator.Accelerator, "_prepare_cp", context.prepare_accelerator)


def _install_trainer() -> None:
    from transformers import trainer

    _wrap(trainer.Trainer, "_prepare_context_parallel_inputs", context.prepare_inputs)
    _wrap(trainer.Trainer, "prediction_step", context.predict)

    # For the hub Trainer, and those that are built on it, write a README.md of their own; after that comes only this.
    _wrap(trainer.Trainer, "_finish_current_push", _finish_current_push)


def _allow_output_attentions() -> None:
    name = "validate_output_attentions"
    _wrap(PreTrainedConfig, name, _validate_output_attentions)
    original, allowing = getattr(getattr(PreTrainedConfig, name), _MARK), getattr(PreTrainedConfig, name)
    made = [PreTrainedConfig]
    for cls in made:
        made.extend(cls.__subclasses__())
        checks = vars(cls).get("__class_validators__", [])
        checks[:] = [allowing if check is original else check for check in checks]
    held: Any = inspect.getattr_static(PreTrainedConfig, "output_attentions")
    if not hasattr(held.fset, _MARK):

        @functools.wraps(held.fset)
        def setter(self: PreTrainedConfig, value: bool) -> None:
            if self._attn_implementation == IMPLEMENTATION:
                self._output_attentions = value
            else:
                held.fset(self, value)

        setattr(setter, _MARK, held.fset)
        PreTrainedConfig.output_attentions = held.setter(setter)  # type: ignore[method-assign]


def _validate_output_attentions(original: Any, self: PreTrainedConfig) -> None:
    if self._attn_implementation != IMPLEMENTATION:
        original(self)


def _install_peft() -> None:
    """The changes to PEFT, without hooks for what adapters need of base models: see hf/checkpoints/peft.py."""
    import peft
    import peft.utils.hotswap
    from peft.tuners.tuners_utils import BaseTuner

    # What is read of an adapter before anything is loaded is its config: the rules go through files with it.
    _wrap(peft.PeftConfig, "save_pretrained", adapters.save_config)
    _wrap(peft.PeftConfig, "from_pretrained", adapters.read_config)
    _wrap(peft.PeftConfig, "from_peft_type", adapters.make_config)
    _wrap(peft.PeftModel, "save_pretrained", _save_peft)
    _wrap(peft.PeftModel, "_upload_modified_files", _upload_modified_files)

    # There an adapter's config first meets the base model: in a PeftModel, as a prompt, in a model of transformers.
    _wrap(peft.PeftModel, "__init__", adapters.make_model)
    _wrap(peft.PeftModel, "add_adapter", adapters.add_adapter)
    _wrap(BaseTuner, "inject_adapter", adapters.inject_adapter)
    _wrap(peft.utils.hotswap, "hotswap_adapter_from_state_dict", adapters.hotswap_adapter)

    # An adapter holds what it trains, and a slot's other weights and buffers would be in no file at all.
    for holder in (peft, peft.utils, peft.utils.save_and_load, peft.peft_model):
        _wrap(holder, "get_peft_model_state_dict", adapters.save_state)
        _wrap(holder, "set_peft_model_state_dict", adapters.load_state)

    # It hands on the ``weight`` of whatever it puts back.
    _wrap(BaseTuner, "_replace_module", adapters.replace_module)


class ConfigField:
    """``config.attn_plugin``: None where nothing was said, and kept among the config's own attributes like any field.

    Where a config is that of a live model, an assignment swaps the model at once, as users expect of a flag that says
    which attention a model has: an optimizer made after it sees the new weights, and what is saved is what runs.
    """

    def __get__(self, config: Any, owner: type | None = None) -> Any:
        return None if config is None else vars(config).get("attn_plugin")

    def __set__(self, config: Any, flag: Any) -> None:
        if not attach_assigned(config, flag):
            erase(config)
            vars(config)["attn_plugin"] = flag

    def __delete__(self, config: Any) -> None:
        if "attn_plugin" not in vars(config):
            raise AttributeError("attn_plugin")
        if not attach_assigned(config, None):
            erase(config)


def _wrap(holder: Any, name: str, around: Callable[..., Any]) -> None:
    """Put ``around(original, *args, **kwargs)`` in the place of a method of a class, or of a function of a module."""
    held = inspect.getattr_static(holder, name)
    original = held.__func__ if isinstance(held, classmethod) else held
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return around(original, *args, **kwargs)

    setattr(wrapped, _MARK, original)
    setattr(holder, name, classmethod(wrapped) if isinstance(held, classmethod) else wrapped)


_BESIDE = "_attn_plugin_beside"
"""Argument under which auto classes hand the flag on: of this name no config takes it for its own."""


def _auto_classes(cls: type) -> Iterator[type]:
    yield cls
    more: type
    for more in cls.__subclasses__():
        yield from _auto_classes(more)


def _auto_from_pretrained(original: Any, cls: Any, *args: Any, **kwargs: Any) -> Any:
    config = kwargs.get("config")
    if "attn_plugin" in kwargs:
        kwargs[_BESIDE] = kwargs.pop("attn_plugin")
    elif isinstance(config, PreTrainedConfig) and "attn_plugin" in vars(config) and not from_file(config):
        kwargs[_BESIDE] = vars(config)["attn_plugin"]
    return original(cls, *args, **kwargs)


def _auto_from_config(original: Any, cls: Any, config: Any, **kwargs: Any) -> Any:
    if "attn_plugin" in vars(config) and not from_file(config):
        kwargs.setdefault("attn_plugin", vars(config)["attn_plugin"])
    return original(cls, config, **kwargs)


def _from_pretrained(original: Any, cls: Any, *args: Any, **kwargs: Any) -> Any:
    if _BESIDE in kwargs:
        kwargs["attn_plugin"] = kwargs.pop(_BESIDE)
    config = kwargs.get("config")
    if "attn_plugin" in kwargs and isinstance(config, PreTrainedConfig):
        kwargs["config"] = _flagged(config, kwargs.pop("attn_plugin"))
    return original(cls, *args, **kwargs)


def _from_config(original: Any, cls: Any, config: Any, **kwargs: Any) -> Any:
    if "attn_plugin" in kwargs:
        config = _flagged(config, kwargs.pop("attn_plugin"))
    return original(cls, config, **kwargs)


def _flagged(config: Any, flag: Any) -> Any:
    """A copy of the caller's config that carries the flag."""
    config = copy.deepcopy(config)
    config.attn_plugin = flag
    return config


def _from_dict(original: Any, cls: Any, config_dict: dict[str, Any], **kwargs: Any) -> Any:
    saved = dict(config_dict)  # what is passed beside it is written into it
    made = original(cls, config_dict, **kwargs)
    if "attn_plugin" not in kwargs:
        mark_saved(made[0] if isinstance(made, tuple) else made, saved)
    return made


def _setstate(original: Any, self: PreTrainedModel, state: Any) -> None:
    original(self, state)
    live.remember(self)


def _set_attn_implementation(original: Any, self: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
    if self.config.attn_plugin is not None or any(written(self)):
        given = ", ".join([*map(repr, args), *(f"{name}={value!r}" for name, value in kwargs.items())])
        raise ValueError(
            f"set_attn_implementation({given}) would bypass this model's attn_plugin; "
            "call attn_plugins.restore_attention(model) first, set the implementation, then swap again"
        )
    original(self, *args, **kwargs)


def _activate_past_recording(original: Any, self: Cache) -> None:
    setattr(self, RECORDING, True)
    original(self)


def _save_pretrained(original: Any, self: PreTrainedModel, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
    check_flags(self)
    adapter = getattr(self, "_hf_peft_config_loaded", False)
    if adapter:
        adapters.note_rules(self, self.peft_config)
    saved = original(self, save_directory, *args, **kwargs)
    given = inspect.signature(original).bind(self, save_directory, *args, **kwargs).arguments
    if self.should_save_on_this_rank(given.get("is_main_process", True)):
        write_card(save_directory, self, adapter=adapter)
    return saved


def _save_peft(original: Any, self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> None:
    adapters.note_rules(self.get_base_model(), self.peft_config)
    original(self, save_directory, *args, **kwargs)
    if inspect.signature(original).bind(self, save_directory, *args, **kwargs).arguments.get("is_main_process", True):
        write_card(save_directory, self.get_base_model(), adapter=True)


def _upload_modified_files(original: Any, self: Any, working_dir: Any, *args: Any, **kwargs: Any) -> Any:
    _write_pushed_card(working_dir, self)
    return original(self, working_dir, *args, **kwargs)


def _finish_current_push(original: Any, self: Any) -> None:
    original(self)
    if self.hub_model_id is not None and self.is_world_process_zero():
        _write_pushed_card(self.args.output_dir, self.accelerator.unwrap_model(self.model))


def _write_pushed_card(folder: Any, model: Any) -> None:
    """Into a card that another library has written for the hub."""
    if not (Path(folder) / "README.md").is_file():
        return
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    adapter = base is not model or getattr(model, "_hf_peft_config_loaded", False)
    write_card(folder, base, adapter=adapter, tagged=True)


def _load_adapter(original: Any, self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    given = inspect.signature(original).bind(self, *args, **kwargs).arguments
    held, source = getattr(self, "peft_config", None) or {}, given.get("peft_model_id")
    if (given.get("adapter_name") or "default") in held and source is not None:
        config = sys.modules["peft"].PeftConfig.from_pretrained(source, **(given.get("adapter_kwargs") or {}))
        adapters.prepare(self, config, held)
    info = original(self, *args, **kwargs)
    lost = [name for name in info.unexpected_keys if SLOT in name.split(".")]
    if lost and not adapters.declined(self):
        raise ValueError(
            f"this version of transformers ({transformers.__version__}) has not loaded the adapter's weights of "
            f"attentions ({min(lost)}, ...); load it with peft.PeftModel.from_pretrained(model, ...)"
        )
    return info

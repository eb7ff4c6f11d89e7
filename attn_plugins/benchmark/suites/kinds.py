"""Which models a part of a suite is for."""

from typing import Any

from transformers import AutoConfig

from attn_plugins.hf.discovery import modules as discovery
from attn_plugins.tasks.kinds import KINDS
from attn_plugins.training.models import read_adapter, resolve, skeleton
from attn_plugins.training.new_models import is_new, new_model

FOR = {
    "decoder": {"decoder"},
    "encoder": {"encoder"},
    "encoder-decoder": {"encoder", "decoder", "cross"},
}
"""What a part may say that it is for -> roles of the attention in such a model."""


def config_of(source: Any) -> Any:
    """The config of a model, as transformers reads it.

    Raises:
        ValueError: there is no such model.
    """
    if is_new(source):
        return new_model(source).config
    folder = resolve(source)
    adapter = read_adapter(folder)
    try:
        return AutoConfig.from_pretrained(folder if adapter is None else resolve(adapter["base"]))
    except OSError as error:
        raise ValueError(f"model {source!r} could not be loaded: {str(error).splitlines()[0]}") from error


def unfit(source: Any, kind: str, asked: str | None) -> str | None:
    """Why a model is none that a part is for, or None where it is one.

    Args:
        source: a folder, or a name.
        kind: a key of :data:`attn_plugins.tasks.kinds.KINDS`: what the part's task measures.
        asked: a key of :data:`FOR`; None for whatever transformers has such a model of.

    Raises:
        ValueError: there is no such model.
    """
    if KINDS[kind].library == "transformers":
        import transformers

        config = config_of(source)
        autos = [getattr(transformers, name) for name in KINDS[kind].auto]
        if not hasattr(config, "auto_map") and not any(type(config) in auto._model_mapping for auto in autos):
            return f"it is of type {config.model_type}, of which transformers has no {kind} model"
    if asked is not None:
        roles: set[str] = {target.role for target in discovery.targets(skeleton(source))}  # type: ignore[arg-type]
        if roles != FOR[asked]:
            return f"it is no {asked}: its attention is that of {', '.join(sorted(roles)) or 'no role'}"
    return None

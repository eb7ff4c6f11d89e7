"""A tiny random model of any model type, and inputs that it takes."""

import copy
import inspect
import re
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from corrections import CLASSES, CONFIGS, INPUTS, PARTS
from media import with_media
from tiny_config import IMAGE, PATCH, VOCABULARY, tiny_config
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from attn_plugins.models.decoder import RecurrentDecoder
from attn_plugins.models.encoder import RecurrentEncoderForSequenceClassification
from attn_plugins.models.seq2seq import RecurrentSeq2Seq

LENGTH, BATCH = 13, 2
FIRST_ID, LAST_ID = 5, VOCABULARY - 40
"""Token ids of texts: no special ones."""
MOST_PARAMETERS = 20_000_000

MAPPINGS = {
    name: dict(getattr(modeling_auto, name))
    for name in dir(modeling_auto)
    if name.startswith("MODEL_") and name.endswith("MAPPING_NAMES")
}
COMPOSITE_FIRST = (
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
)
PREFERRED = (
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",
    "MODEL_MAPPING_NAMES",
)
OWN: dict[str, type[PreTrainedModel]] = {
    cls.config_class.model_type: cls
    for cls in (RecurrentDecoder, RecurrentEncoderForSequenceClassification, RecurrentSeq2Seq)
}
"""The package's own model types, which are held to the same."""


def model_types() -> list[str]:
    """Every model type that an auto class builds a model of."""
    return sorted(set().union(*MAPPINGS.values()))


def class_of(model_type: str, config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class to build: one that generates where there is one."""
    if model_type in OWN:
        return OWN[model_type]
    name: Any = CLASSES.get(model_type)
    order = (*COMPOSITE_FIRST, *PREFERRED) if any(parts(config)) else PREFERRED
    for mapping in (*order, *MAPPINGS):
        name = name or MAPPINGS[mapping].get(model_type)
    name = name[0] if isinstance(name, (tuple, list)) else name
    found = getattr(transformers, name, None)
    if found is None:
        module = inspect.getmodule(type(config)).__name__.replace("configuration_", "modeling_")
        found = getattr(__import__(module, fromlist=[name]), name)
    return found


def config_of(model_type: str) -> PreTrainedConfig:
    config = tiny_config(CONFIG_MAPPING[model_type], **copy.deepcopy(CONFIGS.get(model_type, {})))
    return getattr(config, PARTS[model_type]) if model_type in PARTS else config


def parts(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    return (value for value in vars(config).values() if isinstance(value, PreTrainedConfig))


def build(model_type: str, seed: int = 0, **flag: Any) -> PreTrainedModel:
    """A model with random weights large enough that attention matters, in eval mode."""
    config = config_of(model_type)
    for key, value in flag.items():
        setattr(config, key, value)
    cls = class_of(model_type, config)
    with torch.device("meta"):
        size = sum(p.numel() for p in cls._from_config(config_of(model_type)).parameters())
    if size > MOST_PARAMETERS:
        raise ValueError(f"{cls.__name__} has {size} parameters; its config wants a correction")
    torch.manual_seed(seed)
    model = cls._from_config(config)
    excite(model)
    return model.eval()


@torch.no_grad()
def excite(model: nn.Module) -> None:
    """Give matrices weights with which scores differ from key to key: initialisers make attention nearly uniform.

    Convolutions and batch norms get weights that keep a signal's size: stacked, initialised ones let it vanish.
    """
    computed = "|".join(getattr(model, "_keys_to_ignore_on_save", None) or ["^$"])  # such as sinusoidal positions
    for path, parameter in model.named_parameters():
        if parameter.ndim == 2 and parameter.requires_grad and not re.search(f"attn_plugin|{computed}", path):
            parameter.normal_(std=0.5 * parameter.shape[-1] ** -0.5 + 0.1)
        elif parameter.ndim == 3 and parameter.requires_grad and not parameter.any():
            parameter.normal_()  # learned queries that start at 0 (Q-Former) would give no gradient to what reads them
        elif parameter.ndim < 2 and parameter.requires_grad and "bias" not in path and not parameter.any():
            parameter.fill_(0.5)  # gates and scales that start at 0 (Mllama, Zaya) would hide what they are for
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Conv3d)):
            module.weight.normal_(std=(2 / module.weight[0].numel()) ** 0.5)
        elif isinstance(module, nn.BatchNorm2d) and module.weight is not None:
            module.weight.fill_(1.0)


class Source:
    """Random tensors, the same in every run."""

    def __init__(self, seed: int = 1):
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator)

    def ids(self, *shape: int, below: int = LAST_ID) -> torch.Tensor:
        return torch.randint(FIRST_ID, below, shape, generator=self.generator)


def inputs_of(model_type: str, model: PreTrainedModel) -> dict[str, Any]:
    """Inputs of a forward pass, padded where the model takes a padding mask: the first that the model takes.

    Raises:
        ValueError: it takes none of them.
    """
    errors = []
    candidates = [INPUTS[model_type](model, Source())] if model_type in INPUTS else guesses(model)
    for given in candidates:
        try:
            forward(model, given)
            return given
        except Exception as error:
            errors.append((list(given), error))
    if not errors:
        raise ValueError(f"no guess at inputs for main input {model.main_input_name!r}")
    names, error = errors[-1]
    raise ValueError(f"no inputs found; with {names}: {type(error).__name__}: {error}") from error


@torch.no_grad()
def forward(model: PreTrainedModel, given: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    return model(**copy.deepcopy(given))  # some models change what they are given


def guesses(model: PreTrainedModel) -> Iterator[dict[str, Any]]:
    takes = inspect.signature(model.forward).parameters
    main = model.main_input_name
    if main not in takes and "pixel_values" in takes:  # such as a vision tower that does not say what it reads
        main = "pixel_values"
    sides = [{}]
    source = Source()
    if "grid_thw" in takes and "input_ids" not in takes:
        yield from patch_guesses(model, source, takes)
    if "decoder_input_ids" in takes:
        sides = [{"decoder_input_ids": source.ids(BATCH, 7)}]
    texts = [text(model, source)] if "input_ids" in takes else [{}]
    if "input_ids" in takes:
        joined = with_media(model, {**texts[0], **sides[0]}, source, forward, find)
        if joined is not None:
            yield joined
    for side in sides:
        if main == "input_ids":
            yield {**texts[0], **side}
        elif main == "pixel_values" or "pixel_values" in takes:
            for pixels in pixel_guesses(model, source, takes):
                yield {**texts[0], **pixels, **side}
                yield {**pixels, **side}
        elif main in ("input_features", "input_values"):
            for sound in sound_guesses(model, source, main):
                yield {**sound, **side}
                yield {**texts[0], **sound, **side}
    if main not in ("input_ids", "pixel_values") and "input_ids" in takes:
        yield texts[0]


def text(model: PreTrainedModel, source: Source) -> dict[str, Any]:
    ids = source.ids(BATCH, LENGTH)
    mask = torch.ones_like(ids)
    if model.can_generate() and not model.config.is_encoder_decoder:
        mask[0, :4] = 0
    else:
        mask[0, -4:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def find(config: PreTrainedConfig, *names: str) -> Any:
    """The first value of these names in a config or its parts, vision and audio before text."""
    holders = [config, *sorted(parts(config), key=lambda part: "text" in type(part).__name__.lower())]
    for holder in [*holders, *(inner for part in holders[1:] for inner in parts(part))]:
        for name in names:
            value = getattr(holder, name, None)
            if value is not None:
                return value
    return None


def pixel_guesses(model: PreTrainedModel, source: Source, takes: Any) -> Iterator[dict[str, Any]]:
    config = model.config
    size = find(config, "image_size", "img_size", "input_size") or IMAGE
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    channels = find(config, "num_channels", "in_channels", "in_chans") or 3
    frames = find(config, "num_frames") or 4
    if "image_grid_thw" in takes or "grid_thw" in takes:
        patch, temporal = find(config, "patch_size") or 8, find(config, "temporal_patch_size") or 1
        grid = torch.tensor([[1, 4, 4]] * BATCH)
        name = "image_grid_thw" if "image_grid_thw" in takes else "grid_thw"
        yield {"pixel_values": source(16 * BATCH, channels * temporal * patch * patch), name: grid}
    yield {"pixel_values": source(BATCH, channels, height, width)}
    yield {"pixel_values": source(BATCH, frames, channels, height, width)}
    yield {"pixel_values": source(BATCH, 1, channels, height, width)}
    yield {"pixel_values": source(BATCH, channels, 2 * height, 2 * width)}
    yield {"pixel_values": source(BATCH, channels, 64, 64)}


def patch_guesses(model: PreTrainedModel, source: Source, takes: Any) -> Iterator[dict[str, Any]]:
    """The patches of two images of different size in one row, as vision towers take them that attend within images."""
    patch, channels = find(model.config, "patch_size") or PATCH, find(model.config, "num_channels", "in_channels") or 3
    temporal = find(model.config, "temporal_patch_size", "patch_temporal") or 1
    along: dict[str, Any] = {"grid_thw": torch.tensor([[1, 4, 4], [1, 4, 8]])}
    if "merge_sizes" in takes:
        along["merge_sizes"] = torch.tensor([2, 2])
    name = "hidden_states" if "hidden_states" in takes else "pixel_values"
    yield {name: source(48, channels * temporal * patch * patch), **along}
    yield {name: source(48, channels, patch, patch), **along}


def sound_guesses(model: PreTrainedModel, source: Source, name: str) -> Iterator[dict[str, Any]]:
    """Sound of one row shorter than the other, where the model takes a mask of it, then of rows of one length."""
    mels = find(model.config, "num_mel_bins", "feature_size", "input_feat_per_channel", "n_mels", "input_dim") or 16
    frames = 2 * (find(model.config, "max_source_positions") or 20)
    takes = inspect.signature(model.forward).parameters
    masks = [m for m in ("input_features_mask", "padding_mask", "attention_mask") if m in takes]
    masks = [m for m in masks if m != "attention_mask" or "input_ids" not in takes]
    shapes: list[tuple[int, ...]] = [(6400,), (1, 6400)] if name == "input_values" else []
    for length in (frames, 40, 160, find(model.config, "max_length")):
        shapes += [(mels, length), (length, mels)] if isinstance(length, int) else []
    for shape in (*shapes, (6400,)):
        sound = source(BATCH, *shape)
        for mask in masks:
            kept = torch.ones(BATCH, max(shape), dtype=torch.long)
            kept[0, -max(shape) // 4 :] = 0
            yield {name: sound, mask: kept}
        yield {name: sound}

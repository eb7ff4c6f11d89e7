"""A language model of one's own with the flag on it, which works wherever transformers' attention interface is called.

    python examples/own_model.py

Two things make it so. The model makes its masks with `create_causal_mask`, and its attention calls what
`ALL_ATTENTION_FUNCTIONS` holds for `config._attn_implementation`.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Cache,
    DynamicCache,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import attn_plugins as ap


class OwnConfig(PreTrainedConfig):
    model_type = "own"

    vocab_size: int = 97
    hidden_size: int = 32
    num_hidden_layers: int = 3
    num_attention_heads: int = 4
    max_position_embeddings: int = 256


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `attn_implementation="eager"` means; the other implementations are transformers' own."""
    scores = query @ key.transpose(2, 3) * scaling
    weights = (scores if attention_mask is None else scores + attention_mask).softmax(dim=-1)
    return (nn.functional.dropout(weights, dropout, module.training) @ value).transpose(1, 2), weights


class OwnAttention(nn.Module):
    is_causal = True

    def __init__(self, config: OwnConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.out = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self, x: torch.Tensor, attention_mask: Any, past_key_values: Cache | None, **kwargs: Any
    ) -> torch.Tensor:
        query, key, value = (
            part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1)
        )
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        attended, _ = attend(self, query, key, value, attention_mask, scaling=self.head_dim**-0.5, **kwargs)
        return self.out(attended.flatten(2))


class OwnBlock(nn.Module):
    def __init__(self, config: OwnConfig, layer_idx: int):
        super().__init__()
        self.attention = OwnAttention(config, layer_idx)
        self.mlp = nn.Sequential(
            nn.Linear(config.hidden_size, 4 * config.hidden_size),
            nn.GELU(),
            nn.Linear(4 * config.hidden_size, config.hidden_size),
        )
        self.norms = nn.ModuleList(nn.LayerNorm(config.hidden_size) for _ in range(2))

    def forward(self, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        x = x + self.attention(self.norms[0](x), **kwargs)
        return x + self.mlp(self.norms[1](x))


class OwnForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = OwnConfig
    base_model_prefix = "own"
    _supports_sdpa = True
    _supports_attention_backend = True

    def __init__(self, config: OwnConfig):
        super().__init__(config)
        self.words = nn.Embedding(config.vocab_size, config.hidden_size)
        self.places = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.blocks = nn.ModuleList(OwnBlock(config, index) for index in range(config.num_hidden_layers))
        self.head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.words

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        x = self.words(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            seen = 0 if past_key_values is None else past_key_values.get_seq_length()
            position_ids = torch.arange(seen, seen + x.shape[1], device=x.device).unsqueeze(0)
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=x,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        x = x + self.places(position_ids)
        for block in self.blocks:
            x = block(x, attention_mask=mask, past_key_values=past_key_values)
        logits = self.head(x)
        loss = None if labels is None else self.loss_function(logits, labels, vocab_size=self.config.vocab_size)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)


AutoConfig.register("own", OwnConfig, exist_ok=True)
AutoModelForCausalLM.register(OwnConfig, OwnForCausalLM, exist_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--attention", default="linear", help="a registered name; attn-plugins list tells all")
    parser.add_argument("--save", type=Path, help="folder to save the model to")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    ids = torch.randint(3, 97, (1, 12))
    how = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}

    model = AutoModelForCausalLM.from_config(OwnConfig(attn_plugin=arguments.attention)).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:  # random weights large enough for attention to matter
            nn.init.normal_(parameter, std=0.3)
    print(ap.describe_attention(model))
    print("says      ", model.generate(ids, **how)[0, 12:].tolist())
    with tempfile.TemporaryDirectory() as temporary:
        model.save_pretrained(arguments.save or temporary)
        again = AutoModelForCausalLM.from_pretrained(arguments.save or temporary).eval()
    print("loaded    ", again.generate(ids, **how)[0, 12:].tolist())
    print("its own   ", ap.restore_attention(model).generate(ids, **how)[0, 12:].tolist())
    ap.swap_attention(model, arguments.attention, layers=0)
    print("one layer ", model.generate(ids, **how)[0, 12:].tolist())


if __name__ == "__main__":
    main()

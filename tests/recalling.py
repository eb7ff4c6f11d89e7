"""A tokenizer for rows of recall, and models that are built to recall, or not to."""

import types

import torch
from conftest import SPECIAL, WORDS
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from attn_plugins.data.recall import WORDS as RECALLED

SAID = ["The", "pass", "key", "is", "Remember", "it", "What", "code", "of", "?", ":", *"ABCDEF0123456789"]


def spelling():
    """A tokenizer with a token for each word of the rows, and for each digit."""
    known = dict.fromkeys([*SPECIAL.values(), *SAID, *WORDS, *RECALLED])
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(known)}, unk_token="<unk>"))
    digits = pre_tokenizers.Digits(individual_digits=True)
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), digits])
    return PreTrainedTokenizerFast(tokenizer_object=made, **SPECIAL)


def tiny(**changes):
    """A random decoder for this tokenizer, far from uniform."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "max_position_embeddings": 512}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = {"vocab_size": len(spelling()), "initializer_range": 0.5, **sizes, **heads, **changes}
    return LlamaForCausalLM(LlamaConfig(**config)).eval()


class Copier(nn.Module):
    """Predicts what followed where the longest run of the last tokens stood before, within ``reach`` tokens."""

    def __init__(self, reach=10**6):
        super().__init__()
        self.reach = reach
        self.size = nn.Parameter(torch.tensor(8.0))
        self.config = types.SimpleNamespace(get_text_config=lambda **_: types.SimpleNamespace())

    def next(self, ids):
        """The token after ``ids``, 0 where nothing stood before."""
        best, found = 0, 0
        for at in range(max(0, len(ids) - self.reach), len(ids) - 1):
            run = 0
            while run <= at and ids[at - run] == ids[len(ids) - 1 - run]:
                run += 1
            if run >= max(best, 1):
                best, found = run, ids[at + 1]
        return found

    def forward(self, input_ids, use_cache=False):
        chosen = torch.tensor([[self.next(row[: n + 1]) for n in range(len(row))] for row in input_ids.tolist()])
        logits = nn.functional.one_hot(chosen, len(spelling())).float() * self.size
        return types.SimpleNamespace(logits=logits)

"""The caches of conversations between their turns: a server that gets all of a conversation reads what is new of it.

transformers' server makes a new cache for each request. Here the cache of a prompt is kept, all but the prompt's last
token, and a request that begins with the same tokens goes on from there. Nothing is cropped and nothing is guessed:
states that cannot go back are never asked to, and a prompt that differs anywhere is read from its first token on. The
answer is read again with the next turn, as the chat template writes it, which need not be as it was generated.
"""

import copy
from typing import Any

import torch
from transformers import Cache, DynamicCache

from attn_plugins.hf.caches.cache_layers import cache_bytes

PIECE = 2048
"""Tokens of a prompt that are read at once, where the request's settings say nothing else."""

PLAIN = {
    "num_beams": (None, 1),
    "num_return_sequences": (None, 1),
    "use_cache": (None, True),
    "cache_implementation": (None,),
    "prompt_lookup_num_tokens": (None,),
    "assistant_early_exit": (None,),
    "use_mtp": (None, False),
    "penalty_alpha": (None,),
}
"""Settings of a generation that goes on from a cache of one row as it is; others get what transformers gives them."""


class Conversations:
    """The caches of one model's conversations, in so many bytes; what was asked for longest ago goes first.

    One thread at a time may call it, as transformers' server does: it answers a model's requests one after another.
    """

    def __init__(self, room: int):
        self.room = room
        self.held: list[tuple[torch.Tensor, Cache]] = []
        """Tokens (K,) on the CPU and the cache that has read them, the newest last."""

    @property
    def num_bytes(self) -> int:
        """Bytes of all caches that are held."""
        return sum(cache_bytes(cache) for _, cache in self.held)

    def generate(self, model: Any, **given: Any) -> Any:
        """What ``model.generate(**given)`` returns; ``given`` has a ``generation_config``."""
        generate = type(model).generate  # not the instance's, which may be this
        if not self._can_hold(model, given):
            return generate(model, **given)
        ids_BN = given["input_ids"]
        tokens, last = ids_BN[0].cpu(), ids_BN.shape[1] - 1
        config = given["generation_config"] = copy.deepcopy(given["generation_config"])
        piece, config.prefill_chunk_size = config.prefill_chunk_size or PIECE, None
        reading = {name: x for name, x in given.items() if name != "streamer"}
        reading["generation_config"] = copy.deepcopy(config)
        reading["generation_config"].update(max_new_tokens=1, do_sample=False)
        cache = self._take(tokens) or DynamicCache(config=model.config)
        for end in (*range(cache.get_seq_length() + piece, last, piece), last):
            if end > cache.get_seq_length():  # one new token, which the cache does not get
                part = {"input_ids": ids_BN[:, :end], "attention_mask": torch.ones_like(ids_BN[:, :end])}
                generate(model, **{**reading, **part}, past_key_values=cache)
        self._hold(tokens[:last], copy.deepcopy(cache))
        return generate(model, **given, past_key_values=cache)

    def _can_hold(self, model: Any, given: dict[str, Any]) -> bool:
        """Whether this is a text, of one row and without padding, that a model of text alone goes on with plainly."""
        if given.keys() - {"input_ids", "attention_mask", "generation_config", "tokenizer", "streamer"}:
            return False
        ids, mask, config = given.get("input_ids"), given.get("attention_mask"), given["generation_config"]
        if ids is None or len(ids) != 1 or ids.shape[1] < 2 or (mask is not None and not bool(mask.all())):
            return False
        # What a request leaves open is what the model's own settings say.
        own = model.generation_config
        said = {name: getattr(own if getattr(config, name, None) is None else config, name, None) for name in PLAIN}
        return (
            all(said[name] in allowed for name, allowed in PLAIN.items())
            and model.config.get_text_config(decoder=True) is model.config
            and model._supports_default_dynamic_cache()
        )

    def _take(self, tokens: torch.Tensor) -> Cache | None:
        """The cache that has read most of what these begin with, all but the last at most; it is held no more."""
        best = None
        for entry in self.held:
            read = entry[0]
            begins = len(read) < len(tokens) and torch.equal(read, tokens[: len(read)])
            if begins and (best is None or len(read) > len(best[0])):
                best = entry
        if best is None:
            return None
        self.held = [entry for entry in self.held if entry is not best]
        return best[1]

    def _hold(self, tokens: torch.Tensor, cache: Cache) -> None:
        self.held.append((tokens, cache))
        while self.held and self.num_bytes > self.room:
            del self.held[0]

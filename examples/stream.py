"""Talk to a model for as long as you like through one cache of bounded size.

    python examples/stream.py                                   turns from the terminal, or one a line from a pipe
    python examples/stream.py --prompt "Hello" --prompt "And?"  turns from the command line

All turns share one stock cache. With `local`, it holds the first few tokens and a window of the last ones, so the
thousandth turn costs as much memory and time a token as the first; what has left the window is forgotten. Positions are
counted within the cache, so that no distance comes up that the model was not trained on.
"""

import argparse
import sys
from collections.abc import Iterator
from typing import Any

import torch
from transformers import DynamicCache, TextStreamer

from attn_plugins import cache_bytes
from attn_plugins.training.evaluate import place
from attn_plugins.training.models import DEMO, load

REPLY = "<reply>"


def turns(given: list[str] | None) -> Iterator[str]:
    """The prompts of the command line, else lines of standard input until it ends."""
    if given:
        yield from given
        return
    while True:
        if sys.stdin.isatty():
            print("> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.rstrip("\n")


def encode(tokenizer: Any, turn: str, ids: torch.Tensor, ends: list[int]) -> torch.Tensor:
    """Tokens of a turn that follows ``ids`` (1, K), in the marks of the model's chat template if it has one."""
    first = ids.shape[1] == 0
    if tokenizer.chat_template is None:
        text = turn if first else f"\n{turn}"
        return tokenizer(text, add_special_tokens=first, return_tensors="pt")["input_ids"]
    messages = [{"role": "user", "content": turn}]
    if not first:  # a template writes whole conversations: write one with a reply in it, and take what follows that
        messages = [{"role": "user", "content": "-"}, {"role": "assistant", "content": REPLY}, *messages]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    text = text if first else text.partition(REPLY)[2]
    new = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    ended = not first and int(ids[0, -1]) in ends and int(new[0, 0]) in ends
    return new[:, 1:] if ended else new  # where the reply ended by itself, the template need not end it


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=DEMO, help="a folder, a name on the hub, or %(default)s (the default)")
    parser.add_argument("--attention", default="local", help="a name of `attn-plugins list`, or null for the model's")
    parser.add_argument("--window-size", type=int, help="keys of the window (default 512 for local)")
    parser.add_argument("--num-sink-tokens", type=int, help="first tokens that stay (default 4 for local)")
    parser.add_argument("--positions", help="of the sinks: cache or true (default cache for local)")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="longest reply (default %(default)s)")
    parser.add_argument("--sample", action="store_true", help="draw tokens at random; the likeliest ones otherwise")
    parser.add_argument("--prompt", action="append", help="a turn; repeat it for more, leave it out to read from stdin")
    args = parser.parse_args()

    given = {name: getattr(args, name) for name in ("window_size", "num_sink_tokens", "positions")}
    given = {name: value for name, value in given.items() if value is not None}
    rule: dict[str, Any] | None = {"type": args.attention, **given}
    if args.attention == "local":
        rule = {"window_size": 512, "num_sink_tokens": 4, "positions": "cache", **rule}
    if args.attention == "null":
        if given:
            parser.error(f"the model's own attention takes no options, got {', '.join(given)}")
        rule = None
    try:
        loaded = place(load(args.model, attention=rule))
    except ValueError as error:
        parser.error(str(error))
    model, tokenizer = loaded.model.eval(), loaded.tokenizer

    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    ids = torch.empty(1, 0, dtype=torch.long, device=model.device)
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    for turn in turns(args.prompt):
        new = encode(tokenizer, turn, ids, ends).to(model.device)
        # generate() takes all tokens so far, and gives the model those that the cache has not seen.
        ids = torch.cat([ids, new], dim=1)
        ids = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            # Not with a cache in use: transformers 5.17 would read the whole text again.
            prefill_chunk_size=512 if cache.get_seq_length() == 0 else None,
            max_new_tokens=args.max_new_tokens,
            do_sample=args.sample,
            pad_token_id=ends[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
            streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        )
        print(f"[{cache.get_seq_length()} tokens seen, cache {cache_bytes(cache)} bytes]", flush=True)


if __name__ == "__main__":
    main()

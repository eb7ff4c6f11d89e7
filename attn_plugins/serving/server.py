"""transformers' server, for one model that is loaded, and swapped if that is wanted, before it listens."""

import functools
from collections import Counter
from typing import Any

from transformers import PreTrainedModel
from transformers.cli.serve import Serve
from transformers.cli.serving.utils import split_model_id

from attn_plugins.config.extras import need
from attn_plugins.hf.swap import describe_attention, restore_attention, swap_attention
from attn_plugins.serving.conversations import Conversations
from attn_plugins.training.models import AS_SAVED, one_line, read_adapter, read_attention, resolve


class Server(Serve):
    """A server that has its model and does not listen yet: ``run()`` does, until a signal ends it.

    Args:
        source: a folder, a name on the hub, or the demo's model.
        attention: rules, as in ``config.attn_plugin``, ``None`` for the model's own attention, or "as-saved".
        room: bytes for the caches of conversations that may go on; 0 holds none.
        options: transformers' own, by their names in :class:`transformers.cli.serve.Serve`.

    Raises:
        ValueError: a package is missing, there is no such model, it cannot be served like this, or an option is wrong.
    """

    def __init__(self, source: str, *, attention: Any = AS_SAVED, room: int = 2**30, **options: Any):
        need("fastapi", "serve")
        need("uvicorn", "serve")
        need("openai", "serve")
        attention = read_attention(attention)
        if room < 0:
            raise ValueError(f"got {room} bytes for caches; allowed: 0 and more")
        self.model_id = resolve(source)
        if read_adapter(self.model_id) is not None:
            raise ValueError(
                f"{source!r} is an adapter of PEFT, which transformers' server does not load; merge it into its base "
                "model and save that: model.merge_and_unload().save_pretrained(...)"
            )
        super().__init__(None, non_blocking=True, **options)
        models: Any = self._model_manager
        paged = options.get("continuous_batching", False)
        models._load_model = functools.partial(_load, models._load_model, attention, paged, room)
        # It lists what is in the hub's cache, which this model need not be in; and clients ask it for their model.
        listed = {"id": self.model_id, "object": "model", "created": 0, "owned_by": "attn-plugins"}
        models.get_gen_models = lambda: [listed]
        models.force_model, models.model_timeout = self.model_id, -1
        with one_line(source):
            self.loaded()

    def start_server(self) -> None:
        """Nothing yet. transformers' class, told not to block, calls it when all but the model is made."""

    def loaded(self) -> tuple[PreTrainedModel, Any]:
        """The model that answers now, and its tokenizer or processor; loaded again if a request had it dropped."""
        models: Any = self._model_manager
        name, file = split_model_id(self.model_id)
        return models.load_model_and_processor(models.process_model_name(name), gguf_file=file)

    def describe(self) -> list[str]:
        """What a user has to know, a line each: what is served, how to ask for it, what is held."""
        model, processor = self.loaded()
        counts = Counter(row.plugin or "its own attention" for row in describe_attention(model))
        layers = ", ".join(f"{name} in {count}" for name, count in counts.items()) or "no attention that is known"
        at = f"http://{self.server.config.host}:{self.server.config.port}/v1"
        lines = [f"serving {self.model_id}: {layers}", f'OpenAI clients: base_url="{at}", model="{self.model_id}"']
        if getattr(processor, "chat_template", None) is None:
            lines.append("note: its tokenizer has no chat template, so /v1/completions is all that it can answer")
        return lines

    def run(self) -> None:
        """Answer requests, in this thread, until a signal or ``server.should_exit``; those begun are ended first."""
        try:
            self.server.run()
        finally:
            self._generation_state.shutdown()  # else a thread of continuous batching goes on, and so does the process


def _load(load: Any, attention: Any, paged: bool, room: int, *args: Any, **kwargs: Any) -> PreTrainedModel:
    """A model as transformers' server loads it, at its start and after a request to ``/reset``, made ready for this."""
    model: Any = load(*args, **kwargs)
    if attention is None:
        restore_attention(model)
    elif attention != AS_SAVED:
        swap_attention(model, attention)
    swapped = {row.plugin for row in describe_attention(model)} - {None}
    if paged and swapped:
        raise ValueError(
            "--continuous-batching keeps the keys and values of all layers in pages, which other attentions than the "
            f"model's own do not read, got {', '.join(sorted(map(str, swapped)))}; allowed: without it, requests are "
            "answered one after another"
        )
    if room and not paged:
        model.generate = functools.partial(Conversations(room).generate, model)
    return model

"""Configs of the recurrent models. What they have in common stands in one class: one set of layers serves all."""

from typing import Any, ClassVar

from transformers import PreTrainedConfig

CELLS = ("lstm", "gru", "rnn")
ATTENTIONS = ("luong", "bahdanau", "none")
INITIAL_STATES = ("mean", "last", "ends")
POOLINGS = ("attention", "mean", "max", "last")
SWITCHES = ("bidirectional", "self_attention", "input_feeding", "add_cross_attention")


class RecurrentConfig(PreTrainedConfig):
    """What all recurrent models have.

    Args:
        vocab_size: number of tokens.
        hidden_size: size of embeddings, of the states of a layer (of both directions together) and of all heads.
        num_layers: recurrent layers, one on the other; of an encoder-decoder, in each of the two.
        cell: lstm, gru, or rnn (tanh).
        num_attention_heads: heads of each attention module.
        dropout: of embeddings, between recurrent layers and of what is read out, in training.
        attention_dropout: of attention weights, in training.
    """

    attribute_map: ClassVar[dict[str, str]] = {"num_hidden_layers": "num_layers"}
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    vocab_size: int = 32000
    hidden_size: int = 256
    num_layers: int = 1
    cell: str = "lstm"
    num_attention_heads: int = 1
    dropout: float = 0.1
    attention_dropout: float = 0.0
    pad_token_id: int | None = 0
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    use_cache: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)  # first, since it sets what goes by another name: num_hidden_layers
        for name, allowed in self._choices().items():
            _refuse(getattr(self, name) not in allowed, name, getattr(self, name), ", ".join(allowed))
        for name in ("vocab_size", "hidden_size", "num_layers", "num_attention_heads"):
            got = getattr(self, name)
            _refuse(type(got) is not int or got < 1, name, got, "an integer from 1 on")
        for name in ("dropout", "attention_dropout"):
            got = getattr(self, name)
            _refuse(type(got) not in (int, float) or not 0 <= got < 1, name, got, "a probability from 0 to below 1")
        for name in SWITCHES:
            got = getattr(self, name, False)
            _refuse(type(got) is not bool, name, got, "True, False")
        heads, halves = self.num_attention_heads, 2 if getattr(self, "bidirectional", False) else 1
        for parts, why in ((heads, f"num_attention_heads={heads}"), (halves, "the two directions")):
            wrong = self.hidden_size % parts != 0
            _refuse(wrong, "hidden_size", self.hidden_size, f"a multiple of {parts}, for {why}")

    def _choices(self) -> dict[str, tuple[str, ...]]:
        """Fields that are one of a few words, with these."""
        return {"cell": CELLS}


class RecurrentEncoderConfig(RecurrentConfig):
    """An encoder of one direction or two.

    Args:
        bidirectional: whether each layer reads from both ends, half of ``hidden_size`` each.
        self_attention: whether the states attend to one another, once, after the last layer.
        pooling: what a classifier reads: ``attention`` of a learned query over the states, their mean or max, or the
            last state of each direction.
    """

    model_type = "recurrent_encoder"

    bidirectional: bool = True
    self_attention: bool = True
    pooling: str = "attention"
    classifier_dropout: float | None = None
    tie_word_embeddings: bool = False

    def _choices(self) -> dict[str, tuple[str, ...]]:
        return {"cell": CELLS, "pooling": POOLINGS}


class RecurrentDecoderConfig(RecurrentConfig):
    """A causal language model, with attention over the states of an encoder where it has one.

    Args:
        attention: where attention enters. ``luong``: after the cell, whose state asks; ``bahdanau``: before the cell,
            whose state before the step asks, and whose input is the answer; ``none``: nowhere, what the decoder knows
            of the encoder is its initial state.
        input_feeding: whether the cell reads what was read out in the step before (with ``luong``).
        initial_state: what the initial state is a function of: the ``mean`` of the encoder's states, the ``last`` of
            them, or its two ``ends``, the last of the forward and the first of the backward direction.
        add_cross_attention: whether there is an encoder at all.
        cross_attention_hidden_size: size of the encoder's states; None for ``hidden_size``.
    """

    model_type = "recurrent_decoder"

    attention: str = "luong"
    input_feeding: bool = False
    initial_state: str = "mean"
    is_decoder: bool = True
    add_cross_attention: bool = True
    cross_attention_hidden_size: int | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        _check_feeding(self)

    def _choices(self) -> dict[str, tuple[str, ...]]:
        return {"cell": CELLS, "attention": ATTENTIONS, "initial_state": INITIAL_STATES}


class RecurrentSeq2SeqConfig(RecurrentConfig):
    """An encoder and a decoder of the same sizes; the fields are those of the two.

    Args:
        decoder_start_token_id: what the decoder reads first; None for ``bos_token_id``, or ``pad_token_id`` where that
            is None too.
        tie_word_embeddings: one matrix for the embeddings of both sides and for the output.
    """

    model_type = "recurrent_seq2seq"

    bidirectional: bool = True
    self_attention: bool = False
    attention: str = "luong"
    input_feeding: bool = False
    is_encoder_decoder: bool = True
    decoder_start_token_id: int | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if "initial_state" in kwargs:
            follows = "nothing, since it follows from bidirectional"
            _refuse(True, "initial_state", kwargs["initial_state"], follows)
        super().__post_init__(**kwargs)
        _check_feeding(self)

    @property
    def initial_state(self) -> str:
        """As in RecurrentDecoderConfig: what an encoder of this kind knows of the whole source."""
        return "ends" if self.bidirectional else "last"

    def _choices(self) -> dict[str, tuple[str, ...]]:
        return {"cell": CELLS, "attention": ATTENTIONS}


def _check_feeding(config: Any) -> None:
    wrong = config.input_feeding and config.attention != "luong"
    _refuse(wrong, "input_feeding", True, f"False, where attention={config.attention!r}: it goes with 'luong'")


def _refuse(wrong: bool, name: str, got: Any, allowed: str) -> None:
    if wrong:
        raise ValueError(f"{name}={got!r}; allowed: {allowed}")

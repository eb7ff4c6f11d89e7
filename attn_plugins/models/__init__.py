"""Recurrent models with attention, as models of transformers: LSTM, GRU and RNN that read, write and classify."""

# First of all: as soon as it is there, auto classes are told of the models, which then have to be whole.
import transformers  # noqa: F401

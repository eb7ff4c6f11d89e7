"""Recurrent models with attention, as models of transformers: LSTM, GRU and RNN that read, write and classify."""

"""The only bridge to transformers' internals: discovery, dispatch, swap and restore, and the patches."""

"""The only bridge to transformers' internals: discovery, dispatch, swap and restore, and the patches."""

# Importing it brings the patches, which import the other files here: before one of these is half imported itself.
import transformers  # noqa: F401

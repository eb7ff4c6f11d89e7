"""Recurrences with gates and the delta rule, in chunks, token by token."""

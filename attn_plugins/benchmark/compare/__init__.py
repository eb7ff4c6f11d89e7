"""Models with attentions, measured beside each other: settings, cells, models, report."""

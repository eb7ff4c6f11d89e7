"""Several comparisons as one: settings, which models which part is for, one report."""

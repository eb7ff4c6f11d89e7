"""report.html: what comparisons found, as one file that a browser shows without a network."""

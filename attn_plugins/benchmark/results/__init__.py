"""What a benchmark has measured: cells, records on disk, tables and frames of plots."""

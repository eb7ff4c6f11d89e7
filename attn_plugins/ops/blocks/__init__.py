"""Keys chosen by the scores, block by block or line by line."""

"""Linear attention: feature maps and sums of features."""

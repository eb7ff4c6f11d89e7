"""What each head of a model looks at, for every attention: weights of chosen queries, and figures of them."""

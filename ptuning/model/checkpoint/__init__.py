"""Stored weights: which files, which tensors, what is wrong with them, and a model of them."""

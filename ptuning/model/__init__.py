"""Tensors in, tensors out: ChatGLM, its prefix, and their checkpoints."""

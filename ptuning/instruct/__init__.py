"""Instruction data from a model: prompts, completions to tasks, filters, similarity, resume."""

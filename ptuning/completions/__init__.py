"""Completions of prompts: from the engine or an endpoint, saved as they arrive."""

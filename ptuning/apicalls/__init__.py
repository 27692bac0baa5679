"""API calls from a model: cards, retrieval, prompts, and what an answer's call is worth."""

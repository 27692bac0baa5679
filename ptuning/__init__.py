"""P-Tuning v2 for ChatGLM-6B."""

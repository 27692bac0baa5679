"""The embedded default: a small ChatGLM, and how it was made."""

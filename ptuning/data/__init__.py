"""Text in, token sequences out: reading, prompt building, tokenising, batching."""

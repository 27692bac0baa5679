"""Data selection: clean, near-duplicates, scores, a diverse choice."""

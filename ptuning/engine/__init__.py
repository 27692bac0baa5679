"""Continuous batching: sequences join and leave one batch at any step, each with its prefix."""

"""Continuous batching: rows are admitted and evicted at any step, each with its own prefixes."""

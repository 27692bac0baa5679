"""Runs that can stop at any moment and go on exactly: checkpoints, state, lock, signals."""

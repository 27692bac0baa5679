"""The memory of a step: predicted, planned, saved by recomputing, explained when it is short."""

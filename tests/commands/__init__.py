"""Tests of the commands of `python -m ptuning`."""

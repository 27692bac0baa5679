"""The commands of `python -m ptuning`, one module each."""

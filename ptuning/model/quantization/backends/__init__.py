"""Ways to multiply by a packed weight, each behind the interface in `interface.py` and tested
against the reference.
"""

"""Frozen int8 and int4 layers with the published numbers: a plain reference and fast back ends."""

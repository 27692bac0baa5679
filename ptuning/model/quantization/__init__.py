"""Frozen int8 and int4 linears with the published numbers, a plain reference, and the fast back
ends beside it.
"""

"""Strings in, numbers and pages out: metrics, predictions, report."""

"""Maintenance: the environment, the tables and the pictures of the documentation."""

"""Embedded models and the command that rebuilds them."""

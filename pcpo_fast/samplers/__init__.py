"""Samplers as step tables."""

from .table import StepTable

__all__ = ["StepTable"]

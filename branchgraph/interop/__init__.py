"""Weights and graphs of other programs."""

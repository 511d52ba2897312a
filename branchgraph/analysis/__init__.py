"""Measuring networks: threshold sweeps, and their plots."""

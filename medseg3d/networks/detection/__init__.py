"""Detectors: their operations, heads and networks."""

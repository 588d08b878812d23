"""Encoders that networks are built on."""

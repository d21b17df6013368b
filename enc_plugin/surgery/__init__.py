"""Conversion, folding and audit of networks, based on a recorded forward pass."""

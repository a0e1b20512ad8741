"""Arithmetic without a device: bytes, FLOPs, what fits."""

"""Layers that compute on the local part of sharded parameters."""

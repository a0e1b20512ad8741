"""What a test of sharded code needs: ranks, a float64 reference, tiny models, an operator counter.

Public, so that a user's own model or layer can be proven the way ours are. Nothing is imported
here: a spawned rank pays for every import, and only `models.py` needs transformers.
"""

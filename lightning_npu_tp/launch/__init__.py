"""Ranks start, meet, live and end together. Knows no model and no checkpoint."""

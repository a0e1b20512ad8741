"""Layout, plan, collectives and what is built on them: tensor region, clipping, recompute. Knows no model."""

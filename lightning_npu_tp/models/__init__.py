"""All that knows a model: families, layers, the mixture block, and how its weights are named in files."""

"""Training state in files: saved from any layout, loaded into any other."""

"""Hugging Face files in and out: read slice by slice, exported under the published names, downloaded."""

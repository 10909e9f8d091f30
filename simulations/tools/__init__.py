"""Commands around a run: data, merging and generation."""

"""What one hostile client can do to a run: nothing but lose its own round."""

"""The benchmark of the training engines."""

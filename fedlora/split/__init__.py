"""Split learning: a model cut in two, whose activations and gradients cross a wire."""

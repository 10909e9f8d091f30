"""What a model does on held-out examples, in numbers."""

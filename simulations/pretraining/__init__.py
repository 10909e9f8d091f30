"""Pre-training of the models that ship with fedlora."""

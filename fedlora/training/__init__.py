"""One client's optimisation, in plain PyTorch."""

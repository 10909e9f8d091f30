"""Pruning a frozen base model: which weights stay, what text says of them, and their masks."""

"""Differential privacy: of a client's contribution to every round, or of a client's examples."""

"""Secure aggregation: the server learns the sum of what clients add, and no summand."""

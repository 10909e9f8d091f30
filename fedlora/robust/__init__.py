"""Robust averages: what takes the place of a sum when some clients may send anything."""

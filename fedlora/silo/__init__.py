"""Silos: nodes that are clients themselves, with records, rank and device of their own."""

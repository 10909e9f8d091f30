"""Benchmarks: one question per file, answered in its docstring and its results."""

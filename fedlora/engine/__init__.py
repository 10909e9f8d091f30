"""Engines: how the jobs of a cohort are executed."""

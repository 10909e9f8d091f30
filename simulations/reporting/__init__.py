"""Finished runs read back, as figures and reports."""

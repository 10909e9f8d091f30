"""Factors over a base that has moved: what methods of several techniques send."""

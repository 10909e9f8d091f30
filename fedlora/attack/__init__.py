"""Attacks: clients that train on other records or send other updates than they should."""

"""The format of updates in messages."""

"""Values, configuration and files: the room that all others import."""

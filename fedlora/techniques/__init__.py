"""One folder per kind of update: how a client trains it, and how it travels and is stored."""

"""The same training on one machine, without federation."""

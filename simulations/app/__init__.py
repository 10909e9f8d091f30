"""The Flower app: from a configuration to a finished run."""

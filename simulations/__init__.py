"""Entry points: compose a configuration, start Flower on Ray, record the run."""

"""Studies: matrices of runs over methods, settings and seeds, from one YAML file."""

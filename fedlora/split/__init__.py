"""Split learning: a model cut into stages that different parties hold and train."""

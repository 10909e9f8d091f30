"""The clients: resource tiers, ranks, and the cohort of a round."""

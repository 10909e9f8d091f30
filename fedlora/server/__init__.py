"""The federated run as the server sees it."""

"""Who the clients are, what they can hold and who takes part."""

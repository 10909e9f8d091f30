"""Many clients' adapters trained and evaluated in one forward over one frozen model."""

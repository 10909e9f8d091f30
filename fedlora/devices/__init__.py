"""What clients' devices can do, when they are available, and how long a round takes on them."""

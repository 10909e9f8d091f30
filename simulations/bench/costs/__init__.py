"""What every method costs beside FedIT: times, traffic, exactness, and what clients keep."""

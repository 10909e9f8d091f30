"""One file per federated method, and `base.py`, the only one that speaks to Flower."""

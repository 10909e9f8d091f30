"""The guard of the numbers: small runs whose bits are on record (README.md in this folder)."""

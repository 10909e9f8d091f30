"""How names of data files end. Apart from their readers, which import NumPy."""

SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow")
"""Names of data files in a folder, but for a suffix of compression."""
COMPRESSED = (".gz", ".zst", ".zstd")

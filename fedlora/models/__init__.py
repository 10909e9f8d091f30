"""Base models and what is mounted on them: the only package that knows transformers and PEFT."""

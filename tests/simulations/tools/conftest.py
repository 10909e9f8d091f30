"""The data tests' small tokenizer, for the commands that look at data."""

from tests.fedlora.data.conftest import tokenizer_folder

__all__ = ["tokenizer_folder"]

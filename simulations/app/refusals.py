"""Combinations that are refused before anything is loaded: the first wrong one, in one sentence."""

from collections.abc import Iterable

from fedlora.core.errors import ConfigError


def refuse(conditions: Iterable[tuple[bool, str]], words: str = "") -> None:
    """Refuse the first condition that holds.

    Args:
        conditions: each with the sentence that says why, and what to use instead.
        words: what a user chose, in front of the sentence: ``secagg=real``.

    Raises:
        ConfigError: with that sentence.
    """
    for wrong, why in conditions:
        if wrong:
            raise ConfigError(f"{words}: {why}" if words else why)

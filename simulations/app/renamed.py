"""Keys of earlier versions, answered with the name that they have now."""

from collections.abc import Sequence

from fedlora.core.errors import ConfigError

RENAMED = {
    "client.switch": "client.technique, of client/technique=switchlora",
    "client.self_prune": "client.technique.self_prune, of client/technique=lora",
}
"""Old key, with all below it -> what to write instead."""


def refuse_renamed(overrides: Sequence[str]) -> None:
    """Answer a key that has another name now.

    Raises:
        ConfigError: naming both.
    """
    for word in overrides:
        key, _, value = word.lstrip("+~").partition("=")
        for old, new in RENAMED.items():
            if key == old or key.startswith(f"{old}."):
                raise ConfigError(f"{key} has another name now: use {new}")
        if key == "client.technique" and not value.startswith("{"):
            raise ConfigError(
                f"client.technique={value} is a group of settings now: use client/technique={value}"
            )

"""Federated data: sources of records, and the token store that workers read.

A name is imported from its module when it is first asked for: who needs one small module of this
package is not made to import NumPy and PyTorch.
"""

import importlib
from typing import TYPE_CHECKING, Any

from fedlora.core.errors import DataError

if TYPE_CHECKING:
    from fedlora.data.e2e import E2E
    from fedlora.data.intents import Intents
    from fedlora.data.jsonl import Jsonl
    from fedlora.data.natural_instructions import NaturalInstructions, task_group
    from fedlora.data.records import SPLITS, Record
    from fedlora.data.sotu import Sotu
    from fedlora.data.source import Source
    from fedlora.data.store import ClientInfo, Example, TokenStore, prepare

__all__ = [
    "E2E",
    "SPLITS",
    "ClientInfo",
    "DataError",
    "Example",
    "Intents",
    "Jsonl",
    "NaturalInstructions",
    "Record",
    "Sotu",
    "Source",
    "TokenStore",
    "prepare",
    "task_group",
]

_MODULES = {
    "E2E": "e2e",
    "SPLITS": "records",
    "ClientInfo": "store",
    "Example": "store",
    "Intents": "intents",
    "Jsonl": "jsonl",
    "NaturalInstructions": "natural_instructions",
    "Record": "records",
    "Sotu": "sotu",
    "Source": "source",
    "TokenStore": "store",
    "prepare": "store",
    "task_group": "natural_instructions",
}


def __getattr__(name: str) -> Any:
    """A name of `__all__`, from its module."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)

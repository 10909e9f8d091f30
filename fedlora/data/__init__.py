"""Federated data: sources of records, and the token store that workers read."""

from fedlora.core.errors import DataError
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

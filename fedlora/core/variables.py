"""Environment variables of fedlora: all that it reads or sets, by name.

A user sets the first ten. ``conf`` reads the five of them that name files; the launcher and its
workers set the rest for what they start.
"""

CACHE = "FEDLORA_CACHE"
"""Folder of token stores, converted and pruned models, and interrupted pre-training; default
``~/.cache/fedlora``."""
OUTPUT = "FEDLORA_OUTPUT"
"""Folder in which run folders are made; ``output_dir``."""
NI = "FEDLORA_NI"
"""Natural Instructions; ``data.path`` of ``data=natural_instructions``."""
E2E = "FEDLORA_E2E"
"""The E2E NLG challenge; ``data.path`` of ``data=e2e``."""
GPT2 = "FEDLORA_GPT2"
"""Folder of GPT-2 small; ``model.path`` of ``model=gpt2``."""
GPT2_MEDIUM = "FEDLORA_GPT2_MEDIUM"
"""Folder of GPT-2 medium; ``model.path`` of ``model=gpt2_medium``."""
VERBOSE = "FEDLORA_VERBOSE"
"""Not empty: all lines of Flower and Ray."""
TRACEBACK = "FEDLORA_TRACEBACK"
"""Not empty: a traceback where a configuration is refused."""
ASSETS = "FEDLORA_ASSETS"
"""Folder of the models that ship with fedlora, where they lie apart from its packages."""
ROOT = "FEDLORA_ROOT"
"""Folder that holds the packages with all their files, also those that Flower's bundle lacks."""

CWD = "FEDLORA_CWD"
"""The user's working directory, to which relative paths refer."""
RUN = "FEDLORA_RUN"
"""Mark of all processes of one run, by which the launcher ends those that outlive it."""
FORKS = "FEDLORA_FORKS"
"""Folder with the socket of the process of which a run's workers are forks."""
BENCH = "FEDLORA_BENCH"
"""Mark of all processes of a run that a benchmark watches."""

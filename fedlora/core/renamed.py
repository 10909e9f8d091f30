"""Names of version 0.1 and what they are called now: for messages, not for use.

Nothing here is an alias. Whoever uses an old key or class is told the new one; CHANGELOG.md has the
same table.
"""

from collections.abc import Iterable

KEYS: dict[str, str] = {
    "evaluate.plan.teacher_forced_rouge": "evaluate.plan.metrics.teacher_forced",
}
"""Old key -> new key of the configuration."""

MODULES: dict[str, str] = {
    "fedlora.models.pruned": "fedlora.prune.spec",
    "fedlora.population": "fedlora.population.sampling",
    "fedlora.ranks": "fedlora.population.ranks",
    "fedlora.server_optimizer": "fedlora.algebra.server_optimizer",
    "fedlora.session": "fedlora.server.session",
    "fedlora.split.wire": "fedlora.split.compression",
    "fedlora.tracking": "fedlora.run.tracking",
    "fedlora.types": "fedlora.core.types",
    "simulations.runtime": "simulations.app.runtime",
}
"""Old module -> new module of classes that a ``_target_`` names."""


def answer(names: Iterable[str]) -> str:
    """For the end of a message: what the old ones among some keys or classes are called now.

    Empty where there is none. ``fedlora.types.LocalPlan`` is looked up by its module.
    """
    found = []
    for name in names:
        module, _, cls = name.rpartition(".")
        if name in KEYS:
            found.append(f"{name} is {KEYS[name]} since version 0.2")
        elif module in MODULES:
            found.append(f"{name} is {MODULES[module]}.{cls} since version 0.2")
    return f" ({'; '.join(found)})" if found else ""

"""The examples in a module's docstrings, with the names that the module's own docstring defines."""

import doctest
from types import ModuleType


def run(module: ModuleType) -> int:
    """Run them all; how many there are.

    Raises:
        AssertionError: quoting the examples whose result is another.
    """
    found = [t for t in doctest.DocTestFinder().find(module) if t.examples]
    shared = next((t for t in found if t.name == module.__name__), None)
    said: list[str] = []
    runner = doctest.DocTestRunner()
    for test in sorted(found, key=lambda t: t is not shared):
        if shared is not None:
            test.globs = {**shared.globs, **test.globs}
        runner.run(test, out=said.append, clear_globs=False)
    assert not runner.failures, "".join(said)
    return runner.tries

"""Plant a fault in a function of the product, to see whether a test notices."""

import inspect
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def planted(function: Callable[..., Any], right: str, wrong: str) -> Iterator[None]:
    """Replace a piece of a function's source, wherever the function has been imported to.

    The function keeps its identity and is given other code, so modules that imported it by name
    and instances that hold it run the fault too.

    Args:
        function: a plain function or method; decorators are left as they are.
        right: a piece of its source that occurs once.
        wrong: what stands there instead.

    Raises:
        ValueError: if the piece does not occur exactly once, which means that the source has
            changed and the fault has to follow it.
    """
    inner = inspect.unwrap(function)
    source = textwrap.dedent(inspect.getsource(inner))
    if source.count(right) != 1:
        raise ValueError(
            f"{inner.__qualname__} has {source.count(right)} times {right!r}, not once"
        )
    changed = source.replace(right, wrong)
    scope: dict[str, Any] = dict(inner.__globals__)
    exec(compile(changed, f"<fault in {inner.__qualname__}>", "exec"), scope)
    code = inner.__code__
    inner.__code__ = inspect.unwrap(_bare(scope[inner.__name__])).__code__
    try:
        yield
    finally:
        inner.__code__ = code


def _bare(made: Any) -> Callable[..., Any]:
    """The function under a descriptor such as ``staticmethod`` or ``property``."""
    if isinstance(made, property):
        made = made.fget
    return getattr(made, "__func__", made)

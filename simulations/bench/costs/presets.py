"""The presets of conf/strategy as the benchmark of costs runs them."""

from simulations.app.compose import load
from simulations.app.parts import Parts, build_parts

REFERENCE = "fedit"
"""The method that times are held against."""


def parts_of(preset: str, *words: str) -> Parts:
    """A preset's configuration; what stands last wins."""
    return build_parts(load([f"strategy={preset}", *words]))

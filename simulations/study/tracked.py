"""What a run is within its study, for trackers: its group, its kind, and tags."""

import re
from collections.abc import Mapping
from typing import Any

from simulations.app.words import quoted
from simulations.study.values import Cell

REPORTED, SUMMARY = "reported", "summary"
"""Kinds of runs of a study, beside those of its tuning stage."""
LONGEST_TAG = 64
"""Characters of a tag that W&B accepts."""
_PLAIN = re.compile(r"[\w.:+-]+")
"""Texts that Hydra reads in a list as they are."""


def labels_of(
    study: str, tracking: Mapping[str, Any], cell: Cell, seed: int, stage: str = ""
) -> tuple[str, ...]:
    """Words for a run's tracker, as far as it has such keys: ``tracking.group`` is the name of the
    study unless the run has a group, ``tracking.job_type`` the stage, and ``tracking.tags`` gain
    ``<axis>:<level>`` of each axis and ``seed:<seed>``.

    Args:
        study: its name.
        tracking: the group ``tracking`` of the run's configuration.
        cell: of the run.
        seed: of the run.
        stage: ``tuning``, or empty for a reported run.
    """
    words = []
    if "group" in tracking and not tracking["group"]:
        words.append(f"tracking.group={study}")
    if "job_type" in tracking:
        words.append(f"tracking.job_type={stage or REPORTED}")
    if "tags" in tracking:
        own = [f"{axis}:{level}"[:LONGEST_TAG] for axis, level in (*cell, ("seed", str(seed)))]
        tags = dict.fromkeys([*map(str, tracking["tags"]), *own])
        texts = [tag if _PLAIN.fullmatch(tag) else quoted(tag) for tag in tags]
        words.append(f"tracking.tags=[{','.join(texts)}]")
    return tuple(words)

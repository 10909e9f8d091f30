"""Stands in for an agent of Ray whose services no run asks for (`simulations.app.lean_ray`).

    python ray_agent.py FILE...

The raylet waits for the files in which an agent says its ports, -1 for a service that is off, and
ends when its agent does. This one ends with the raylet. Imports little: it starts with every run.
"""

import os
import sys
import time

POLL_S = 1.0


def main() -> None:
    """Say that there are no services, and wait."""
    raylet = os.getppid()
    for file in sys.argv[1:]:
        draft = f"{file}.draft"
        with open(draft, "w", encoding="ascii") as told:
            told.write("-1")
        os.replace(draft, file)
    while os.getppid() == raylet:
        time.sleep(POLL_S)


if __name__ == "__main__":
    main()

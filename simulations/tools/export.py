"""Write a run's adapter again, for PEFT, and upload it.

A run exports its adapter when it ends. This command does so from the last complete round of a run
that was interrupted, or on a machine that has the memory to read the adapter back through PEFT.

python -m simulations.tools.export outputs/RUN
python -m simulations.tools.export outputs/RUN --push user/name
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from fedlora.core.errors import CheckpointError, ConfigError, DataError, ModelError, RunFolderError
from fedlora.core.files import claim
from simulations.app.export import export
from simulations.tools.base_model import base_of
from simulations.tools.final_payload import final_payload, run_config
from simulations.tools.hub import add_push_options, push
from simulations.tools.merge import say


def export_run(run: Path) -> Path:
    """Export the final payload of a run; the folder.

    Raises:
        ConfigError: if the folder is not that of a run, or nothing can hold its payload.
        CheckpointError, DataError, ModelError: if the run has no update, or its base is gone.
        RunFolderError: if the run is still under way.
    """
    config = run_config(run)
    with claim(run):
        spec = base_of(run, config.model, say).resolved()
        payload = final_payload(run, config, spec.describe(), say)
        export(payload, run, spec, float(config.client.dropout), say)
    if not payload.folder:
        raise ConfigError(f"{run}: no format can hold {payload.noun}; fedlora merge writes a model")
    return run / payload.folder


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; its exit code."""
    parser = argparse.ArgumentParser(
        prog="fedlora export", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("run", type=Path, help="a run folder")
    add_push_options(parser)
    options = parser.parse_args(arguments)
    try:
        folder = export_run(options.run)
        print(f"exported: {folder.absolute()}")
        push(folder, options)
    except (CheckpointError, DataError, ModelError, RunFolderError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Add a run's update to its base model: a plain model in Hugging Face's layout.

An update by SPP is multiplied into the pruned base; a zero that moved is an error. With
``--sparse`` the zeros are left out, and ``model=hf model.path=merged/`` reads the folder as well.
An earlier merged model in the target folder is replaced as a whole; anything else is refused.

python -m simulations.tools.merge outputs/flexlora-heavy_tail_strong-sotu-tiny-s0 merged/
python -m simulations.tools.merge outputs/spp-heavy_tail_strong-sotu-pruned-s0 merged/ --sparse
python -m simulations.tools.merge outputs/RUN merged/ --push user/name
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fedlora.core.errors import CheckpointError, ConfigError, DataError, ModelError
from fedlora.core.files import output_folder, write_file
from fedlora.models.compact import compact
from fedlora.models.export import BASE, write_merged
from fedlora.models.spec import ModelSpec
from simulations.reporting.card import CARD, merged_card
from simulations.tools.base_model import base_of
from simulations.tools.final_payload import final_payload, run_config
from simulations.tools.hub import add_push_options, push


def say(line: str) -> None:
    """One line for a person, apart from the command's result."""
    print(line, file=sys.stderr, flush=True)


def merge_run(run: Path, target: Path, *, sparse: bool = False) -> int:
    """Write the merged model of a run.

    Args:
        run: its folder.
        target: of the model.
        sparse: leave the zeros of a pruned model out; ``model=hf`` reads the folder all the same.

    Returns:
        Bytes of all tensors if sparse, else 0.

    Raises:
        ConfigError: if the folder is not that of a run, the target holds anything but an earlier
            output, or what is merged fills the zeros that are to be left out.
        CheckpointError, DataError, ModelError: if the run has no update, or its base is gone.
        ValueError: if the update does not fit the base.
    """
    config = run_config(run)
    spec = base_of(run, config.model, say)
    _check_apart(target, spec, run)
    about: dict[str, Any] = {"merged_from": run.resolve().name}
    with output_folder(target, about) as draft:
        model = spec.load(torch.device("cpu"))
        payload = final_payload(run, config, model.info, say)
        if sparse and not payload.keeps_zeros:
            raise ConfigError(
                f"--sparse leaves zeros out, and {run} has no adapter that keeps a pruned model's "
                "zeros, as those of strategy=spp do; merge without --sparse"
            )
        about[BASE] = model.info.fingerprint
        write_merged(model, payload, draft)
        write_file(draft / CARD, merged_card(run))
        return compact(draft) if sparse else 0


def _check_apart(target: Path, spec: ModelSpec, run: Path) -> None:
    """Refuse to write over what is merged.

    Raises:
        ConfigError: naming the folder.
    """
    needed = {spec.folder(), Path(str(getattr(spec, "path", "") or spec.folder())).expanduser()}
    if target.resolve() in {run.resolve(), *(p.resolve() for p in needed)}:
        raise ConfigError(f"{target} is what would be merged: name another folder")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; its exit code."""
    parser = argparse.ArgumentParser(
        prog="fedlora merge", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("target", type=Path, help="folder to write the model to")
    parser.add_argument(
        "--sparse", action="store_true", help="leave the zeros of a pruned model out"
    )
    add_push_options(parser)
    options = parser.parse_args(arguments)
    try:
        size = merge_run(options.run, options.target, sparse=options.sparse)
        kept = f" ({size:,} bytes without its zeros)" if options.sparse else ""
        print(f"merged model: {options.target.absolute()}{kept}")
        push(options.target, options)
    except (CheckpointError, DataError, ModelError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

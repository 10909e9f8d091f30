"""Add a run's adapter to its base model: a plain model in Hugging Face's layout.

An update by SPP is multiplied into the pruned base; a zero that moved is an error. With
``--sparse`` the zeros are left out, and ``model=hf model.path=merged/`` reads the folder as well.

python -m simulations.tools.merge outputs/flexlora-heavy_tail_strong-sotu-tiny-s0 merged/
python -m simulations.tools.merge outputs/spp-heavy_tail_strong-sotu-pruned-s0 merged/ --sparse
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from omegaconf import OmegaConf

from fedlora.core.errors import ConfigError, DataError, ModelError
from fedlora.models.compact import compact
from fedlora.models.export import exported, load, merge
from fedlora.techniques.lora.payload import LowRankPayload
from simulations.tools.base_model import base_of


def merge_run(run: Path, target: Path, *, sparse: bool = False) -> int:
    """Write the merged model of a finished run.

    Args:
        run: its folder.
        target: of the model.
        sparse: leave the zeros of a pruned model out; ``model=hf`` reads the folder all the same.

    Returns:
        Bytes of all tensors if sparse, else 0.

    Raises:
        ConfigError: if the folder is not that of a run, or what is merged fills the zeros that are
            to be left out.
        ModelError: if the run has neither adapter nor update, or its base model is gone.
        ValueError: if the adapter does not fit the base.
    """
    file = run / "config.yaml"
    if not file.is_file():
        raise ConfigError(f"{run} is not a run folder: it has no config.yaml")
    config = OmegaConf.to_container(OmegaConf.load(file), resolve=True)
    assert isinstance(config, dict)
    kind = exported(run / "adapter")
    if sparse and not (kind is not None and kind.keeps_zeros):
        raise ConfigError(
            f"--sparse leaves zeros out, and {run} has no adapter that keeps a pruned model's "
            "zeros, as those of strategy=spp do; merge without --sparse"
        )
    spec = base_of(run, config["model"], lambda line: print(line, file=sys.stderr))
    model = spec.load(torch.device("cpu"))
    merge(model, load(run, model.info, LowRankPayload), target)
    model.tokenizer.save_pretrained(target)
    return compact(target) if sparse else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; its exit code."""
    parser = argparse.ArgumentParser(
        prog="fedlora merge", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("run", type=Path, help="a run folder with adapter/ or update/")
    parser.add_argument("target", type=Path, help="folder to write the model to")
    parser.add_argument(
        "--sparse", action="store_true", help="leave the zeros of a pruned model out"
    )
    options = parser.parse_args(arguments)
    try:
        size = merge_run(options.run, options.target, sparse=options.sparse)
    except (DataError, ModelError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    kept = f" ({size:,} bytes without its zeros)" if options.sparse else ""
    print(f"merged model: {options.target.absolute()}{kept}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

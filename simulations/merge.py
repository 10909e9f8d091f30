"""Add a run's adapter to its base model: a plain model in Hugging Face's layout.

An update by SPP is multiplied into the pruned base; a zero that moved is an error.

python -m simulations.merge outputs/flexlora-heavy_tail_strong-sotu-tiny-s0 merged/
"""

import argparse
import sys
from pathlib import Path

import torch
from omegaconf import OmegaConf

from fedlora.config import ConfigError, build
from fedlora.models.export import SPP, load_peft, load_update, merge
from fedlora.models.folder import ModelError
from fedlora.models.spec import ModelSpec
from fedlora.models.spp_peft import load_spp


def merge_run(run: Path, target: Path) -> None:
    """Write the merged model of a finished run.

    Raises:
        ConfigError: if the folder is not that of a run.
        ModelError: if the run has neither adapter nor update, or its base model is gone.
    """
    file = run / "config.yaml"
    if not file.is_file():
        raise ConfigError(f"{run} is not a run folder: it has no config.yaml")
    config = OmegaConf.to_container(OmegaConf.load(file), resolve=True)
    assert isinstance(config, dict)
    spec = build(config["model"], ModelSpec, "model")  # type: ignore[type-abstract]
    model = spec.load(torch.device("cpu"))
    adapter, info = run / "adapter", model.info
    if (adapter / SPP).is_file():
        merge(model, load_spp(adapter), target)
    elif (run / "update").is_dir():
        merge(model, load_update(run / "update", info), target)
    else:
        merge(model, load_peft(adapter, info), target)
    model.tokenizer.save_pretrained(target)


def main(arguments: list[str] | None = None) -> int:
    """The command; its exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, help="a run folder with adapter/ or update/")
    parser.add_argument("target", type=Path, help="folder to write the model to")
    options = parser.parse_args(arguments)
    try:
        merge_run(options.run, options.target)
    except (ConfigError, ModelError) as error:
        print(error, file=sys.stderr)
        return 2
    print(f"merged model: {options.target.absolute()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

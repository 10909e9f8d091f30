"""What a run has trained, from its exported folder or else its last checkpoint."""

from collections.abc import Callable
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from fedlora.core.errors import CheckpointError, ConfigError
from fedlora.core.payload import Payload
from fedlora.models.export import SUBFOLDERS, load
from fedlora.models.modules import ModelInfo
from fedlora.run import checkpoint
from fedlora.techniques.lora.payload import LowRankPayload
from simulations.app.inputs import method_of, prepare_inputs
from simulations.app.parts import build_parts


def run_config(run: Path) -> DictConfig:
    """The configuration that a run was made with.

    Raises:
        ConfigError: if the folder has none.
    """
    file = run / "config.yaml"
    if not file.is_file():
        raise ConfigError(f"{run} is not a run folder: it has no config.yaml")
    config = OmegaConf.load(file)
    if not isinstance(config, DictConfig) or not {"model", "data"} <= {str(k) for k in config}:
        raise ConfigError(f"{file} is no configuration of a run: it lacks model or data")
    return config


def final_payload(
    run: Path, config: DictConfig, info: ModelInfo, emit: Callable[[str], object]
) -> Payload:
    """The final payload of a run: ``adapter/`` or ``update/``, or else the update of its last
    checkpoint at the population's largest ranks (a run that was interrupted, or ended in a sparse
    stage).

    Raises:
        ConfigError: if the run left neither.
        CheckpointError: if the checkpoint is of another configuration, data or base model.
        ModelError: if the payload is of another base.
    """
    if any((run / name).is_dir() for name in SUBFOLDERS):
        return load(run, info, LowRankPayload)
    saved = checkpoint.latest(run / "checkpoints")
    if saved is None:
        raise ConfigError(f"{run} has no adapter/ and no checkpoint: its first round was not done")
    emit(f"{run.name}: no adapter/; the checkpoint after round {saved.round} is taken")
    parts = build_parts(config)
    inputs = prepare_inputs(parts, lambda line: None)
    now = parts.hash(inputs.data, inputs.info.fingerprint)
    if saved.config_hash != now:
        raise CheckpointError(
            f"{run}: the checkpoint of round {saved.round} was written under another configuration "
            f"({saved.config_hash[:12]}) than {run / 'config.yaml'}, its data and its base model "
            f"have now ({now[:12]})"
        )
    ranks = inputs.setting(parts).max_ranks
    method = method_of(parts, inputs)
    return method.technique.payload(method.global_update(dict(saved.state), ranks))

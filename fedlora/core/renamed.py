"""Names of version 0.1 and what they are called now: for messages, not for use.

Nothing here is an alias. A user of an old key or class gets the new name in the error message;
CHANGELOG.md has the same table.
"""

from collections.abc import Iterable

KEYS: dict[str, str] = {
    "client.clip": "client.max_grad_norm",
    "client.self_prune": "client.technique.self_prune",
    "client.switch": "client.technique",
    "client.switch.choice": "client.technique.choice",
    "client.switch.count_frozen": "client.technique.count_frozen",
    "client.switch.freeze": "client.technique.freeze",
    "client.switch.interval": "client.technique.interval",
    "client.switch.ratio": "client.technique.ratio",
    "data.cutoff": "data.max_length",
    "data.eval_share": "data.eval_fraction",
    "data.test_share": "data.test_fraction",
    "engine.nan_share": "engine.nan_fraction",
    "engine.raise_share": "engine.raise_fraction",
    "engine.shape_share": "engine.shape_fraction",
    "evaluate.plan.teacher_forced_rouge": "evaluate.plan.metrics.teacher_forced",
    "population.unseen_share": "population.unseen_fraction",
    "ranks.tiers.share": "ranks.tiers.fraction",
}
"""Old key -> new key of the configuration."""

CLASSES: dict[str, str] = {
    "fedlora.models.pruned.Pruned": "fedlora.prune.spec.Pruned",
    "fedlora.population.Population": "fedlora.population.sampling.Population",
    "fedlora.ranks.RankDistribution": "fedlora.population.ranks.RankDistribution",
    "fedlora.server_optimizer.FedAdam": "fedlora.algebra.server_optimizer.FedAdam",
    "fedlora.server_optimizer.FedAvgM": "fedlora.algebra.server_optimizer.FedAvgM",
    "fedlora.server_optimizer.NoServerOptimizer": (
        "fedlora.algebra.server_optimizer.NoServerOptimizer"
    ),
    "fedlora.session.EvaluationSchedule": "fedlora.server.schedule.EvaluationSchedule",
    "fedlora.session.Rounds": "fedlora.server.schedule.Rounds",
    "fedlora.split.compression.Wire": "fedlora.wire.rows.Wire",
    "fedlora.split.wire.Wire": "fedlora.wire.rows.Wire",
    "fedlora.tracking.Silent": "fedlora.run.tracking.Silent",
    "fedlora.tracking.Wandb": "fedlora.run.tracking.Wandb",
    "fedlora.types.EvaluatePlan": "fedlora.core.types.EvaluatePlan",
    "fedlora.types.LocalPlan": "fedlora.core.types.LocalPlan",
    "fedlora.types.SelfPrune": "fedlora.techniques.lora.self_pruning.SelfPrune",
    "fedlora.types.Switching": "fedlora.techniques.switchlora.technique.SwitchTraining",
    "simulations.runtime.Runtime": "simulations.app.runtime.Runtime",
}
"""Old path -> new path of every class that a ``_target_`` of version 0.1 names."""


def answer(names: Iterable[str]) -> str:
    """The end of an error message: the new name of each old key or class among these.

    Empty if there is none.
    """
    known = KEYS | CLASSES
    found = [f"{name} is {known[name]} since version 0.2" for name in names if name in known]
    return f" ({'; '.join(found)})" if found else ""

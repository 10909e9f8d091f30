"""Local training of most techniques: mount a job's start, take gradient steps, read the result."""

from collections.abc import Sequence

from fedlora.core.payload import Payload
from fedlora.core.types import TrainJob
from fedlora.data.batches import TokenExample
from fedlora.models.language_model import LanguageModel
from fedlora.training.loop import Trace, optimise


def train_mounted(
    model: LanguageModel, job: TrainJob, examples: Sequence[TokenExample]
) -> tuple[Payload, Trace]:
    """Train the parameters of a job's start that its plan does not freeze, of chosen rank indices
    if the job has chosen. They stay mounted.

    Raises:
        FloatingPointError: naming step and loss, if a loss or the result is not finite.
    """
    plan, where = job.plan, {"seed": job.seed, "round": job.round, "client": job.client.id}
    parameters = model.mount(
        job.start, dropout=plan.dropout, train_a=plan.train_a, train_b=plan.train_b
    )
    chosen = None if job.chosen is None else job.chosen.indices
    trace = optimise(model, parameters, examples, plan, chosen=chosen, **where)
    trained = model.payload()
    assert trained is not None
    return trained, trace

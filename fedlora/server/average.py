"""The average of a round's accepted updates from which clients can go on."""

from collections.abc import Callable, Sequence

from fedlora.algebra.state import State
from fedlora.core.errors import RunError
from fedlora.robust.rule import Rule
from fedlora.server.combine import NUMERICAL, Combined, unusable
from fedlora.server.method import Method
from fedlora.server.postprocess import Moment, Postprocessor
from fedlora.server.schedule import Rounds
from fedlora.server.training_round import Replies, TrainingRound, enough


def usable_average(
    method: Method,
    state: State,
    current: TrainingRound,
    replies: Replies,
    *,
    average: Callable[..., Combined],
    now: Moment,
    rounds: Rounds,
    postprocessors: Sequence[Postprocessor],
    release: Postprocessor | None,
    rule: Rule,
    safe: str,
) -> tuple[Combined, Replies]:
    """The next state, from which clients can go on, and the replies without those that would have
    spoiled it; the state as it was if too few are left.

    Args:
        method: averages.
        state: into which the updates are aggregated.
        current: the round.
        replies: its results, validated.
        average: as `fedlora.server.combine.combine`.
        now: seed and round.
        rounds: how many clients must succeed.
        postprocessors: of the run.
        release: bounds each change last and adds noise to their sum first; None: no privacy.
        rule: what takes the place of the mean.
        safe: what of the run is on disk, for messages.

    Raises:
        RunError: if no update is left, or a private round gives no usable state: leaving out whom
            it fits least would tell about the others.
    """
    between = [*postprocessors, *([] if release is None else [release])]
    starts = {i: job.start for i, job in current.jobs.items()}
    while enough(current, replies, rounds):
        try:
            found = average(
                method,
                state,
                replies.updates,
                now,
                starts=starts,
                postprocessors=between,
                rule=rule,
            )
            wrong = unusable(method, found.state)
        except NUMERICAL as error:
            wrong = f"the average cannot be computed: {error}"
        if not wrong:
            return found, replies
        if release is not None:
            raise RunError(f"round {current.round}: under privacy, {wrong}. {safe}")
        if not replies.moves:
            raise RunError(f"round {current.round}: {wrong}. {safe}")
        replies = replies.without_furthest(wrong)
    return Combined(state, {}), replies

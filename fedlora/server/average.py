"""The average of a round's accepted updates from which clients can go on."""

from collections.abc import Callable, Sequence

from fedlora.algebra.state import State
from fedlora.algebra.summand import Summands
from fedlora.core.errors import RunError
from fedlora.robust.rule import Rule
from fedlora.server.combine import NUMERICAL, Combined, combine, unusable
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
    now: Moment,
    rounds: Rounds,
    postprocessors: Sequence[Postprocessor],
    release: Postprocessor | None,
    rule: Rule,
    zero: Callable[[], Summands],
    safe: str,
) -> tuple[Combined, Replies]:
    """The next state, from which clients can go on, and the replies without those that would have
    spoiled it; the state as it was if too few are left.

    Args:
        method: averages.
        state: into which the updates are aggregated.
        current: the round.
        replies: its results, validated.
        now: seed and round.
        rounds: how many clients must succeed.
        postprocessors: of the run.
        release: bounds each change last and adds noise to their sum first; None: no privacy.
        rule: what takes the place of the mean.
        zero: makes the summand of a client that did not move, for a round without clients.
        safe: what of the run is on disk, for messages.

    Raises:
        RunError: if a private round gives no usable state: leaving out whom it fits least would
            tell about the others.
    """
    between = [*postprocessors, *([] if release is None else [release])]
    starts = {i: job.start for i, job in current.jobs.items()}
    while enough(current, replies, rounds):
        try:
            found = combine(
                method,
                state,
                replies.updates,
                now,
                starts=starts,
                postprocessors=between,
                rule=rule,
                zero=zero,
            )
            wrong = unusable(method, found.state)
        except NUMERICAL as error:
            wrong = f"the average cannot be computed: {error}"
        if not wrong:
            return found, replies
        if release is not None:
            raise RunError(f"round {current.round}: under privacy, {wrong}. {safe}")
        replies = replies.without_furthest(wrong)
    return Combined(state, {}), replies

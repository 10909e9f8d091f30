"""What a client that never took part in training is evaluated with, in words."""

from fedlora.models.head import AVERAGED, FROZEN

HEADS = {
    FROZEN: "the frozen head, drawn from the run's seed",
    AVERAGED: "the averaged head",
}
FIRST = "the first head, drawn from the run's seed: a local head stays with who trained it"


def unseen_model(head: str, *, classifies: bool, shares: bool) -> str:
    """The model of clients that never took part.

    Args:
        head: ``model.head``.
        classifies: whether the model has one.
        shares: whether what a client trains reaches others (`fedlora.server.method.Method.shares`).

    >>> unseen_model("averaged", classifies=True, shares=True)
    'the global update and the averaged head'
    """
    update = "the global update" if shares else "the base model as it is (clients share nothing)"
    return f"{update}{f' and {HEADS.get(head, FIRST)}' if classifies else ''}"

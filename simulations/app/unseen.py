"""What a client that never took part in training is evaluated with, in words."""

from fedlora.models.head import AVERAGED, FROZEN

HEADS = {
    FROZEN: "the frozen head, drawn from the run's seed",
    AVERAGED: "the averaged head",
}
FIRST = "the first head, drawn from the run's seed: a local head stays with who trained it"
BASE = {
    "b": "the base model as it is (each client keeps its own B)",
    "ab": "the base model as it is (clients share nothing)",
}


def unseen_model(head: str, *, classifies: bool, private: str) -> str:
    """The model of clients that never took part.

    Args:
        head: ``model.head``.
        classifies: whether the model has one.
        private: the factors that stay with their client (`fedlora.server.method.Method.private`).

    >>> unseen_model("averaged", classifies=True, private="")
    'the global update and the averaged head'
    """
    update = BASE[private] if private else "the global update"
    return f"{update}{f' and {HEADS.get(head, FIRST)}' if classifies else ''}"

"""Export of a finished run for other programs: its final payload, in a standard format."""

from collections.abc import Callable
from pathlib import Path

from fedlora.core.files import output_folder, write_file
from fedlora.core.payload import Payload
from fedlora.models.export import about, remove_exports
from fedlora.models.headed import WithHead
from fedlora.models.read_back import read_back
from fedlora.models.spec import ModelSpec
from simulations.reporting.card import CARD, adapter_card

READ_BACK = "read_back"
"""Key of an exported folder's record: whether the program that it is for computes the same."""


BEST = "best"
"""Subfolder of a run folder for what was exported of its best round."""


def export(
    payload: Payload,
    run: Path,
    model: ModelSpec,
    dropout: float,
    emit: Callable[[str], object],
    *,
    best: int | None = None,
) -> None:
    """Write a run's final payload into the subfolder of its kind, with tokenizer and model card.

    What an earlier end of the run left is removed. Whether the program that the folder is for
    computes the same from it stands in its record and its card, and is said if it does not.

    Args:
        payload: the global update at the population's largest ranks.
        run: the run's folder.
        model: its base.
        dropout: what further training would use.
        emit: shows one line to the user.
        best: the round that the payload is of, which goes to `BEST`; None: the last.
    """
    place = run if best is None else run / BEST
    if model.classifies and payload.head() is None:  # drawn, it is in no checkpoint
        payload = WithHead(payload, model.head_state())
    remove_exports(place, keep=payload.folder)
    info, base = model.describe(), model.hub_id or str(model.folder())
    if not payload.folder:
        emit(payload.export(place, info, base, dropout))
        return
    record = about(type(payload), info)
    with output_folder(place / payload.folder, record) as draft:
        said = payload.export(draft, info, base, dropout)
        model.tokenizer().save_pretrained(str(draft))
        found = read_back(payload, draft, model)
        if found is not None:
            record[READ_BACK] = found.record()
        write_file(draft / CARD, adapter_card(run, payload, found, best))
    if said:
        emit(said)
    if found is not None and not found.agrees:
        emit(f"WARNING: {(place / payload.folder).relative_to(run)}/: {found.sentence()}")

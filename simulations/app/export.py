"""Export of a finished run for other programs: its final payload, in a standard format."""

from fedlora.core.files import naming
from fedlora.models import export as exports
from fedlora.models.modules import ModelInfo
from fedlora.models.spec import ModelSpec
from fedlora.server.session import Session
from simulations.app.parts import Parts


def export(session: Session, parts: Parts, info: ModelInfo, model: ModelSpec) -> None:
    """The global update at the population's largest ranks: ``adapter/`` in PEFT's format, or the
    format of another payload."""
    payload = session.global_payload(session.setting.max_ranks)
    base, dropout = str(model.folder()), parts.client.dropout
    with naming(session.folder / payload.folder):
        said = exports.export(payload, session.folder, info, base, dropout)
    if said:
        session.emit(said)

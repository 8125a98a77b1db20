"""Configuration: a dataclass is the schema; a YAML file and `key=value` words are laid over it, in that order.

OmegaConf does the merging and lives only here. Whatever is wrong (an unknown field, a wrong type, a value that the
dataclass's own `__post_init__` refuses) becomes one `ConfigError` line that names the field, what was got and what
was expected; an unknown field also names the nearest right one.
"""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from effml_shared.errors import ConfigError

__all__ = ["field_names", "load_config", "to_dict", "to_yaml"]

T = TypeVar("T")


def load_config(base: T, *, yaml: str | Path | None = None, overrides: Sequence[str] = ()) -> T:
    """Lay a YAML file and then dotted `key=value` overrides over a dataclass instance.

    Args:
        base: an instance of the schema, typically a preset; it is not changed.
        yaml: path of a file of (nested) fields.
        overrides: words such as `"model.width=256"`.

    Raises:
        ConfigError: a field is unknown, ill-typed or refused, or the file cannot be read.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    merged = OmegaConf.structured(base)
    for name, kind in field_names(type(base)).items():
        if dataclasses.is_dataclass(kind):  # frozen ones are read-only to OmegaConf, yet only laid over here
            OmegaConf.set_readonly(OmegaConf.select(merged, name), False)
    layers = [] if yaml is None else [(f"{yaml}: ", _read_yaml(yaml))]
    for word in overrides:
        key, equals, _ = word.partition("=")
        if not equals or not key:
            raise ConfigError(f"override: got {word!r}, expected key=value")
        try:
            layers.append(("", OmegaConf.from_dotlist([word])))
        except Exception as error:  # YAML's many parse errors, whichever the value provokes
            raise ConfigError(f"{key}: got {word.partition('=')[2]!r}, expected a YAML value") from error
    for origin, layer in layers:
        _check_names(type(base), OmegaConf.to_container(layer), origin)
        try:
            merged = OmegaConf.merge(merged, layer)
        except OmegaConfBaseException as error:
            raise ConfigError(origin + _explain(type(base), error)) from None
    try:
        result: Any = OmegaConf.to_object(merged)
    except ConfigError:
        raise
    except OmegaConfBaseException as error:
        raise ConfigError(_explain(type(base), error)) from None
    except (ValueError, TypeError) as error:
        raise ConfigError(_first_line(error)) from None
    return typing.cast(T, result)


def to_dict(config: Any) -> dict[str, Any]:
    """Return a dataclass instance as nested plain values."""
    return dataclasses.asdict(config)


def to_yaml(config: Any) -> str:
    """Return a dataclass instance as YAML, fields in their order."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.structured(config))


def field_names(schema: Any, prefix: str = "") -> dict[str, Any]:
    """Return every dotted field name of a dataclass (and of the dataclasses in it) with its type."""
    hints = typing.get_type_hints(schema)
    names: dict[str, Any] = {}
    for field in dataclasses.fields(schema):
        kind = hints[field.name]
        names[prefix + field.name] = kind
        if dataclasses.is_dataclass(kind):
            names |= field_names(kind, f"{prefix}{field.name}.")
    return names


def _read_yaml(yaml: str | Path) -> Any:
    from omegaconf import OmegaConf

    path = Path(yaml)
    try:
        kind = None if path.is_file() else "a directory" if path.is_dir() else "no such file"
    except OSError as error:  # a name too long for one, or in a directory that is closed to us
        kind = error.strerror
    if kind is not None:
        name = str(path)
        if "\n" in name or len(name) > 200:  # most likely YAML itself
            name = f"{name[:40]!r}..."
        raise ConfigError(f"config file {name}: got {kind}, expected the path of a YAML file of fields")
    try:
        layer = OmegaConf.load(path)
    except UnicodeDecodeError as error:
        raise ConfigError(f"config file {path}: got bytes that are not UTF-8 at {error.start}") from None
    except Exception as error:  # the YAML parser's own family of errors
        raise ConfigError(f"config file {path}: got invalid YAML ({_first_line(error)})") from None
    if not OmegaConf.is_dict(layer):
        raise ConfigError(f"config file {path}: got a list or a scalar, expected fields (name: value)")
    return layer


def _check_names(schema: Any, layer: Any, origin: str, prefix: str = "") -> None:
    known = field_names(schema)
    for key, value in layer.items():
        name = f"{prefix}{key}"
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
            leaf = [other for other in known if other.rpartition(".")[2] == str(key)]
            raise ConfigError(f"{origin}unknown field {name}: did you mean {(leaf or near)[0]}?")
        if isinstance(value, dict) and dataclasses.is_dataclass(known[name]):
            _check_names(schema, value, origin, f"{name}.")
        elif dataclasses.is_dataclass(known[name]):
            inner = ", ".join(field.name for field in dataclasses.fields(known[name]))
            raise ConfigError(f"{origin}{name}: got {value!r}, expected its fields ({name}.<{inner}>=value)")


def _explain(schema: Any, error: Any) -> str:
    name = getattr(error, "full_key", None) or getattr(error, "key", None) or "config"
    kind = field_names(schema).get(str(name))
    expected = f", expected {_type_name(kind)}" if kind is not None else ""
    value = f"got {error.value!r}" if getattr(error, "value", None) is not None else _first_line(error)
    return f"{name}: {value}{expected}"


def _type_name(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) else str(kind).replace("typing.", "")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]

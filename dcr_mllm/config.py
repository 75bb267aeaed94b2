"""Configs: keyword-only dataclasses whose defaults are the recipe, filled from a YAML file and `key=value` overrides.

A YAML file holds only what differs from the defaults of its dataclass. Validation is strict: an unknown key, a wrong
type or a value that the dataclass refuses in `__post_init__` is a `UserError` that names the key, where it came from
and what was expected.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from dcr_mllm.errors import UserError

Config = TypeVar("Config")

COMMAND_LINE = "command line"
_MISSING = "is missing and has no default"

# YAML 1.1, which PyYAML speaks, reads `1e-4` as a string. Everybody who writes a learning rate means the number.
_FLOAT = re.compile(
    r"^[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+"
    r"|\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)


def _without(resolvers: Mapping[str, list[tuple[str, Any]]], *tags: str) -> dict[str, list[tuple[str, Any]]]:
    return {
        first: [(tag, pattern) for tag, pattern in pairs if tag.rsplit(":", 1)[-1] not in tags]
        for first, pairs in resolvers.items()
    }


class _Loader(yaml.SafeLoader):
    """Safe loading with numbers such as `1e-4`, dates left as text, and duplicate keys refused."""

    yaml_implicit_resolvers = _without(yaml.SafeLoader.yaml_implicit_resolvers, "float", "timestamp")

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key_node.value!r} appears twice", key_node.start_mark
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes exactly what `_Loader` would otherwise read as something else than text."""

    yaml_implicit_resolvers = _without(yaml.SafeDumper.yaml_implicit_resolvers, "float")


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


def load_config(
    cls: type[Config],
    path: str | Path | None = None,
    overrides: Iterable[str] = (),
    base: Mapping[str, Any] | None = None,
) -> Config:
    """Builds a config from its defaults, then a YAML file, then `key=value` overrides.

    Args:
        cls: a keyword-only dataclass; fields may be dataclasses themselves.
        path: YAML file with a mapping, or None for the defaults alone.
        overrides: `key=value`, dotted for nested dataclasses (`optimizer.lr=1e-4`); values are YAML, and the last of
            equal keys wins.
        base: values below the file, for a caller that has computed some (a stored run for instance).

    Returns:
        An instance of `cls`.

    Raises:
        UserError: unknown key, wrong type, refused value, or an unreadable file.
    """
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    if base is not None:
        _merge(cls, values, dict(base), "", "defaults", sources)
    if path is not None:
        _merge(cls, values, read_yaml(Path(path)), "", str(path), sources)
    for override in overrides:
        key, separator, text = override.partition("=")
        key = key.strip()
        if not separator or not key:
            raise UserError(f"{override!r} on the command line is not of the form key=value")
        value = _parse_override(cls, key, text)
        tree: dict[str, Any] = {}
        node = tree
        *parents, last = key.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
        _merge(cls, values, tree, "", COMMAND_LINE, sources, extend=bool(parents))
    try:
        # Strict validation from JSON, not from Python objects: lists may fill tuples and text may fill paths, but no
        # other value is bent into another type.
        return TypeAdapter(cls).validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        where = str(path) if path is not None else COMMAND_LINE
        raise UserError("; ".join(_explain(error, sources, where))) from None


def to_dict(config: Any) -> dict[str, Any]:
    """The whole config as plain values (mappings, lists, text, numbers), ready for JSON or YAML."""
    return _plain(dataclasses.asdict(config))


def to_yaml(config: Any) -> str:
    """The whole resolved config as YAML that `load_config` reads back to an equal config."""
    return yaml.dump(to_dict(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=False)


def differences(a: Any, b: Any) -> list[str]:
    """What changes from one config to another, e.g. `["tower_steps: 500 -> 600"]`.

    Args:
        a: config dataclass or the mapping that `to_dict` gives; the same for `b`. A key that only one has and that is
            None there is no difference: it was added to the config since, and is not used.
    """
    left, right = _flatten(a), _flatten(b)
    missing = object()
    lines = []
    for key in [*left, *(key for key in right if key not in left)]:
        old, new = left.get(key, missing), right.get(key, missing)
        if (old is None and new is missing) or (old is missing and new is None):
            continue
        if old != new or type(old) is not type(new):
            shown = ["(absent)" if value is missing else _show(value) for value in (old, new)]
            lines.append(f"{key}: {shown[0]} -> {shown[1]}")
    return lines


def with_defaults(cls: type, stored: Mapping[str, Any]) -> dict[str, Any]:
    """A config that an earlier release has written, with the defaults of the keys that have been added since."""
    filled, hints = dict(stored), typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        nested = _dataclass_of(hints[field.name])
        if nested is not None and isinstance(filled.get(field.name), Mapping):
            filled[field.name] = with_defaults(nested, filled[field.name])
        elif field.name not in filled and field.default is not dataclasses.MISSING:
            filled[field.name] = field.default
        elif field.name not in filled and field.default_factory is not dataclasses.MISSING:
            value = field.default_factory()
            filled[field.name] = to_dict(value) if dataclasses.is_dataclass(value) else value
    return filled


def available_configs(package_dir: str | Path) -> list[str]:
    """Bare names of the configs shipped in a folder."""
    return sorted(path.stem for path in Path(package_dir).glob("*.yaml"))


def resolve_config_path(name_or_path: str | Path, package_dir: str | Path) -> Path:
    """Finds a config by path, or by the bare name of one that ships with the package (`mini`).

    Raises:
        UserError: neither exists; lists the shipped names.
    """
    text = str(name_or_path)
    bare = re.fullmatch(r"[\w.-]+", text) is not None
    shipped = Path(package_dir) / (text if text.endswith((".yaml", ".yml")) else f"{text}.yaml")
    if bare and "." not in text and shipped.is_file():
        return shipped
    if Path(text).is_file():
        return Path(text)
    if bare and shipped.is_file():
        return shipped
    names = available_configs(package_dir)
    near = difflib.get_close_matches(text, names, n=1)
    hint = f", did you mean {near[0]!r}?" if near else ""
    raise UserError(f"config {text!r} is neither a file nor one of the shipped configs ({', '.join(names)}){hint}")


def nearest(key: str, known: Iterable[str]) -> str:
    """`, did you mean 'x'?` for the nearest of the known keys, or a list of all where none is near."""
    known = list(known)
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f", did you mean {near[0]!r}?" if near else f"; known are {', '.join(known)}"


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, as plain values and unchecked against any config.

    Raises:
        UserError: the file cannot be read, is not YAML, or holds something else than a mapping.
    """
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # noqa: S506 - a SafeLoader
    except OSError as error:
        raise UserError(f"cannot read config {path}: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold a mapping of keys to values, found a {type(values).__name__}")
    return values


def _parse_override(cls: type, key: str, text: str) -> Any:
    try:
        value = yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError:
        raise UserError(f"{key}={text} on the command line: the value is not valid YAML, quote it") from None
    hint = _hint(cls, key)
    members = set(typing.get_args(hint)) if _is_union(hint) else {hint}
    scalar = isinstance(value, (bool, int, float))
    # `run=7` names a run: nobody should have to quote a number twice, once for the shell and once for YAML.
    if scalar and str in members and not members & {bool, int, float}:
        return text
    return value


def _merge(
    cls: type,
    into: dict[str, Any],
    new: Mapping[Any, Any],
    prefix: str,
    source: str,
    sources: dict[str, str],
    *,
    extend: bool = False,
) -> None:
    """Lays values over others; with `extend`, mappings gain entries (`towers.new=DIR`) instead of being replaced."""
    hints = typing.get_type_hints(cls)
    known = [field.name for field in dataclasses.fields(cls) if field.init]
    for key, value in new.items():
        dotted = f"{prefix}{key}"
        if key not in known:
            where = "on the command line" if source == COMMAND_LINE else f"in {source}"
            raise UserError(f"unknown key {dotted!r} {where}{nearest(dotted, [prefix + name for name in known])}")
        sources[dotted] = source
        nested = _dataclass_of(hints[key])
        if nested is not None and isinstance(value, dict):
            below = into.get(key)
            into[key] = below = below if isinstance(below, dict) else {}
            _merge(nested, below, value, f"{dotted}.", source, sources, extend=extend)
        elif extend and isinstance(value, dict) and isinstance(into.get(key), dict):
            into[key] = {**into[key], **value}
        else:
            into[key] = value


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _dataclass_of(hint: Any) -> type | None:
    candidates = typing.get_args(hint) if _is_union(hint) else (hint,)
    return next((c for c in candidates if isinstance(c, type) and dataclasses.is_dataclass(c)), None)


def _hint(cls: type, dotted: str) -> Any:
    """Annotation of a dotted key; None where there is no such key, which `_merge` reports better."""
    hint: Any = cls
    for part in dotted.split("."):
        nested = _dataclass_of(hint)
        if nested is None:
            return None
        hint = typing.get_type_hints(nested).get(part)
    return hint


def _explain(error: ValidationError, sources: Mapping[str, str], default: str) -> list[str]:
    """One clause per key: source, key, what was found, what was expected."""
    found: dict[str, tuple[Any, list[str]]] = {}
    for item in error.errors(include_url=False):
        location = [str(part) for part in item["loc"]]
        # A union reports each of its members below the key; the longest prefix that was set is the key the user wrote.
        key = ".".join(location)
        for length in range(len(location), 0, -1):
            candidate = ".".join(location[:length])
            if candidate in sources:
                key = candidate
                break
        if item["type"] == "missing":
            key, text = ".".join(location), _MISSING
        elif item["type"] == "value_error":
            text = str(item["ctx"]["error"])
        else:
            text = item["msg"].replace("Input should be", "expected").split(", unable to parse")[0]
            text = (
                text.replace("valid array", "list")
                .replace("an object", "a mapping")
                .replace("a valid ", "a ")
                .replace("a integer", "an integer")
            )
        found.setdefault(key, (item.get("input"), []))[1].append(text)
    clauses = []
    for key, (value, texts) in found.items():
        wanted = " or ".join(dict.fromkeys(text.removeprefix("expected ") for text in texts))
        source = sources.get(key, default)
        if all(text.startswith("expected ") for text in texts):
            clauses.append(f"{source}: {key} is {_show(value)}, expected {wanted}")
        elif key and texts == [_MISSING]:
            clauses.append(f"{default}: {key} {texts[0]}")
        else:
            # Raised by `__post_init__`, whose sentence names the field itself.
            clauses.append(f"{source}: {wanted}")
    return clauses


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    values = config if isinstance(config, Mapping) else to_dict(config)
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = _plain(value)
    return flat


def _show(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()  # as YAML has it
    return value if isinstance(value, str) and value and value.isprintable() and " " not in value else repr(value)

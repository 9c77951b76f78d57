"""Run files: YAML, `${field}` references, dotted overrides, and errors that name the field."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from pipeline.config import JOBS, RunConfig
from pipeline.config.base import LOGIN, Section
from pipeline.errors import ConfigError

_Run = TypeVar("_Run", bound=RunConfig)
_Fields = TypeVar("_Fields", bound=Section)


class _UniqueKeys(yaml.SafeLoader):
    """YAML without its tolerance for a field that is given twice, where the last silently wins."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a field's name must be one word", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} is given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_ALIKE = 0.5
_LINE_ENDS = re.compile("[\x85\u2028\u2029]")  # of YAML 1.1, and of nobody else
_REFERENCE = re.compile(r"\$\{([^{}]*)\}")


def load(kind: type[_Run], path: str, overrides: list[str] | None = None) -> _Run:
    """Read a run file for one command.

    Args:
        kind: the model that the command takes.
        path: a YAML file, or the name of a bundled one (`configs/demo/train.yaml`).
        overrides: `dotted.field=value` strings, the value in YAML; they win over the file.

    Raises:
        ConfigError: naming file, field and value.
    """
    tree = _read(path)
    job, wanted = tree.get("job"), kind.model_fields["job"].default
    if job != wanted:
        said = f"is for `lathe {job}`" if isinstance(job, str) and job in JOBS else f"has job: {job!r}"
        raise ConfigError(f"{path} {said}, not for `lathe {wanted}`", f"give a file that says `job: {wanted}`")
    return _build(kind, tree, path, overrides or [])


def load_any(path: str, overrides: list[str] | None = None) -> RunConfig:
    """Read a run file of whichever command its `job` names. Raises ConfigError."""
    tree = _read(path)
    return _build(JOBS[_job(path, tree)], tree, path, overrides or [])


def job_of(path: str) -> str:
    """The command that a run file is for, as it says itself. Raises ConfigError where that is none."""
    return _job(path, _read(path))


def load_settings(kind: type[_Fields], path: str) -> _Fields:
    """Read a YAML file that is none of a command, such as a site's. Raises ConfigError, as `load`."""
    return _build(kind, _read(path), path, [])


def dump(config: RunConfig) -> str:
    """The resolved run file as YAML text that `load` reads back to an equal config."""
    return _dump(config.model_dump(mode="json"), width=110)


def in_line(value: Any) -> str:
    """A field's value as an override has it: YAML on one line."""
    lines = _dump(value, default_flow_style=True, width=float("inf"))
    return lines.removesuffix("...\n").rstrip("\n")


def _dump(value: Any, **options: Any) -> str:
    text: str = yaml.safe_dump(value, sort_keys=False, allow_unicode=True, **options)
    if _LINE_ENDS.search(text):  # read back, they would be others
        text = yaml.safe_dump(value, sort_keys=False, **options)
    return text


def bundled(name: str) -> Path:
    """A file shipped with Lathe, such as `configs/demo/train.yaml` or `launchers/accelerate.sh`.

    Raises:
        ConfigError: no such file in this installation.
    """
    package = Path(__file__).parent
    for base in (package / "bundled", package.parent):
        if (base / name).is_file():
            return base / name
    raise ConfigError(f"{name}: no such file", "give the path of a run file; `lathe config` lists the bundled ones")


def bundled_configs() -> list[str]:
    """The names of the run files shipped with Lathe."""
    package = Path(__file__).parent
    for base in (package / "bundled", package.parent):
        if (base / "configs").is_dir():
            files = sorted((base / "configs").rglob("*.yaml"))
            return [str(f.relative_to(base)) for f in files if "\njob:" in "\n" + f.read_text(encoding="utf-8")]
    return []


def _read(path: str) -> dict[str, Any]:
    try:
        file = Path(path) if Path(path).is_file() else bundled(path)
        tree = yaml.load(file.read_text(encoding="utf-8"), _UniqueKeys)  # noqa: S506  it is a SafeLoader
    except (yaml.YAMLError, ValueError) as error:  # ValueError: bytes that are no text, dates that there are not
        where = f" at line {error.problem_mark.line + 1}" if getattr(error, "problem_mark", None) else ""  # type: ignore[union-attr]
        raise ConfigError(
            f"{path} is not YAML{where}: {str(error).splitlines()[0]}", "mend the file's syntax"
        ) from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}", "mend the file's permissions") from error
    except RecursionError as error:
        raise ConfigError(f"{path} is nested too deeply", "a run file has two levels") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} holds no fields", "write NAME: VALUE lines; a run file begins with `job: ...`")
    return tree


def _job(path: str, tree: dict[str, Any]) -> str:
    job = tree.get("job")
    if not isinstance(job, str) or job not in JOBS:
        raise ConfigError(f"{path}: job: {job!r} is no command", f"use one of: {', '.join(JOBS)}")
    return job


def _build(kind: type[_Fields], tree: dict[str, Any], path: str, overrides: list[str]) -> _Fields:
    for override in overrides:
        _override(tree, override)
    try:
        return kind.model_validate(_resolve(tree, tree, ()))
    except RecursionError as error:
        raise ConfigError(f"{path} holds a section within itself", "mend the YAML anchors (&name, *name)") from error
    except ValidationError as error:
        raise explain(kind, path, error) from error


def _override(tree: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    if not equals or not name:
        raise ConfigError(f"override {override!r} has no value", "write dotted.field=value, such as seed=1")
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"override {override!r}: the value is not YAML", "quote it") from error
    *sections, field = name.split(".")
    inner: Any = tree
    for place, section in enumerate(sections):
        if isinstance(inner, list):
            inner = inner[_place_in(inner, section, override)]
        elif isinstance(inner, dict):
            inner = inner.setdefault(section, {})
        if not isinstance(inner, dict | list):
            said = ".".join(sections[: place + 1])
            raise ConfigError(f"override {override!r}: {said} is a value, not a section", "check the dotted name")
    if isinstance(inner, list):
        inner[_place_in(inner, field, override)] = value
    else:
        inner[field] = value


def _place_in(values: list[Any], name: str, override: str) -> int:
    if not name.isdecimal() or int(name) >= len(values):
        raise ConfigError(
            f"override {override!r}: {name} is none of the list's {len(values)} places",
            f"count from 0 to {len(values) - 1}, or give the whole list" if values else "give the whole list",
        )
    return int(name)


def _resolve(value: Any, tree: dict[str, Any], seen: tuple[str, ...]) -> Any:
    if isinstance(value, dict):
        return {k: _resolve(v, tree, seen) for k, v in value.items()}
    if isinstance(value, list):
        return [_resolve(v, tree, seen) for v in value]
    if not isinstance(value, str):
        return value

    def refer(match: re.Match[str]) -> str:
        name = match.group(1)
        if name in seen:
            raise ConfigError(f"${{{name}}} refers to itself", "break the circle of references")
        found: Any = tree
        for part in name.split("."):
            found = found.get(part) if isinstance(found, dict) else None
        if not isinstance(found, str | int | float):
            raise ConfigError(
                f"${{{name}}} refers to a field that is not set", f"set it, for example {name}=s3://bucket"
            )
        return str(_resolve(found, tree, (*seen, name)))

    return _REFERENCE.sub(refer, value)


def explain(kind: type[BaseModel], path: str, error: ValidationError, *, in_file: bool = True) -> ConfigError:
    """The first problem as one line behind `path`: dotted field, value, and the nearest right name.

    Args:
        kind: what was to be made of the fields.
        path: where they are from.
        error: what is wrong.
        in_file: they are of a run file; else arguments.
    """
    first = error.errors(include_url=False)[0]
    place = [str(p) for p in first["loc"]]
    field = ".".join(place)
    if first["type"] == "extra_forbidden":
        known = _fields_at(kind, place[:-1])
        near = _nearest(place[-1], known)
        remedy = f"did you mean {near!r}?" if near else f"known fields: {', '.join(known)}"
        return ConfigError(f"{path}: {field}: unknown field", remedy)
    if first["type"] == "missing":
        or_so = f", or add {field}=... to the command" if issubclass(kind, RunConfig) else ""
        remedy = f"set it in the file{or_so}" if in_file else "give it"
        return ConfigError(f"{path}: {field}: missing", remedy)
    more = len(error.errors()) - 1
    remedy = f"mend this field; {more} more are wrong" if more else "mend this field"
    said = first["msg"].removeprefix("Value error, ")
    if first["type"] == "model_type":
        said = "Input should be a section"
        if fields := _fields_at(kind, place):
            remedy = f"write it with its fields, as {{{fields[0]}: ...}}"
    if first["type"] in ("tuple_type", "list_type") and isinstance(first["input"], dict):
        remedy = f"give the whole list, {field}=[...]"  # an override into a list that the file does not have
    for tuples, lists in (("valid tuple", "valid list"), ("Tuple should", "List should")):
        said = said.replace(tuples, lists)
    if first["type"] == LOGIN:
        remedy = (
            "leave that out; S3's keys come from AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, other servers' logins"
            " from a proxy on this machine"
        )
    # a password may stand before an @, whatever else is wrong
    is_shown = first["type"] != LOGIN and not isinstance(first["input"], dict) and "@" not in str(first["input"])
    value = f" (got {first['input']!r})" if is_shown else ""
    return ConfigError(": ".join(filter(None, (path, field, f"{said}{value}"))), remedy)


def _nearest(name: str, known: list[str]) -> str | None:
    """The name that looks most like it; words that both have count twice."""

    def likeness(other: str) -> float:
        shared = "".join(set(name.split("_")) & set(other.split("_")))
        return difflib.SequenceMatcher(None, name, other).ratio() + len(shared) / max(1, len(name))

    best = max(known, key=likeness, default="")
    return best if likeness(best) >= _ALIKE else None


def _fields_at(kind: type[BaseModel], place: list[str]) -> list[str]:
    is_name = False  # of one of several sections
    for part in place:
        if is_name or part.isdecimal():  # place in a list
            is_name = False
            continue
        if part not in kind.model_fields:
            return []
        annotation = kind.model_fields[part].annotation
        options = get_args(annotation) if get_origin(annotation) else (annotation,)
        inner = next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None)
        if inner is None:
            return []
        kind, is_name = inner, get_origin(annotation) is dict
    return list(kind.model_fields)

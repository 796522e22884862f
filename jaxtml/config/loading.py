"""Finding a config by name or path, and changing single fields of it (`--set train.steps=10`).

A named config is a Python file with `get_config() -> Config` in `CONFIG_DIR`. Its `get_config` may build on another
config: it calls `load` with the name or path of the other config. Called by every command that takes CONFIG.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxtml.config.serialization import from_json, typed
from jaxtml.config.tree import Config, validate
from jaxtml.errors import InputError


def _config_dir() -> Path:
    """The folder of the named configs: `jaxtml/configs` in an installed wheel, else `configs` of the checkout."""
    package = Path(__file__).resolve().parent.parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


CONFIG_DIR = _config_dir()


def names() -> list[str]:
    """Returns the names of the named configs, sorted."""
    return sorted(path.stem for path in CONFIG_DIR.glob("[!_]*.py"))


def load(name: str, overrides: Sequence[str] = ()) -> Config:
    """Returns the config that `name` means, with the overrides applied. The result has been checked.

    Args:
      name: a file in `CONFIG_DIR` without its ".py", a path to a .py file, or a path to a checkpoint's config.json.
      overrides: `"path.to.field=value"` each; later ones win.

    Raises:
      InputError: no such config, its file does not evaluate to a `Config`, or an override does not fit.
    """
    path = Path(name)
    if path.suffix not in {".py", ".json"}:
        path = CONFIG_DIR / f"{name}.py"
    if not path.is_file() and (Path(name) / "config.json").is_file():
        raise InputError(f"{name} is a directory, and this command takes a config: name {Path(name) / 'config.json'}")
    if not path.is_file():
        raise InputError(f"no config {name!r}: give one of {', '.join(names())}, or a path to a .py or .json file")
    config = _read_json(path) if path.suffix == ".json" else _evaluate(path)
    for text in overrides:
        config = override(config, text)
    validate(config)
    return config


def _read_json(path: Path) -> Config:
    """Reads a `config.json`. The error names the file."""
    try:
        return from_json(path.read_text(errors="replace"))
    except InputError as error:
        raise InputError(f"{path}: {error}; correct the file, or take the config.json of another checkpoint") from error


def _evaluate(path: Path) -> Config:
    """Runs a config file and returns the result of its `get_config()`."""
    spec = importlib.util.spec_from_file_location(f"jaxtml_config_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config()
    except Exception as error:  # a user's file may fail in any way
        message = " ".join(str(error).split())
        raise InputError(
            f"config {path} does not evaluate: {type(error).__name__}: {message}; correct the file"
        ) from error
    if not isinstance(config, Config):
        raise InputError(f"config {path}: get_config() returned {type(config).__name__}, not a jaxtml.config.Config")
    return config


def override(config: Config, text: str) -> Config:
    """Returns `config` with one field replaced.

    Args:
      config: the config.
      text: `"path.to.field=value"`. The value is JSON, or a bare string where it is not JSON.

    Raises:
      InputError: there is no such field, or the value has another type.
    """
    key, separator, raw = text.partition("=")
    if not separator:
        raise InputError(f"--set {text!r}: write it as path.to.field=value")
    try:
        value = json.loads(raw)
    except ValueError:
        value = _number(raw)
    return _replace(config, key.split("."), value, key)


def _number(raw: str) -> float | str:
    """Returns the number that people write as `.001`, `+5` or `5.`, which is not JSON; any other text unchanged."""
    if re.fullmatch(r"[+-]?\d{1,18}", raw):
        return int(raw)
    return float(raw) if re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", raw) else raw


def _replace(node: Any, path: list[str], value: Any, key: str) -> Any:
    """Returns the dataclass `node` with the field at `path` replaced; `key` is the whole path, for messages."""
    fields = [field.name for field in dataclasses.fields(node)] if dataclasses.is_dataclass(node) else []
    name, *rest = path
    if name not in fields:
        raise InputError(f"--set {key}: no field {name!r}" + (f"; there are {', '.join(fields)}" if fields else ""))
    if rest:
        new = _replace(getattr(node, name), rest, value, key)
    else:
        new = typed(typing.get_type_hints(type(node))[name], value, key)
    return dataclasses.replace(node, **{name: new})  # pyright: ignore[reportArgumentType]

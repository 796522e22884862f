"""Third-party model files used to make data: found in their installed package, pinned by sha256, read as data only.

None of them is needed to train on a finished bank or to serve. Called by `kokoro`, `piper` and `espeak`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
from pathlib import Path

from jaxtml.errors import InputError

INSTALL = "run tools/install_voices"


def package_file(package: str, name: str) -> Path:
    """Path of a file inside an installed package, without importing (running) the package."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise InputError(f"the speech package {package.replace('_', '-')} is not installed: {INSTALL}")
    path = Path(next(iter(spec.submodule_search_locations))) / name
    if not path.is_file():
        raise InputError(f"{path} is missing from its package: {INSTALL}")
    return path


def cached_file(name: str) -> Path:
    """Path of a file that `tools/install_voices` fetched into the user's cache folder."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxtml"
    if not (cache / name).is_file():
        raise InputError(f"{cache / name} is missing: {INSTALL}")
    return cache / name


def read_pinned(paths: list[Path], sha256: str) -> bytes:
    """The files' bytes, joined; refused unless their sha256 is the pinned one."""
    data = b"".join(path.read_bytes() for path in paths)
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise InputError(f"{paths[0]} has sha256 {found[:12]}..., we pinned {sha256[:12]}...: {INSTALL}")
    return data

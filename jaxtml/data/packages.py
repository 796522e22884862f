"""Files of third-party packages, found where they are installed, checked against a pinned sha256 and read as data.

Speech engines (`jaxtml.data.voices`) and the speech recogniser of the evaluations (`jaxtml.evals.judge`) read their
model files from here. Neither training on a finished bank nor serving needs these files.
"""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path

from jaxtml.errors import InputError
from jaxtml.user_cache import cache_folder

INSTALL = "run tools/install_voices in the clone of jaxtml"
"""The remedy that error messages name."""


def package_file(package: str, name: str) -> Path:
    """Returns the path of a file inside an installed package. The package is not imported, so none of its code runs.

    Raises:
      InputError: the package is not installed, or lacks the file.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise InputError(f"the speech package {package.replace('_', '-')} is not installed: {INSTALL}")
    path = Path(next(iter(spec.submodule_search_locations))) / name
    if not path.is_file():
        raise InputError(f"{path} is missing from its package: {INSTALL}")
    return path


def cached_file(name: str) -> Path:
    """Returns the path of a file that `tools/install_voices` fetched into the user's cache folder.

    Raises:
      InputError: the file is not there.
    """
    cache = cache_folder()
    if cache is None:
        raise InputError(f"no cache folder for {name}: set HOME or XDG_CACHE_HOME, then {INSTALL}")
    if not (cache / name).is_file():
        raise InputError(f"{cache / name} is missing: {INSTALL}")
    return cache / name


def read_pinned(paths: list[Path], sha256: str) -> bytes:
    """Returns the bytes of the files, one after the other.

    Raises:
      InputError: the sha256 of these bytes is not the pinned one.
    """
    data = b"".join(path.read_bytes() for path in paths)
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise InputError(f"{paths[0]} has sha256 {found[:12]}..., the pinned one is {sha256[:12]}...: {INSTALL}")
    return data

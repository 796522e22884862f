"""Where jaxtml keeps files for this user between runs: compiled programs, and voices that were fetched.

Called by the command line and by `jaxtml.data.packages`.
"""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path | None:
    """Returns the user's cache folder of jaxtml, which need not exist; None if the user has no home.

    The folder follows the XDG Base Directory Specification: `$XDG_CACHE_HOME/jaxtml` if the variable has an absolute
    path, else `~/.cache/jaxtml`. A container may run under a user that has no entry in /etc/passwd and no HOME.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if base.is_absolute():
        return base / "jaxtml"
    try:
        return Path.home() / ".cache" / "jaxtml"
    except RuntimeError:  # neither HOME nor an entry in /etc/passwd
        return None


def is_writable_folder(folder: Path) -> bool:
    """Makes `folder` if it does not exist. Returns whether files can be written into it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK | os.X_OK)

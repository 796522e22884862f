"""Puts the folder of a run back as it was if the run fails before its first step.

Called by `jaxtml.train.loop` and `jaxtml.train.vocoder.training` around everything that writes into the folder.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import jax


class Start:
    """The start of a run, as a context manager. `succeeded()` says that the first step is done.

    Without that call, an exception removes the folders and files that the start has made. Those of `files` that were
    there before get their former content, except a log. So a start that failed neither leaves a folder behind nor
    changes the settings of the run that it resumed. Only process 0 writes these files, so only process 0 puts them
    back.
    """

    def __init__(self, workdir: Path, folders: Sequence[str], files: Sequence[str]):
        """Notes what is there.

        Args:
          workdir: the folder of the run.
          folders: the names of the folders that a run makes there.
          files: the names of the files that a run writes there.
        """
        self._has_step = False
        self._made = [place for place in (workdir, *workdir.absolute().parents) if not place.exists()]
        self._new = [workdir / name for name in (*folders, *files) if not (workdir / name).exists()]
        settings = [workdir / name for name in files if not name.startswith("log.")]
        self._before = {path: path.read_bytes() for path in settings if path.is_file()}

    def succeeded(self) -> None:
        """Keeps the folder as it is now, whatever happens later."""
        self._has_step = True

    def __enter__(self) -> Start:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        if error is None or self._has_step or jax.process_index() != 0:
            return
        try:
            self._put_back()
        except OSError:  # for example a full disk: the error that ended the start, `error`, is the one to report
            return

    def _put_back(self) -> None:
        for path in self._new:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        for path, text in self._before.items():
            if not path.is_file() or path.read_bytes() != text:
                path.write_bytes(text)
        for path in (*self._new, *self._before):
            path.with_name(f".{path.name}.partial").unlink(missing_ok=True)  # of `storage.write_atomically`
        for folder in self._made:
            folder.rmdir()  # fails if somebody else has put something there meanwhile

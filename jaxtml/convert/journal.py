"""The journal of a conversion: which chunks are written, so that an interrupted conversion can go on.

The journal is a file of JSON lines in the folder that the conversion writes to. The first line identifies the
conversion, and has the boot id of the machine, which changes with every restart. Each other line is one chunk. Called
by `convert.streaming`.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import threading
from pathlib import Path
from typing import Any, TextIO

from absl import logging

from jaxtml.errors import InputError
from jaxtml.strict_json import dumps

JOURNAL = "journal.jsonl"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Journal:
    """The journal of the conversion that writes to `folder`.

    If the journal belongs to another conversion, the folder is emptied, and the conversion begins anew. The same
    happens if the machine has been restarted since: a chunk in the journal may not have reached the disk. The log says
    which of the two it was.

    Until it is closed, a journal locks its folder against other conversions.

    Args:
      folder: the folder that the conversion writes to. It is made if it is missing.
      identity: a text that identifies the conversion.

    Attributes:
      done: for each layer, the number of chunks that are written, and the CRC-32 of all of them.
      bytes_written: the size of these chunks.
      nonfinite: the layers in which NaN or an infinite value has been written.

    Raises:
      InputError: another conversion writes to the folder.
    """

    def __init__(self, folder: Path, identity: str):
        self.file = folder / JOURNAL
        self.done: dict[str, tuple[int, int]] = {}
        self.bytes_written = 0
        self.nonfinite: set[str] = set()
        self._lock = threading.Lock()
        self._opened: TextIO | None = None
        boot = _BOOT_ID.read_text().strip() if _BOOT_ID.is_file() else ""
        self._head = {"identity": identity, "boot": boot}
        folder.mkdir(exist_ok=True)
        self._folder = _lock_folder(folder)
        lines = self.file.read_text(errors="replace").splitlines() if self.file.is_file() else []
        head = _parse(lines[0]) if lines else None
        if head != self._head:
            if head is not None:
                restarted = isinstance(head, dict) and head.get("identity") == identity
                reason = "the machine was restarted since" if restarted else "it was of another source or other options"
                logging.info("%s has an earlier conversion, and %s: beginning anew", folder, reason)
            for path in folder.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            return
        for line in lines[1:]:
            entry = _parse(line)
            if entry is None:  # the last line of a conversion that was killed while writing it
                continue
            self.done[entry["layer"]] = (entry["chunks"], entry["crc32"])
            self.bytes_written += entry["bytes"]
            if entry.get("nonfinite"):
                self.nonfinite.add(entry["layer"])

    def forget(self) -> None:
        """Makes the next conversion begin anew."""
        self.file.unlink()

    def begin(self) -> None:
        """Opens the journal for entries. Called when the folder is prepared for chunks."""
        is_new = not self.file.is_file()
        self._opened = open(self.file, "a")  # noqa: SIM115 (closed by `close`)
        # An old journal may end in the middle of a line: end that line.
        self._append(dumps(self._head) if is_new else "")

    def note(self, layer: str, chunks: int, crc32: int, nbytes: int, nonfinite: bool) -> None:
        """Notes that one more chunk of a layer is written. Several threads may call this method at the same time.

        Args:
          layer: the name of the layer's part of a parameter.
          chunks: the number of chunks of this part that are written.
          crc32: the checksum of these chunks.
          nbytes: the size of the new chunk.
          nonfinite: whether the new chunk has NaN or an infinite value.
        """
        entry = {"layer": layer, "chunks": chunks, "crc32": crc32, "bytes": nbytes}
        if nonfinite:
            self.nonfinite.add(layer)
            entry["nonfinite"] = True
        self._append(dumps(entry))

    def _append(self, line: str) -> None:
        assert self._opened is not None, "begin() comes first"
        with self._lock:
            self._opened.write(line + "\n")
            self._opened.flush()

    def close(self) -> None:
        """Closes the file and unlocks the folder."""
        if self._opened is not None:
            self._opened.close()
        os.close(self._folder)


def _lock_folder(folder: Path) -> int:
    """Locks a folder and returns its descriptor. The lock ends with the descriptor, also if the process is killed."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise InputError(f"{folder} is being written by another conversion: wait until it ends") from error
    return descriptor


def _parse(line: str) -> dict[str, Any] | None:
    """Returns a line's JSON, or None for a line that was cut off."""
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None

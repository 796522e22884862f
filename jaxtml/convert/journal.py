"""Journal of a conversion."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import threading
from pathlib import Path
from typing import Any

from jaxtml.errors import InputError

JOURNAL = "journal.jsonl"
_BOOT = Path("/proc/sys/kernel/random/boot_id")


class Journal:
    """Which chunks of a conversion are written. One from before the machine last started is worth nothing: what was not
    yet on the disk then is lost. As long as it is not closed, the folder is its own."""

    def __init__(self, folder: Path, identity: str):
        folder.mkdir(exist_ok=True)
        self.folder = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(self.folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self.folder)
            raise InputError(f"{folder} is being written by another conversion") from error
        self.file, self.lock = folder / JOURNAL, threading.Lock()
        boot = _BOOT.read_text().strip() if _BOOT.is_file() else ""
        self.head = {"identity": identity, "boot": boot}
        self.done: dict[str, tuple[int, int]] = {}  # layer -> chunks, CRC-32 of them
        self.written = 0
        self.opened: Any = None
        lines = self.file.read_text(errors="replace").splitlines() if self.file.is_file() else []
        if not lines or _parsed(lines[0]) != self.head:
            for left in folder.iterdir():
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            return
        for line in lines[1:]:
            entry = _parsed(line)
            if entry is None:  # the last, half written
                continue
            self.done[entry["layer"]] = (entry["chunks"], entry["crc32"])
            self.written += entry["bytes"]

    def forget(self) -> None:
        """The next conversion begins anew."""
        self.file.unlink()

    def begin(self) -> None:
        """The folder is prepared: chunks will be noted."""
        begun = self.file.is_file()
        self.opened = open(self.file, "a")  # noqa: SIM115 (closed by `close`)
        self._append(None if begun else self.head)

    def note(self, layer: str, count: int, checksum: int, size: int) -> None:
        self._append({"layer": layer, "chunks": count, "crc32": checksum, "bytes": size})

    def _append(self, entry: dict[str, Any] | None) -> None:
        """None ends a line that may have been cut off."""
        with self.lock:
            self.opened.write("\n" if entry is None else json.dumps(entry) + "\n")
            self.opened.flush()

    def close(self) -> None:
        if self.opened is not None:
            self.opened.close()
        os.close(self.folder)


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None

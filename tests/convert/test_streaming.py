"""A destination exists only when it is complete, a killed conversion can be resumed, and every failure is one line."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from jaxtml.checkpoint.chunks import conversion_chunks
from jaxtml.checkpoint.inkling.source import ReleasedCheckpoint
from jaxtml.checkpoint.opening import open_checkpoint
from jaxtml.checkpoint.orbax.sink import OrbaxSink
from jaxtml.checkpoint.orbax.source import OrbaxCheckpoint
from jaxtml.convert import journal
from jaxtml.convert.conversion import convert
from jaxtml.convert.journal import Journal
from jaxtml.convert.streaming import copy_parameters
from jaxtml.errors import InputError

pytestmark = pytest.mark.usefixtures("many_chunks")

# A program that converts argv[1] to argv[2] in the format argv[3], and kills itself after 100 chunks.
KILLED_CONVERSION = """
import os, signal, sys
from jaxtml.checkpoint import chunks
from jaxtml.convert.conversion import convert
from jaxtml.convert.journal import Journal
chunks.CHUNK_BYTES = 2**15
note, noted = Journal.note, []
def note_and_die(self, *args):
    note(self, *args)
    noted.append(args)
    if len(noted) == 100:
        os.kill(os.getpid(), signal.SIGKILL)
Journal.note = note_and_die
convert(sys.argv[1], sys.argv[2], to=sys.argv[3])
"""


@pytest.mark.parametrize("to", ["orbax", "hf"])
def test_a_killed_conversion_goes_on_says_where_and_writes_no_chunk_twice(to, release, tmp_path, monkeypatch, info_log):
    source = release
    if to == "hf":
        convert(release, tmp_path / "source")
        source = tmp_path / "source"
    command = [sys.executable, "-c", KILLED_CONVERSION, str(source), str(tmp_path / "out"), to]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    killed = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    assert not (tmp_path / "out").exists(), "an incomplete result is not at its destination"
    file = tmp_path / ".out.converting" / "journal.jsonl"
    entries = [json.loads(line) for line in file.read_text().splitlines()[1:] if line]
    with open(file, "a") as opened:
        opened.write('{"layer": "cut o')  # as a crash may leave it
    done = {(entry["layer"], entry["chunks"]) for entry in entries}
    assert len(done) >= 100

    noted: list[tuple[str, int]] = []
    note = Journal.note

    def note_and_remember(self, layer, chunks, *rest):
        noted.append((layer, chunks))
        note(self, layer, chunks, *rest)

    monkeypatch.setattr(Journal, "note", note_and_remember)
    assert "tensors equal" in convert(source, tmp_path / "out", to=to, verify=True)
    written = re.search(
        r"going on with an earlier conversion, which has written (\d+) of (\d+) tensors, \d+\.\d of", info_log.text
    )
    assert written is not None and 0 < int(written[1]) < int(written[2]), info_log.text
    assert not done & set(noted) and len(noted) == len(set(noted)) > 0
    assert not list(tmp_path.glob(".out*"))
    convert(source, tmp_path / "uninterrupted", to=to)
    resumed, uninterrupted = (
        json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("out", "uninterrupted")
    )
    assert resumed["tensors"] == uninterrupted["tensors"]


def test_a_conversion_begins_anew_after_the_source_changed_or_the_machine_restarted(
    release, tmp_path, monkeypatch, info_log
):
    source = tmp_path / "source"
    shutil.copytree(release, source)
    write, chunks_left = OrbaxSink.write, [0]

    def write_or_stop(self, *args):
        chunks_left[0] -= 1
        if chunks_left[0] < 0:
            raise KeyboardInterrupt
        return write(self, *args)

    def chunks_after_an_interruption() -> int:
        """Converts 50 chunks more, and returns how many the journal then has."""
        chunks_left[0] = 50
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(OrbaxSink, "write", write_or_stop)
            convert(source, tmp_path / "out")
        lines = (tmp_path / ".out.converting" / "journal.jsonl").read_text().splitlines()
        return sum('"layer"' in line for line in lines)

    first = chunks_after_an_interruption()
    assert chunks_after_an_interruption() > first, "the second conversion went on"
    boot_id = tmp_path / "boot_id"
    boot_id.write_text("another")
    monkeypatch.setattr(journal, "_BOOT_ID", boot_id)
    assert chunks_after_an_interruption() <= first
    assert "and the machine was restarted since: beginning anew" in info_log.text
    boot_id.write_text("")
    os.utime(source / "model.safetensors")
    assert chunks_after_an_interruption() <= first
    assert "and it was of another source or other options: beginning anew" in info_log.text


@contextmanager
def _conversion_waits_in(method_name: str, source: Path, out: Path, monkeypatch) -> Iterator[None]:
    """A context in which a conversion in another thread waits in a method of its sink."""
    reached, go_on = threading.Event(), threading.Event()
    method = getattr(OrbaxSink, method_name)

    def wait(self, *args):
        reached.set()
        go_on.wait(60)
        return method(self, *args)

    monkeypatch.setattr(OrbaxSink, method_name, wait)
    thread = threading.Thread(target=convert, args=(source, out))
    thread.start()
    try:
        assert reached.wait(60)
        yield
    finally:
        go_on.set()
        thread.join()


@pytest.mark.parametrize("dtype", [None, "float32"])
@pytest.mark.parametrize("method", ["prepare", "write"])
def test_a_second_conversion_to_the_same_destination_is_refused(method, dtype, release, tmp_path, monkeypatch):
    refused = pytest.raises(InputError, match="is being written by another conversion")
    with _conversion_waits_in(method, release, tmp_path / "out", monkeypatch), refused:
        convert(release, tmp_path / "out", dtype=dtype)
    assert OrbaxCheckpoint(tmp_path / "out").config.backbone == open_checkpoint(release).config.backbone
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    with pytest.raises(InputError, match="exists: name a new directory"):
        convert(release, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_one_error_stops_all_threads_at_their_next_chunk(release, tmp_path, monkeypatch):
    """The threads wait until one has failed. Then each may finish its chunk, and begins no other."""
    write, failed, written_after = OrbaxSink.write, threading.Event(), []

    def fail_or_write(self, path, index, values):
        if path == first:
            failed.set()
            raise RuntimeError("broken")
        failed.wait(60)
        written_after.append(path)
        return write(self, path, index, values)

    source = ReleasedCheckpoint(release)
    sink = OrbaxSink(source.config, {path: source.dtype(path) for path in source.specs}, {})
    first = next(iter(sink.specs))
    monkeypatch.setattr(OrbaxSink, "write", fail_or_write)
    with pytest.raises(RuntimeError, match="broken"):
        copy_parameters(source, sink, tmp_path / "out", "release", workers=4)
    assert len(written_after) < 40 < len(conversion_chunks(sink.specs, sink.dtype))


def test_a_file_in_place_of_the_folder_is_called_a_file(release, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write .*: .*/file is a file; name another folder"):
        convert(release, tmp_path / "file" / "out")


def test_a_disk_without_room_is_refused_before_anything_is_written(release, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6 - 1000, 1000))
    with pytest.raises(InputError, match=r"out needs \d.\d MB, and its disk has 0.0 MB left"):
        convert(release, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_is_refused_in_one_line_and_the_conversion_goes_on_later(release, tmp_path, monkeypatch):
    prepare = OrbaxSink.prepare

    class FullDisk:
        """An array that raises what TensorStore raises on a full disk."""

        def __getitem__(self, index):
            return self

        def write(self, values):
            raise ValueError(
                'RESOURCE_EXHAUSTED: Error writing local file "/o/state/norm.weight/c/0": Failed writing: '
                "Failed to write 348180 bytes to file 4: No space left on device [os_error_code='28']"
            )

    def prepare_with_room_for_30_arrays(self, folder):
        prepare(self, folder)
        self.arrays |= dict.fromkeys(list(self.arrays)[30:], FullDisk())

    message = "out.*: the disk is full; make room and convert again: the conversion goes on from here"
    with monkeypatch.context() as patched:
        patched.setattr(OrbaxSink, "prepare", prepare_with_room_for_30_arrays)
        with pytest.raises(InputError, match=message):
            convert(release, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert "tensors equal" in convert(release, tmp_path / "out", verify=True)


def test_a_conversion_that_is_killed_while_the_disk_syncs_writes_nothing_again(release, tmp_path, monkeypatch):
    def die() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(os, "sync", die)
        with pytest.raises(KeyboardInterrupt):
            convert(release, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    written: list[str] = []
    monkeypatch.setattr(OrbaxSink, "write", lambda self, path, *_: written.append(path))
    convert(release, tmp_path / "out")
    assert not written and open_checkpoint(tmp_path / "out").config == open_checkpoint(release).config
    assert not (tmp_path / "out" / journal.JOURNAL).exists()

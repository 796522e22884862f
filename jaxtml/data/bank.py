"""The utterance bank: a folder with finished shards of synthesised speech, built once and read by memory map.

`build` speaks a plan (`jaxtml.data.bank_plan`) in worker processes, one shard at a time. `Bank` reads the shards that
are finished. Called by `jaxtml.data.conversations`, the vocoder's training and the evaluations.

The samples of a shard are written first, and its index is renamed into place last. A killed build therefore loses
at most the shards that were being built, and a half-built bank can be used at once. A fresh process synthesises each
shard, so that the content of a shard depends only on the utterances that the plan gives it.

    bank.json    digest of the plan, numbers of shards and utterances
    00012.pcm    samples of all utterances of a shard, one after the other (int16, 16 kHz)
    00012.jsonl  checksum of the samples, then one line per utterance, in the same order

Axis glossary: N samples of one utterance.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TypedDict

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from jaxtml.data.voices import registry
from jaxtml.data.voices.utterance import Utterance
from jaxtml.errors import InputError
from jaxtml.stream.conversation import Word

FORMAT = 1


@dataclass(frozen=True)
class PlannedUtterance:
    """One utterance to be spoken. Its field names are part of a bank's files and of its digest.

    Attributes:
      role: "assistant"; "user" for a sentence of a user; "words" for a user's voice that says a few single words, each
        followed by a pause.
      split: "train" or "test"; the assistant has "train" alone.
      voice: name as in `jaxtml.data.voices.registry`.
      text: what to say.
      rate, pitch: factors, see `registry.synthesise`.
    """

    role: str
    split: str
    voice: str
    text: str
    rate: float = 1.0
    pitch: float = 1.0


Item = PlannedUtterance  # its name in version 0.1: scripts that build banks use it

Shards = Sequence[Sequence[PlannedUtterance]]
"""A plan: the utterances of each shard."""

Speak = Callable[[PlannedUtterance], Utterance]


class BankHead(TypedDict):
    """The content of `bank.json`. `plan` is the digest of the plan, `items` the number of its utterances."""

    format: int
    plan: str
    shards: int
    items: int


def _synthesise(planned: PlannedUtterance) -> Utterance:
    return registry.synthesise(planned.voice, planned.text, rate=planned.rate, pitch=planned.pitch)


def _digest(shards: Shards) -> str:
    plan = [[asdict(planned) for planned in shard] for shard in shards]
    return hashlib.sha256(json.dumps(plan).encode()).hexdigest()


# --- building


def build(folder: Path, shards: Shards, workers: int, speak: Speak = _synthesise) -> None:
    """Speaks every shard that is not finished yet. Can be killed and started again.

    Args:
      folder: the bank, created if it is not there.
      shards: the plan.
      workers: shards that are spoken at a time, each in a process of its own.
      speak: makes the sound. Worker processes import it by name, so it is a function at the top of a module.

    Raises:
      InputError: `folder` holds a bank of another plan, or a speech engine is missing.
      RuntimeError: a worker process died.
    """
    folder.mkdir(parents=True, exist_ok=True)
    head = BankHead(format=FORMAT, plan=_digest(shards), shards=len(shards), items=sum(map(len, shards)))
    if (folder / "bank.json").exists():
        if _read_head(folder) != head:
            raise InputError(f"{folder} holds a bank of another plan: name a new folder, or remove this one")
    else:
        _write_atomically(folder / "bank.json", json.dumps(head).encode())
    missing = [number for number in range(len(shards)) if not _index_path(folder, number).exists()]
    columns = (
        *(TextColumn("bank"), BarColumn(), MofNCompleteColumn(), TextColumn("utterances")),
        *(TimeElapsedColumn(), TextColumn("ETA"), TimeRemainingColumn()),
    )
    with Progress(*columns) as progress:
        remaining = sum(len(shards[number]) for number in missing)
        task = progress.add_task("", total=head["items"], completed=head["items"] - remaining)
        jobs = [(number, (folder, number, shards[number], speak)) for number in missing]
        for number in _run_in_processes(jobs, workers):
            progress.advance(task, len(shards[number]))


def _run_in_processes(jobs: list[tuple[int, tuple]], workers: int) -> Iterator[int]:
    """Runs `_build_shard` for each job in its own process, `workers` at a time. Yields the numbers of finished shards.

    A pool of processes cannot be used, because a pool's process builds many shards. No state of a speech engine may
    leak from one shard into the next. A worker that dies closes its pipe, and the build fails with an error. A worker
    whose parent was killed finishes its shard and ends.

    Args:
      jobs: `(shard number, arguments of _build_shard)`.
      workers: processes.
    """
    context = multiprocessing.get_context("spawn")
    waiting = list(reversed(jobs))
    running: dict[Connection, tuple[BaseProcess, int]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                number, arguments = waiting.pop()
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(target=_build_shard, args=(sender, *arguments), daemon=True)
                process.start()
                sender.close()
                running[receiver] = (process, number)  # pyright: ignore[reportArgumentType] (Windows type)
            ready = wait(list(running))
            for receiver in [receiver for receiver in running if receiver in ready]:
                process, number = running.pop(receiver)
                try:
                    error = receiver.recv()
                except EOFError:
                    error = RuntimeError(f"the process that spoke shard {number} died: run the build again")
                process.join()
                if error is not None:
                    raise error
                yield number
    finally:
        for process, _ in running.values():
            process.terminate()


def _build_shard(
    result: Connection, folder: Path, number: int, utterances: Sequence[PlannedUtterance], speak: Speak
) -> None:
    """Speaks a shard and writes it, in a worker process. Sends None, or the exception that stopped it."""
    try:
        lines, samples, offset = [], [], 0
        for planned in utterances:
            spoken = speak(planned)
            words = [[w.text, round(w.start_s, 3), round(w.end_s, 3)] for w in spoken.words]
            lines.append(json.dumps({**asdict(planned), "offset": offset, "length": len(spoken.wave), "words": words}))
            samples.append(np.round(spoken.wave * 32767).astype("<i2"))
            offset += len(spoken.wave)
        pcm = np.concatenate(samples).tobytes()
        _write_atomically(_pcm_path(folder, number), pcm)
        lines.insert(0, json.dumps({"sha256": hashlib.sha256(pcm).hexdigest(), "bytes": len(pcm)}))
        _write_atomically(_index_path(folder, number), "\n".join(lines).encode())
    except Exception as error:
        result.send(error)
    else:
        result.send(None)


def _write_atomically(path: Path, data: bytes) -> None:
    """Writes a file under another name and renames it: a reader finds all of the file or none of it."""
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_bytes(data)
    partial.replace(path)


def _index_path(folder: Path, number: int) -> Path:
    return folder / f"{number:05}.jsonl"


def _pcm_path(folder: Path, number: int) -> Path:
    return folder / f"{number:05}.pcm"


# --- reading


@dataclass(frozen=True)
class BankEntry:
    """One utterance of a bank.

    Attributes:
      planned: what was asked for.
      shard: number of its shard.
      offset, length: its samples in the shard.
      words: the words with the times at which they are heard.
    """

    planned: PlannedUtterance
    shard: int
    offset: int
    length: int
    words: tuple[Word, ...]

    @property
    def seconds(self) -> float:
        """Length of the sound in seconds."""
        return self.words[-1].end_s


@dataclass(frozen=True)
class Bank:
    """The finished shards of a bank.

    Index `i` counts utterances in the order of the plan, over the shards that were finished when the bank was opened.
    The index of an utterance is stable in a complete bank. It changes while a bank is being built.

    Attributes:
      folder: the bank's folder.
      entries: the utterances.
      complete: whether all shards of the plan are finished.
      digest: sha256 over the plan and the samples of the finished shards. Two banks with the same digest have the same
        utterances at the same indices.
    """

    folder: Path
    entries: tuple[BankEntry, ...]
    complete: bool
    digest: str
    _maps: dict[int, np.ndarray] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def open(cls, folder: Path | str) -> Bank:
        """Reads the index of every finished shard. Samples are mapped when they are first read.

        Raises:
          InputError: `folder` holds no bank, no finished shard, a bank of another format, or damaged files.
        """
        folder = Path(folder)
        head = _read_head(folder)
        numbers = [number for number in range(head["shards"]) if _index_path(folder, number).exists()]
        if not numbers:
            raise InputError(f"{folder} has no finished shard yet: let `jaxtml data` run on, or start it again")
        entries: list[BankEntry] = []
        digest = hashlib.sha256(head["plan"].encode())
        for number in numbers:
            shard_digest, shard_entries = _read_shard(folder, number)
            digest.update(f"{number} {shard_digest}".encode())
            entries += shard_entries
        return cls(folder, tuple(entries), len(numbers) == head["shards"], digest.hexdigest())

    def __len__(self) -> int:
        return len(self.entries)

    def __getstate__(self) -> dict[str, object]:
        """Leaves the open maps out: each worker process opens its own."""
        return {**self.__dict__, "_maps": {}}

    def utterance(self, index: int) -> Utterance:
        """Returns the utterance at `index`, its wave as `[N]` float32."""
        entry = self.entries[index]
        if entry.shard not in self._maps:
            self._maps[entry.shard] = np.memmap(_pcm_path(self.folder, entry.shard), "<i2", mode="r")
        wave = self._maps[entry.shard][entry.offset : entry.offset + entry.length].astype(np.float32) / 32767
        return Utterance(wave, entry.words, entry.planned.voice, entry.planned.text)

    def select(self, *, split: str | None = None, role: str | None = None) -> np.ndarray:
        """Returns `[n]` int64, rising: the indices of the utterances of a split and a role.

        Args:
          split: "train" or "test"; None for both.
          role: "assistant", "user" or "words" (see `PlannedUtterance`); None for all.
        """
        selected = [
            index
            for index, entry in enumerate(self.entries)
            if split in (None, entry.planned.split) and role in (None, entry.planned.role)
        ]
        return np.array(selected, np.int64)

    @cached_property
    def replies(self) -> dict[str, int]:
        """Text of each reply in the model's own voice -> its index."""
        return {e.planned.text: index for index, e in enumerate(self.entries) if e.planned.role == "assistant"}


def _read_head(folder: Path) -> BankHead:
    try:
        head = json.loads((folder / "bank.json").read_bytes())
        if head["format"] != FORMAT:
            raise InputError(f"{folder} is a bank of format {head['format']}, not {FORMAT}: build it anew")
        return head
    except FileNotFoundError as error:
        raise InputError(f"{folder} holds no utterance bank: build one with `jaxtml data`") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder / 'bank.json'} is damaged: remove the folder and build the bank anew") from error


def _read_shard(folder: Path, number: int) -> tuple[str, list[BankEntry]]:
    """Reads the index of a shard and checks the size of its samples. Returns the samples' digest and the entries."""
    path = _index_path(folder, number)
    try:
        head, *lines = (json.loads(line) for line in path.read_text().splitlines())
        entries = []
        for line in lines:
            words = tuple(Word(*word) for word in line.pop("words"))
            offset, length = line.pop("offset"), line.pop("length")
            entries.append(BankEntry(PlannedUtterance(**line), number, offset, length, words))
        size = head["bytes"]
        is_broken = not entries or size != 2 * (entries[-1].offset + entries[-1].length)
        digest = head["sha256"]
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise InputError(f"{path} is damaged: remove it and run `jaxtml data` again, which builds it anew") from error
    pcm = _pcm_path(folder, number)
    if is_broken or not pcm.exists() or pcm.stat().st_size != size:
        raise InputError(f"{pcm} is damaged: remove {path.name} and run `jaxtml data` again, which builds both anew")
    return digest, entries

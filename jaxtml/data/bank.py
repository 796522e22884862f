"""The utterance bank: a folder with finished shards of synthesised speech, built once and read by memory map.

`build` speaks a plan (`jaxtml.data.bank_plan`) in worker processes, one shard at a time. `Bank` reads the shards that
are finished. Called by `jaxtml.data.conversations`, the vocoder's training and the evaluations.

The samples of a shard are written first, and its index is renamed into place last. A killed build therefore loses
at most the shards that were being built, and a half-built bank can be used at once. A fresh process synthesises each
shard, so that the content of a shard depends only on the utterances that the plan gives it.

    bank.json    digest of the plan, numbers of shards and utterances
    00012.pcm    samples of all utterances of a shard, one after the other (int16, 16 kHz)
    00012.jsonl  checksum of the samples, then one line per utterance, in the same order

If `build` gets a folder with a bank of another plan, it appends the new plan to this bank. It keeps the utterances that
the bank has, and speaks the missing ones into new shards. Utterances that the new plan does not have stay on disk and
are not used. Two utterances are the same if all fields of `PlannedUtterance` are. An appended bank has format 2 and one
more file, which `bank.json` names:

    order-1f2e3d4c5b6a7988.jsonl  one line per utterance, in the order of the plan: the number of its shard, its fields

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
from typing import NotRequired, TypedDict

import numpy as np
from absl import logging
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from jaxtml.data.recordings import amazon_queen
from jaxtml.data.voices import registry
from jaxtml.data.voices.utterance import Utterance
from jaxtml.errors import InputError
from jaxtml.stream.conversation import Word
from jaxtml.strict_json import dumps

FORMAT = 1
"""A bank of one plan: shard `i` holds the utterances of the plan's shard `i`."""

APPENDED_FORMAT = 2
"""A bank to which another plan was appended: a file says which shard holds each utterance of the plan."""

_APPENDED_SHARD = 60  # utterances; the slowest engine needs about a minute for them


@dataclass(frozen=True)
class PlannedUtterance:
    """One utterance to be spoken. Its field names are part of a bank's files and of its digest.

    Attributes:
      role: "assistant"; "user" for a sentence of a user; "words" for a user's voice that says a few single words, each
        followed by a pause; "line" for a recorded line of a person, of any text.
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

Adapt = Callable[[Sequence[PlannedUtterance]], Shards]
"""Returns the plan to append to a bank of another plan, given the utterances that the bank already has."""


class BankHead(TypedDict):
    """The content of `bank.json`.

    Attributes:
      format: `FORMAT` or `APPENDED_FORMAT`.
      plan: digest of the plan that `build` was called with.
      shards: number of shards, finished or not.
      items: number of utterances of the plan.
      order: name of the file with the order of the utterances, in the appended format only.
    """

    format: int
    plan: str
    shards: int
    items: int
    order: NotRequired[str]


Order = list[tuple[int, PlannedUtterance]]
"""`(number of its shard, utterance)` for each utterance of a plan, in the order of the plan."""


def _synthesise(planned: PlannedUtterance) -> Utterance:
    if planned.role == "line":
        return amazon_queen.speak(planned.voice, planned.text)
    return registry.synthesise(planned.voice, planned.text, rate=planned.rate, pitch=planned.pitch)


def _digest(shards: Shards) -> str:
    plan = [[asdict(planned) for planned in shard] for shard in shards]
    return hashlib.sha256(dumps(plan).encode()).hexdigest()


# --- building


def build(folder: Path, shards: Shards, workers: int, speak: Speak = _synthesise, adapt: Adapt | None = None) -> None:
    """Speaks every utterance that the bank does not have yet. Can be killed and started again.

    Args:
      folder: the bank, created if it is not there. A bank of another plan is appended to.
      shards: the plan.
      workers: shards that are spoken at a time, each in a process of its own.
      speak: makes the sound. Worker processes import it by name, so it is a function at the top of a module.
      adapt: called if the bank has another plan, see `Adapt`. None appends `shards` as they are.

    Raises:
      InputError: the bank's files are damaged, or a speech engine is missing.
      RuntimeError: a worker process died.
    """
    folder.mkdir(parents=True, exist_ok=True)
    plan = _digest(shards)
    has_head = (folder / "bank.json").exists()
    if not has_head and not _numbers(folder):
        _write_head(folder, BankHead(format=FORMAT, plan=plan, shards=len(shards), items=sum(map(len, shards))))
    elif not has_head or _read_head(folder)["plan"] != plan:  # shards without `bank.json` count as another plan's
        _append_plan(folder, shards, adapt, _read_head(folder)["shards"] if has_head else 0)
    contents = _contents(folder, shards)
    missing = [number for number in contents if not _index_path(folder, number).exists()]
    columns = (
        *(TextColumn("bank"), BarColumn(), MofNCompleteColumn(), TextColumn("utterances")),
        *(TimeElapsedColumn(), TextColumn("ETA"), TimeRemainingColumn()),
    )
    with Progress(*columns) as progress:
        total = sum(map(len, contents.values()))
        remaining = sum(len(contents[number]) for number in missing)
        task = progress.add_task("", total=total, completed=total - remaining)
        jobs = [(number, (folder, number, contents[number], speak)) for number in missing]
        for number in _run_in_processes(jobs, workers):
            progress.advance(task, len(contents[number]))


def missing_utterances(folder: Path, shards: Shards, adapt: Adapt | None = None) -> list[PlannedUtterance]:
    """Returns the utterances that `build`, called with the same arguments, would speak.

    Raises:
      InputError: `folder` holds no bank, or damaged files.
    """
    if _read_head(folder)["plan"] != _digest(shards):
        spoken = _spoken(folder)
        wanted = shards if adapt is None else adapt(list(spoken))
        return [planned for planned in _unique(wanted) if planned not in spoken]
    contents = _contents(folder, shards)
    return [planned for n, shard in contents.items() if not _index_path(folder, n).exists() for planned in shard]


def _append_plan(folder: Path, shards: Shards, adapt: Adapt | None, count: int) -> None:
    """Gives a bank of `count` shards another plan: writes which shard has each utterance, or will have it.

    The head is written last, and names the file that was written before it. So a build that is killed leaves a bank
    with the former plan or with the new one, never with parts of both.
    """
    plan, spoken = _digest(shards), _spoken(folder)
    wanted = shards if adapt is None else adapt(list(spoken))
    utterances = [planned for shard in wanted for planned in shard]
    missing = [planned for planned in _unique(wanted) if planned not in spoken]
    logging.info(
        "%s has another plan: %d of %d utterances are kept, %d are spoken now, %d on disk are not used",
        folder, len(set(utterances)) - len(missing), len(set(utterances)), len(missing),
        len(spoken.keys() - set(utterances)),
    )  # fmt: skip
    if _is_first_format(folder, wanted):
        _write_head(folder, BankHead(format=FORMAT, plan=plan, shards=len(wanted), items=len(utterances)))
        return
    # A worker of a build that was killed may still be writing a shard of the former plan, so no number is used twice.
    first = max(count, *(number + 1 for number in _numbers(folder)), 0)
    places = spoken | {planned: first + i // _APPENDED_SHARD for i, planned in enumerate(missing)}
    lines = "\n".join(dumps({"shard": places[planned], **asdict(planned)}) for planned in utterances).encode()
    order = f"order-{hashlib.sha256(lines).hexdigest()[:16]}.jsonl"
    _write_atomically(folder / order, lines)
    shard_count = first + -(-len(missing) // _APPENDED_SHARD)
    _write_head(
        folder, BankHead(format=APPENDED_FORMAT, plan=plan, shards=shard_count, items=len(utterances), order=order)
    )


def _unique(shards: Shards) -> list[PlannedUtterance]:
    """Returns each utterance of a plan once, in the order of the plan."""
    return list(dict.fromkeys(planned for shard in shards for planned in shard))


def _numbers(folder: Path) -> set[int]:
    """Returns the numbers of the shards that are on disk, whole or in part."""
    return {int(path.name[:5]) for path in folder.glob("[0-9][0-9][0-9][0-9][0-9].*")}


def _spoken(folder: Path) -> dict[PlannedUtterance, int]:
    """Returns utterance -> shard for every utterance on disk, whether or not the bank's plan has it."""
    spoken: dict[PlannedUtterance, int] = {}
    for path in sorted(folder.glob("[0-9][0-9][0-9][0-9][0-9].jsonl")):
        number = int(path.stem)
        for entry in _read_shard(folder, number)[1]:
            spoken.setdefault(entry.planned, number)
    return spoken


def _is_first_format(folder: Path, shards: Shards) -> bool:
    """Returns whether the shards 0, 1, ... on disk are those of the plan, as when a bank returns to its first plan."""
    return all(
        _index_path(folder, number).exists()
        and [entry.planned for entry in _read_shard(folder, number)[1]] == list(shard)
        for number, shard in enumerate(shards)
    )


def _contents(folder: Path, shards: Shards) -> dict[int, Sequence[PlannedUtterance]]:
    """Returns the number of each shard of the bank's plan, and its utterances. `shards` is the plan of `build`."""
    head = _read_head(folder)
    if head["format"] == FORMAT:
        return dict(enumerate(shards))
    contents: dict[int, dict[PlannedUtterance, None]] = {}
    for number, planned in _read_order(folder, head):
        contents.setdefault(number, {})[planned] = None
    return {number: list(contents[number]) for number in sorted(contents)}


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
            lines.append(dumps({**asdict(planned), "offset": offset, "length": len(spoken.wave), "words": words}))
            samples.append(np.round(spoken.wave * 32767).astype("<i2"))
            offset += len(spoken.wave)
        pcm = np.concatenate(samples).tobytes()
        _write_atomically(_pcm_path(folder, number), pcm)
        lines.insert(0, dumps({"sha256": hashlib.sha256(pcm).hexdigest(), "bytes": len(pcm)}))
        _write_atomically(_index_path(folder, number), "\n".join(lines).encode())
    except Exception as error:
        result.send(error)
    else:
        result.send(None)


def _write_head(folder: Path, head: BankHead) -> None:
    _write_atomically(folder / "bank.json", dumps(head).encode())


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
    The index of an utterance is stable in a complete bank. It changes while a bank is being built or appended to.

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
        order = _read_order(folder, head) if head["format"] == APPENDED_FORMAT else None
        planned_numbers = range(head["shards"]) if order is None else sorted({number for number, _ in order})
        numbers = [number for number in planned_numbers if _index_path(folder, number).exists()]
        if not numbers:
            raise InputError(f"{folder} has no finished shard yet: let `jaxtml data` run on, or start it again")
        shards: dict[int, list[BankEntry]] = {}
        digest = hashlib.sha256((head["plan"] + head.get("order", "")).encode())
        for number in numbers:
            shard_digest, shards[number] = _read_shard(folder, number)
            digest.update(f"{number} {shard_digest}".encode())
        if order is None:
            entries = [entry for number in numbers for entry in shards[number]]
        else:
            entries = _in_order(folder, order, shards)
        return cls(folder, tuple(entries), len(numbers) == len(planned_numbers), digest.hexdigest())

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
          role: "assistant", "user", "words" or "line" (see `PlannedUtterance`); None for all.
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
        if head["format"] not in (FORMAT, APPENDED_FORMAT):
            raise InputError(
                f"{folder} is a bank of format {head['format']}, this version reads {FORMAT} and {APPENDED_FORMAT}: "
                "build it anew, or use a newer version"
            )
        return head
    except FileNotFoundError as error:
        raise InputError(f"{folder} holds no utterance bank: build one with `jaxtml data`") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder / 'bank.json'} is damaged: remove it and run `jaxtml data` again") from error


def _read_order(folder: Path, head: BankHead) -> Order:
    """Reads which shard holds each utterance of the plan of an appended bank."""
    path = folder / head.get("order", "order")
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        return [(line.pop("shard"), PlannedUtterance(**line)) for line in lines]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path} is missing or damaged: remove {folder / 'bank.json'} and run `jaxtml data` again"
        ) from error


def _in_order(folder: Path, order: Order, shards: dict[int, list[BankEntry]]) -> list[BankEntry]:
    """Returns the utterances of the finished `shards` in the order of the plan."""
    places = {(number, entry.planned): entry for number, entries in shards.items() for entry in entries}
    finished = [place for place in order if place[0] in shards]
    lost = next((place for place in finished if place not in places), None)
    if lost is not None:
        path = _index_path(folder, lost[0])
        raise InputError(f"{path} lacks {lost[1].text!r}: remove it and run `jaxtml data` again, which builds it anew")
    return [places[place] for place in finished]


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

"""The utterance bank: a folder of finished shards of synthesised speech, built once and read by memory map.

`plan` decides, from counts and a seed alone, who says what; `build` speaks the plan in worker processes, one shard at a
time; `Bank` reads whatever shards are finished. A shard's samples are written first and its index is renamed into place
last, so a killed build loses at most the shards in work, and a half-built bank can be used at once. Each shard is
spoken by a fresh process: its content depends on its items alone. Called by `jaxtml data` and by `mix`.

    bank.json               the plan's digest and sizes
    00012.pcm, 00012.jsonl  samples (int16, 16 kHz, joined); one line per utterance, in the same order

Axis glossary: N samples.
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

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from jaxtml.data.tasks import scenarios
from jaxtml.data.voices import registry
from jaxtml.data.voices.utterance import Utterance
from jaxtml.errors import InputError
from jaxtml.stream.conversation import Word

# Items per shard: about a minute of work, which is what a kill can cost and next to which a fresh process is nothing.
SLOW_SHARD, QUICK_SHARD = 60, 240
WORDS_AT_ONCE = 4  # named by one utterance: alone, a word is too short for the neural voices
_ROUNDS = {"flite": 4, "piper": 4}  # of the vocabulary, where an engine has few voices; else one
FORMAT = 1


@dataclass(frozen=True)
class PlannedUtterance:
    """One utterance to be spoken, for "train" or "test" (the assistant: "train").

    `role` is "user" or "assistant", or "words": a user's voice that names a few words, each with a pause behind it.
    """

    role: str
    split: str
    voice: str
    text: str
    rate: float = 1.0
    pitch: float = 1.0


@dataclass(frozen=True)
class Cast:
    """A group of user voices that speak in turn: how many sentences, and how far rate and pitch wander (factors).

    With `words`, `count` is a voice's rounds of the vocabulary, named a few words at a time, instead.
    """

    split: str
    voices: tuple[str, ...]
    count: int
    words: bool = False
    rate: tuple[float, float] = (0.85, 1.2)
    pitch: tuple[float, float] = (1.0, 1.0)


def full_casts() -> tuple[Cast, ...]:
    """The users of the bank that `tiny` is trained and tested on; about an hour of CPU, nearly all of it Kokoro's."""
    shift = (0.92, 1.1)  # beyond this a scaled spectrum sounds like nobody
    slow = (0.55, 1.0)  # who names single words takes twice the time of who says a sentence
    named = (
        ("train", registry.ESPEAK_TRAIN, (0.8, 1.35)),
        ("test", registry.ESPEAK_TEST, (0.85, 1.2)),
        ("train", registry.FLITE_TRAIN, shift),
        ("test", registry.FLITE_TEST, (1.0, 1.0)),
        ("train", registry.PIPER_TRAIN, shift),
        ("test", registry.KOKORO_TEST, (1.0, 1.0)),
        ("train", registry.KOKORO_TRAIN, shift),
    )
    return (
        Cast("train", registry.ESPEAK_TRAIN, 9000, rate=(0.8, 1.1), pitch=(0.8, 1.35)),
        Cast("test", registry.ESPEAK_TEST, 500, rate=(0.8, 1.1), pitch=(0.85, 1.2)),
        Cast("train", registry.FLITE_TRAIN, 1200, pitch=shift),
        Cast("test", registry.FLITE_TEST, 200),
        Cast("train", registry.PIPER_TRAIN, 500, pitch=shift),
        Cast("test", registry.KOKORO_TEST, 120),
        Cast("train", registry.KOKORO_TRAIN, 920, pitch=shift),
        Cast("train", registry.KOKORO_MIXED, 453, pitch=shift),
        *(Cast(split, names, _ROUNDS.get(names[0].split(":")[0], 1), words=True, rate=slow, pitch=pitch)
          for split, names, pitch in named),
    )  # fmt: skip


def plan(
    casts: Sequence[Cast],
    replies: Sequence[str],
    user_text: Callable[[np.random.Generator], str],
    seed: int,
    vocabulary: Sequence[str] = (),
) -> tuple[tuple[PlannedUtterance, ...], ...]:
    """Who says what, as shards in the order in which they are built. A pure function of its arguments.

    First every reply in the model's own voice, then the users: within a cast voices take turns, and casts of the same
    price are interleaved in proportion to their size, so that any number of finished shards is a balanced bank. Kokoro,
    thirty times slower than the rest, comes last.

    Args:
      casts: the users.
      replies: texts of the model's own voice.
      user_text: draws a sentence.
      seed: of everything that is drawn.
      vocabulary: what casts with `words` name.
    """
    spoken = [PlannedUtterance("assistant", "train", registry.OWN_VOICE, reply) for reply in replies]
    quick, slow = [], []
    for number, cast in enumerate(casts):
        rng = np.random.default_rng([seed, number])
        items = []
        for voice, text in _namings(rng, cast, vocabulary) if cast.words else _sentences(rng, cast, user_text):
            rate, pitch = (round(float(np.exp(rng.uniform(*np.log(bounds)))), 3) for bounds in (cast.rate, cast.pitch))
            items.append(PlannedUtterance("words" if cast.words else "user", cast.split, voice, text, rate, pitch))
        (slow if cast.voices[0].startswith("kokoro:") else quick).extend(
            ((index + 0.5) / len(items), number, item) for index, item in enumerate(items)
        )
    quick, slow = ([item for *_, item in sorted(group, key=lambda g: g[:2])] for group in (quick, slow))
    return tuple(
        tuple(group[first : first + size])
        for group, size in ((spoken, SLOW_SHARD), (quick, QUICK_SHARD), (slow, SLOW_SHARD))
        for first in range(0, len(group), size)
    )


def _sentences(
    rng: np.random.Generator, cast: Cast, user_text: Callable[[np.random.Generator], str]
) -> Iterator[tuple[str, str]]:
    for index in range(cast.count):
        text = user_text(rng)
        if text.split()[0] in ("is", "what") and rng.random() < 0.7:
            text += "?"  # questions mostly rise
        yield cast.voices[index % len(cast.voices)], text


def _namings(rng: np.random.Generator, cast: Cast, vocabulary: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Every word `count` times by every voice, in the falling tone of a sentence of its own."""
    orders = {voice: [str(word) for _ in range(cast.count) for word in rng.permutation(vocabulary)]
              for voice in cast.voices}  # fmt: skip
    for first in range(0, cast.count * len(vocabulary), WORDS_AT_ONCE):
        for voice in cast.voices:
            yield voice, " ".join(f"{word}." for word in orders[voice][first : first + WORDS_AT_ONCE])


def full_plan(seed: int) -> tuple[tuple[PlannedUtterance, ...], ...]:
    """The bank that `tiny` is trained and tested on: every reply of the first task, and its users."""
    return plan(
        full_casts(),
        scenarios.assistant_texts(),
        lambda rng: scenarios.sample_user_text(rng)[1],
        seed,
        scenarios.VOCABULARY,
    )


def _speak(item: PlannedUtterance) -> Utterance:
    return registry.synthesise(item.voice, item.text, rate=item.rate, pitch=item.pitch)


def _digest(shards: Sequence[Sequence[PlannedUtterance]]) -> str:
    return hashlib.sha256(json.dumps([[asdict(i) for i in shard] for shard in shards]).encode()).hexdigest()


def build(
    folder: Path,
    shards: Sequence[Sequence[PlannedUtterance]],
    workers: int,
    speak: Callable[[PlannedUtterance], Utterance] = _speak,
) -> None:
    """Speak every shard that is not finished yet. Safe to kill and to start again; refuses a folder of another plan.

    `speak` goes to worker processes by name, so it is a function of a module.
    """
    folder.mkdir(parents=True, exist_ok=True)
    head = {"format": FORMAT, "plan": _digest(shards), "shards": len(shards), "items": sum(map(len, shards))}
    if (folder / "bank.json").exists():
        if _read_head(folder) != head:
            raise InputError(f"{folder} holds a bank of another plan: name a new folder, or remove this one")
    else:
        _write(folder / "bank.json", json.dumps(head).encode())
    todo = [number for number in range(len(shards)) if not _index_path(folder, number).exists()]
    columns = (TextColumn("bank"), BarColumn(), MofNCompleteColumn(), TextColumn("utterances"), TimeElapsedColumn(),
               TextColumn("ETA"), TimeRemainingColumn())  # fmt: skip
    with Progress(*columns) as progress:
        left = sum(len(shards[number]) for number in todo)
        task = progress.add_task("", total=head["items"], completed=head["items"] - left)
        for number in _in_processes([(number, (folder, number, shards[number], speak)) for number in todo], workers):
            progress.advance(task, len(shards[number]))


def _in_processes(jobs: list[tuple[int, tuple]], workers: int) -> Iterator[int]:
    """Run `_build_shard` for each job in a process of its own, `workers` at a time; yields numbers as they finish.

    Not an executor's pool: no engine's state may leak from one shard into the next, and a worker that is killed has to
    be noticed. A worker whose parent was killed finishes its shard and ends.
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
                running[receiver] = (process, number)  # pyright: ignore[reportArgumentType] (a pipe on Windows)
            heard = wait(list(running))
            for receiver in [receiver for receiver in running if receiver in heard]:
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
    result: Connection,
    folder: Path,
    number: int,
    items: Sequence[PlannedUtterance],
    speak: Callable[[PlannedUtterance], Utterance],
) -> None:
    """In a worker process: speak a shard and write it; sends None, or the exception that stopped it."""
    try:
        lines, samples, offset = [], [], 0
        for item in items:
            utterance = speak(item)
            words = [[w.text, round(w.start_s, 3), round(w.end_s, 3)] for w in utterance.words]
            lines.append(json.dumps({**asdict(item), "offset": offset, "length": len(utterance.wave), "words": words}))
            samples.append(np.round(utterance.wave * 32767).astype("<i2"))
            offset += len(utterance.wave)
        pcm = np.concatenate(samples).tobytes()
        _write(_pcm_path(folder, number), pcm)
        lines.insert(0, json.dumps({"sha256": hashlib.sha256(pcm).hexdigest(), "bytes": len(pcm)}))
        _write(_index_path(folder, number), "\n".join(lines).encode())
    except Exception as error:
        result.send(error)
    else:
        result.send(None)


def _write(path: Path, data: bytes) -> None:
    """All of the file or none of it."""
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_bytes(data)
    partial.replace(path)


def _index_path(folder: Path, number: int) -> Path:
    return folder / f"{number:05}.jsonl"


def _pcm_path(folder: Path, number: int) -> Path:
    return folder / f"{number:05}.pcm"


def _read_head(folder: Path) -> dict:
    try:
        head = json.loads((folder / "bank.json").read_bytes())
        if head["format"] != FORMAT:
            raise InputError(f"{folder} is a bank of format {head['format']}, not {FORMAT}: build it anew")
        return head
    except FileNotFoundError as error:
        raise InputError(f"{folder} holds no utterance bank: build one with `jaxtml data`") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder / 'bank.json'} is damaged: remove the folder and build the bank anew") from error


@dataclass(frozen=True)
class Entry:
    """One utterance of a bank: what was asked for, where its samples lie and when its words are heard."""

    item: PlannedUtterance
    shard: int
    offset: int
    length: int
    words: tuple[Word, ...]

    @property
    def seconds(self) -> float:
        return self.words[-1].end_s


@dataclass(frozen=True)
class Bank:
    """The finished shards of a bank. Index `i` counts utterances in plan order over the shards that were finished when
    it was opened: stable for a complete bank, growing while one is built.

    Attributes:
      complete: whether all shards of the plan are there.
      digest: sha256 over the plan and the finished shards' samples: equal digests, equal utterances at equal indices.
    """

    folder: Path
    entries: tuple[Entry, ...]
    complete: bool
    digest: str
    _maps: dict[int, np.ndarray] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def open(cls, folder: Path | str) -> Bank:
        """Read the index of every finished shard. Samples are mapped when first asked for."""
        folder = Path(folder)
        head = _read_head(folder)
        numbers = [number for number in range(head["shards"]) if _index_path(folder, number).exists()]
        if not numbers:
            raise InputError(f"{folder} has no finished shard yet: let `jaxtml data` run on, or start it again")
        entries: list[Entry] = []
        digest = hashlib.sha256(head["plan"].encode())
        for number in numbers:
            shard_digest, shard_entries = _read_shard(folder, number)
            digest.update(f"{number} {shard_digest}".encode())
            entries += shard_entries
        return cls(folder, tuple(entries), len(numbers) == head["shards"], digest.hexdigest())

    def __len__(self) -> int:
        return len(self.entries)

    def __getstate__(self) -> dict:
        """Without the open maps: a loader's worker processes open their own."""
        return {**self.__dict__, "_maps": {}}

    def utterance(self, index: int) -> Utterance:
        """The utterance at `index`, its wave as `[N]` float32."""
        entry = self.entries[index]
        if entry.shard not in self._maps:
            self._maps[entry.shard] = np.memmap(_pcm_path(self.folder, entry.shard), "<i2", mode="r")
        wave = self._maps[entry.shard][entry.offset : entry.offset + entry.length].astype(np.float32) / 32767
        return Utterance(wave, entry.words, entry.item.voice, entry.item.text)

    def select(self, *, split: str | None = None, role: str | None = None) -> np.ndarray:
        """`[n]` int64, rising: indices of the utterances of a split ("train", "test") and a role (see
        `PlannedUtterance`)."""
        kept = [
            index
            for index, entry in enumerate(self.entries)
            if split in (None, entry.item.split) and role in (None, entry.item.role)
        ]
        return np.array(kept, np.int64)

    @cached_property
    def replies(self) -> dict[str, int]:
        """Index of each reply text in the model's own voice."""
        return {e.item.text: index for index, e in enumerate(self.entries) if e.item.role == "assistant"}


def _read_shard(folder: Path, number: int) -> tuple[str, list[Entry]]:
    path = _index_path(folder, number)
    try:
        head, *rows = (json.loads(line) for line in path.read_text().splitlines())
        entries = []
        for row in rows:
            words = tuple(Word(*word) for word in row.pop("words"))
            offset, length = row.pop("offset"), row.pop("length")
            entries.append(Entry(PlannedUtterance(**row), number, offset, length, words))
        size = head["bytes"]
        broken = not entries or size != 2 * (entries[-1].offset + entries[-1].length)
        digest = head["sha256"]
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise InputError(f"{path} is damaged: remove it and run `jaxtml data` again, which builds it anew") from error
    pcm = _pcm_path(folder, number)
    if broken or not pcm.exists() or pcm.stat().st_size != size:
        raise InputError(f"{pcm} is damaged: remove {path.name} and run `jaxtml data` again, which builds both anew")
    return digest, entries

"""Runs the first task's evaluation: sessions through the engine eight at a time, records to disk, figures at the end.

In the folder it writes: `run.json` (which model on which material), `items.jsonl` (a record per session with raw event
times, see `events`), `wavs/` (some sessions, user left, model right), `results.json`, `summary.png`. A run that was
killed goes on where it was. Called by `tools/evaluate.py`.

Axis: N samples.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from jaxtml.data.bank import Bank
from jaxtml.errors import InputError
from jaxtml.evals import judge
from jaxtml.evals import thresholds as bars
from jaxtml.evals.events import ObservedSession, from_json, observe, sound_of, to_json, understood_as
from jaxtml.evals.judge import Judge
from jaxtml.evals.material import EvaluationTalk
from jaxtml.evals.outcomes import uninterrupted
from jaxtml.session.converse import replies
from jaxtml.session.engine import Engine
from jaxtml.session.records import Reply
from jaxtml.stream.audio_file import write_wav
from jaxtml.stream.conversation import Conversation

BATCH = 8
RUN, ITEMS, RESULTS = "run.json", "items.jsonl", "results.json"
_WAVS_PER_SET = 4


@dataclass(frozen=True)
class Setting:
    """What a run depends on; a folder holds one.

    Attributes:
      model: digest of config and parameters.
      material: digest of the bank, source of the prompts, numbers of sessions.
      listener: the independent listener's name, or why there is none.
    """

    model: str
    material: dict[str, Any]
    listener: str


def digest_of(engine: Engine) -> str:
    """sha256 over the parameters as the step reads them."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(engine.params):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()[:16]


def hold(
    engine: Engine,
    items: Sequence[EvaluationTalk],
    out: Path,
    setting: Setting,
    listener: Judge | None,
    listened: int,
    batch: int = BATCH,
) -> list[ObservedSession]:
    """Holds every session that `out` has no record of yet.

    Args:
      engine: the model.
      items: the sessions.
      out: the folder.
      setting: refused if `out` holds a run of another one.
      listener: understands what the model says; None leaves that out.
      listened: how many stretches of speech per set it is given at most; it is slower than the model.
      batch: sessions side by side.

    Returns:
      The records of all items, in their order.
    """
    _claim(out, setting)
    done = {session.id: session for session in _recorded(out / ITEMS)}
    heard = {name: 0 for name in {item.set for item in items}}
    for session in done.values():
        heard[session.set] += sum(stretch.understood is not None for stretch in session.stretches)
    columns = (TextColumn("sessions"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("ETA"),
               TimeRemainingColumn())  # fmt: skip
    with Progress(*columns) as progress, (out / ITEMS).open("a") as records:
        task = progress.add_task("", total=len(items), completed=len(done))
        for block in _blocks(items, batch):
            if all(item.id in done for item in block):
                continue
            for item, talk, reply in _converse(engine, block, batch):
                if item.id in done:
                    continue
                session = observe(item.id, item.set, item.voice, talk, reply)
                if listener is not None:
                    asked = uninterrupted(session)[: max(listened - heard[item.set], 0)]
                    texts = {n: listener.hear(sound_of(session.stretches[n], reply.wave)) for n in asked}
                    session = understood_as(session, texts)
                    heard[item.set] += len(texts)
                if int(item.id.rpartition("-")[2]) < _WAVS_PER_SET:
                    write_wav(out / "wavs" / f"{item.id}.wav", np.stack([talk.user, reply.wave], axis=1))
                records.write(json.dumps(to_json(session)) + "\n")
                progress.advance(task)
                done[item.id] = session
            records.flush()
    return [done[item.id] for item in items]


def _blocks(items: Sequence[EvaluationTalk], batch: int) -> Iterator[Sequence[EvaluationTalk]]:
    """Always the same batches, so that a resumed run samples as one that was never stopped. One set per batch."""
    for name in dict.fromkeys(item.set for item in items):
        of_set = [item for item in items if item.set == name]
        yield from (of_set[first : first + batch] for first in range(0, len(of_set), batch))


def _converse(
    engine: Engine, block: Sequence[EvaluationTalk], batch: int
) -> Iterator[tuple[EvaluationTalk, Conversation, Reply]]:
    talks = [item.make() for item in block]
    empty = [np.zeros(0, np.float32)] * (batch - len(block))  # the step is compiled for one batch size
    yield from zip(block, talks, replies(engine, [*(t.user for t in talks), *empty]), strict=False)


def _claim(out: Path, setting: Setting) -> None:
    (out / "wavs").mkdir(parents=True, exist_ok=True)
    now = {"model": setting.model, "material": setting.material, "listener": setting.listener}
    if not (out / RUN).exists():
        (out / RUN).write_text(json.dumps(now, indent=2) + "\n")
    elif json.loads((out / RUN).read_text()) != now:
        raise InputError(f"{out} holds an evaluation of another model or of other material: name a new --out")


def _recorded(path: Path) -> list[ObservedSession]:
    """The sessions of a run so far; a line that a kill cut short is dropped from the file."""
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
        path.write_text("".join(lines))
    return [from_json(json.loads(line)) for line in lines]


def listener_on_the_recordings(listener: Judge, bank: Bank, texts: Sequence[str], out: Path) -> bars.Row:
    """The listener's word errors on the recordings that the model's voice was trained on: what a perfect voice would
    get. Kept in `out`, each text heard once."""
    path = out / "recordings.json"
    known: dict[str, str] = json.loads(path.read_text()) if path.exists() else {}
    there = [text for text in dict.fromkeys(texts) if text in bank.replies]
    for text in there:
        if text not in known:
            known[text] = listener.hear(bank.utterance(bank.replies[text]).wave)
    path.write_text(json.dumps(known, indent=0))
    wrong, said = (sum(column) for column in zip((0, 0), *(judge.errors(t, known[t]) for t in there), strict=True))
    return bars.counted("recordings_word_errors", "own voice", wrong, said, at_least=False)

"""Runs the model on the sessions of an evaluation, a batch at a time, and writes their records to disk.

In the folder of an evaluation: `run.json` (which model on which material), `items.jsonl` (a record per session, see
`jaxtml.evals.record`), `wavs/` (some sessions, user left, model right); `tools/evaluate.py` adds `results.json` and
`summary.png`. An evaluation that was killed resumes where it was. Called by `tools/evaluate.py`.

Axis: N samples.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import jax
import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from jaxtml.errors import InputError
from jaxtml.evals.material import EvaluationTalk
from jaxtml.evals.observation import observe, stretch_sound
from jaxtml.evals.outcomes import uninterrupted_stretches
from jaxtml.evals.record import ObservedSession, from_json, to_json
from jaxtml.session.converse import replies
from jaxtml.session.engine import Engine
from jaxtml.session.records import Reply
from jaxtml.stream.audio_file import write_wav
from jaxtml.stream.conversation import Conversation
from jaxtml.strict_json import dumps

BATCH = 8
RUN, RECORDS, RESULTS = "run.json", "items.jsonl", "results.json"
_WAVS_PER_SET = 4


@dataclass(frozen=True)
class EvaluationSettings:
    """Everything that an evaluation depends on. A folder holds one evaluation. The attributes are keys of `run.json`.

    Attributes:
      model: digest of the parameters.
      material: digest of the bank, source of the prompts, numbers of sessions.
      listener: the judge's name, or why there is none.
    """

    model: str
    material: dict[str, object]
    listener: str


class Transcriber(Protocol):
    """A judge, or a test's stand-in for one."""

    def transcribe(self, wave: np.ndarray, /) -> str:
        """Returns the words in `[N]` float32 at 16 kHz."""
        ...


def parameter_digest(engine: Engine) -> str:
    """Returns a digest of the engine's parameters, as `jaxtml.model.duplex.programs.Duplex.prepare` returned them."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(engine.params):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()[:16]


def hold_sessions(
    engine: Engine,
    talks: Sequence[EvaluationTalk],
    out: Path,
    settings: EvaluationSettings,
    judge: Transcriber | None,
    max_judged: int,
    batch: int = BATCH,
) -> list[ObservedSession]:
    """Runs the model on every session of which `out` has no record yet, and appends the records.

    Args:
      engine: the model.
      talks: the sessions.
      out: the folder.
      settings: of the evaluation.
      judge: transcribes the model's speech; None leaves the transcripts out.
      max_judged: the most stretches of the model's speech per set that the judge transcribes. The judge is slower than
        the model.
      batch: sessions side by side.

    Returns:
      The records of all sessions, in the order of `talks`.

    Raises:
      InputError: `out` holds an evaluation with other settings.
    """
    _claim(out, settings)
    done = {session.id: session for session in _read_records(out / RECORDS)}
    judged = {name: 0 for name in {talk.set for talk in talks}}
    for session in done.values():
        judged[session.set] += sum(stretch.understood is not None for stretch in session.stretches)
    columns = (TextColumn("sessions"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("ETA"),
               TimeRemainingColumn())  # fmt: skip
    with Progress(*columns) as progress, (out / RECORDS).open("a") as records:
        task = progress.add_task("", total=len(talks), completed=len(done))
        for block in _blocks(talks, batch):
            if all(talk.id in done for talk in block):
                continue
            for talk, conversation, reply in _converse(engine, block, batch):
                if talk.id in done:
                    continue
                session = observe(talk.id, talk.set, talk.voice, conversation, reply)
                if judge is not None:
                    session = _transcribe(session, reply, judge, max_judged - judged[talk.set])
                    judged[talk.set] += sum(stretch.understood is not None for stretch in session.stretches)
                if int(talk.id.rpartition("-")[2]) < _WAVS_PER_SET:
                    write_wav(out / "wavs" / f"{talk.id}.wav", np.stack([conversation.user, reply.wave], axis=1))
                records.write(dumps(to_json(session)) + "\n")
                progress.advance(task)
                done[talk.id] = session
            records.flush()
    return [done[talk.id] for talk in talks]


def _claim(out: Path, settings: EvaluationSettings) -> None:
    """Makes the folder, or checks that its evaluation has the same settings."""
    (out / "wavs").mkdir(parents=True, exist_ok=True)
    if not (out / RUN).exists():
        (out / RUN).write_text(dumps(asdict(settings), indent=2) + "\n")
    elif json.loads((out / RUN).read_text()) != asdict(settings):
        raise InputError(f"{out} holds an evaluation of another model or of other material: name a new --out")


def _read_records(path: Path) -> list[ObservedSession]:
    """Returns the records so far. If a killed run left an incomplete last line, removes this line from the file."""
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
        path.write_text("".join(lines))
    return [from_json(json.loads(line)) for line in lines]


def _blocks(talks: Sequence[EvaluationTalk], batch: int) -> Iterator[Sequence[EvaluationTalk]]:
    """Cuts the sessions into batches of one set each. Batches are always the same, so that a resumed evaluation draws
    the same tokens as an uninterrupted evaluation."""
    for name in dict.fromkeys(talk.set for talk in talks):
        of_set = [talk for talk in talks if talk.set == name]
        yield from (of_set[first : first + batch] for first in range(0, len(of_set), batch))


def _converse(
    engine: Engine, block: Sequence[EvaluationTalk], batch: int
) -> Iterator[tuple[EvaluationTalk, Conversation, Reply]]:
    """Runs the model on a batch of sessions.

    Empty sessions fill up a smaller block, because the step is compiled for one batch size.
    """
    conversations = [talk.make() for talk in block]
    empty = [np.zeros(0, np.float32)] * (batch - len(block))
    users = [*(conversation.user for conversation in conversations), *empty]
    yield from zip(block, conversations, replies(engine, users), strict=False)


def _transcribe(session: ObservedSession, reply: Reply, judge: Transcriber, limit: int) -> ObservedSession:
    """Adds the judge's transcripts of at most `limit` stretches that the user did not interrupt."""
    # The sound of a stretch that begins in the last micro-turn would come after the end of the session.
    sounds = {
        number: stretch_sound(session.stretches[number], reply.wave) for number in uninterrupted_stretches(session)
    }
    asked = [number for number, sound in sounds.items() if len(sound)][: max(limit, 0)]
    return session.with_transcripts({number: judge.transcribe(sounds[number]) for number in asked})

"""What happened in one evaluated session, as times and words: from a conversation and a reply to a record in JSON.

Everything that `jaxtml.evals.thresholds` counts is computed from these records alone, so that a finished run can be
scored again, and a single figure followed back to its sessions. Called by `jaxtml.evals.run`.

All times are seconds on the clock of the recording. Micro-turn `m` hears samples `[3200 m, 3200 (m + 1))`; what it
writes or says is there at `0.2 (m + 1)` s, which is the time that counts here. Axis: N samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from jaxtml.data.tasks.scenarios import DIGITS, GREETINGS, I_SEE, number_words, reply_to
from jaxtml.session.records import MicroTurn, Reply
from jaxtml.stream.conversation import Conversation, Word
from jaxtml.stream.timebase import MICRO_TURN_MS, MICRO_TURN_SAMPLES, SAMPLE_RATE

PAUSE_S = 0.38  # a shorter gap between two words is no pause; inserted ones begin at 0.4 s
AUDIBLE_RMS = 10 ** (-50 / 20)  # the model's voice is trained at -24 dBFS
_FRAME = SAMPLE_RATE // 200  # 5 ms
_TURN_S = MICRO_TURN_MS / 1000


@dataclass(frozen=True)
class ObservedUserTurn:
    """One turn of the user.

    Attributes:
      start_s, end_s: acoustic start of the first word and end of the last.
      scene: "exchange", "hesitation" or "barge_in"; `intent`: see `intent_of`.
      expected: the right reply; "" where the words are no sentence of the task, so that none is judged.
      words: true words with their times.
      pauses: `(start_s, end_s)` of every gap of `PAUSE_S` and more inside the turn.
    """

    start_s: float
    end_s: float
    scene: str
    intent: str
    expected: str
    words: tuple[Word, ...]
    pauses: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Heard:
    """A word of the model's transcript and when it was there."""

    text: str
    at_s: float


@dataclass(frozen=True)
class Stretch:
    """Consecutive micro-turns whose gate is open.

    Attributes:
      open_s, close_s: when the first of them is heard, and when the last of them ends.
      first_s, last_s: first and last audible sample (5 ms frames above -50 dBFS), the micro-turn in which the voice
        rings out included; None where nothing is audible.
      text: what was said; `understood`: the independent listener's transcript, None where it was not asked.
    """

    open_s: float
    close_s: float
    first_s: float | None
    last_s: float | None
    text: str
    understood: str | None = None


@dataclass(frozen=True)
class ObservedSession:
    """One evaluated session. `set`: "synthetic" or "human"; `step_ms`: median of its micro-turns, whole batches."""

    id: str
    set: str
    voice: str
    seconds: float
    turns: tuple[ObservedUserTurn, ...]
    heard: tuple[Heard, ...]
    stretches: tuple[Stretch, ...]
    step_ms: float


def to_json(session: ObservedSession) -> dict[str, Any]:
    return asdict(session)


def from_json(row: dict[str, Any]) -> ObservedSession:
    """The inverse of `to_json`."""
    turns = [
        {**turn, "words": tuple(Word(**word) for word in turn["words"]), "pauses": tuple(map(tuple, turn["pauses"]))}
        for turn in row["turns"]
    ]
    return ObservedSession(
        **{
            **row,
            "turns": tuple(ObservedUserTurn(**turn) for turn in turns),
            "heard": tuple(Heard(**heard) for heard in row["heard"]),
            "stretches": tuple(Stretch(**stretch) for stretch in row["stretches"]),
        }
    )


def observe(name: str, set_name: str, voice: str, conversation: Conversation, reply: Reply) -> ObservedSession:
    """The record of one session."""
    return ObservedSession(
        id=name,
        set=set_name,
        voice=voice,
        seconds=len(conversation.user) / SAMPLE_RATE,
        turns=turns_of(conversation),
        heard=heard_words(reply.turns),
        stretches=stretches_of(reply),
        step_ms=float(np.median([record.step_ms for record in reply.turns])),
    )


# --- the user's side


def turns_of(conversation: Conversation) -> tuple[ObservedUserTurn, ...]:
    """The user's turns, from the labels that the conversation carries."""
    scenes = [scene for scene in conversation.scenario.split() if scene in ("exchange", "hesitation", "barge_in")]
    replies = conversation.expected.split(" | ") if conversation.user_end_s else []
    turns, left = [], list(conversation.user_words)
    for end_s, scene, expected in zip(conversation.user_end_s, scenes, replies, strict=True):
        count = sum(word.end_s <= end_s + 0.01 for word in left)
        words = tuple(Word(word.text, round(word.start_s, 4), round(word.end_s, 4)) for word in left[:count])
        left = left[count:]
        gaps = [(a.end_s, b.start_s) for a, b in zip(words, words[1:], strict=False)]
        pauses = tuple(gap for gap in gaps if gap[1] - gap[0] >= PAUSE_S)
        intent = intent_of([word.text for word in words])
        turns.append(ObservedUserTurn(words[0].start_s, round(end_s, 4), scene, intent, expected, words, pauses))
    return tuple(turns)


def intent_of(words: Sequence[str]) -> str:
    """Which of the task's intents these words are; a row of the table in `jaxtml.data.tasks.scenarios`."""
    if " ".join(words) in GREETINGS:
        return "greet"
    if words[0] in ("say", "repeat", "please"):
        return "repeat"
    if "plus" in words or "minus" in words:
        return "sum"
    if words[0] == "is":
        return "yes_no"
    if reply_to(words) == I_SEE:
        return "other"
    return "number" if words[-1] in _NUMBERS else "repeat"


_NUMBERS = frozenset((*DIGITS, *(word for value in range(10, 100) for word in number_words(value).split())))


# --- the model's side


def heard_words(records: Sequence[MicroTurn]) -> tuple[Heard, ...]:
    """The transcript as words. A word may be written in pieces; it is there when its last piece is."""
    words: list[Heard] = []
    for record in records:
        at_s = (record.t_ms + MICRO_TURN_MS) / 1000
        for number, piece in enumerate(record.heard.split()):
            goes_on = number == 0 and bool(words) and not record.heard[0].isspace()
            if goes_on:
                words[-1] = Heard(words[-1].text + piece, at_s)
            else:
                words.append(Heard(piece, at_s))
    return tuple(words)


def stretches_of(reply: Reply) -> tuple[Stretch, ...]:
    """Where the gate was open, what was said there and what of it is audible."""
    speaking = np.array([False, *(record.gate == "speak" for record in reply.turns), False])
    edges = np.flatnonzero(speaking[1:] != speaking[:-1]).reshape(-1, 2)
    sounding = _audible(reply.wave)
    stretches = []
    for number, (first, end) in enumerate(edges):
        # It rings out in the micro-turn behind its last, unless the next stretch begins there.
        rung = min(end + 2, edges[number + 1][0] + 1 if number + 1 < len(edges) else end + 2)
        per_turn = MICRO_TURN_SAMPLES // _FRAME
        frames = np.flatnonzero(sounding[(first + 1) * per_turn : rung * per_turn]) + (first + 1) * per_turn
        text = "".join(record.text for record in reply.turns[first:end])
        stretches.append(
            Stretch(
                open_s=round((first + 1) * _TURN_S, 3),
                close_s=round((end + 1) * _TURN_S, 3),
                first_s=float(frames[0] * _FRAME / SAMPLE_RATE) if len(frames) else None,
                last_s=float((frames[-1] + 1) * _FRAME / SAMPLE_RATE) if len(frames) else None,
                text=" ".join(text.split()),
            )
        )
    return tuple(stretches)


def _audible(wave: np.ndarray) -> np.ndarray:
    """`[N]` -> `[N / 80]` bool: the 5 ms frames that can be heard."""
    frames = np.pad(wave, (0, -len(wave) % _FRAME)).reshape(-1, _FRAME)
    return np.sqrt(np.mean(np.square(frames), axis=1)) > AUDIBLE_RMS


def sound_of(stretch: Stretch, wave: np.ndarray) -> np.ndarray:
    """The part of a session's reply `[N]` in which a stretch sounds, its ringing included."""
    end_s = max(stretch.close_s, stretch.last_s or 0.0)
    return wave[round(stretch.open_s * SAMPLE_RATE) : round(end_s * SAMPLE_RATE)]


def understood_as(session: ObservedSession, texts: dict[int, str]) -> ObservedSession:
    """With the independent listener's transcript of some stretches, by their index."""
    stretches = [
        replace(stretch, understood=texts.get(number, stretch.understood))
        for number, stretch in enumerate(session.stretches)
    ]
    return replace(session, stretches=tuple(stretches))

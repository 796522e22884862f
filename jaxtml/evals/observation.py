"""Makes the record of a session from its conversation and the model's reply.

Called by `jaxtml.evals.run`. The user's side comes from the labels of the conversation, the model's side from its
micro-turns and its sound.

All times are seconds on the clock of the recording. In micro-turn `m` the model hears samples `[3200 m, 3200 (m + 1))`.
A word that it writes in micro-turn `m` has the time `0.2 (m + 1)` s, the end of the micro-turn. Sound of micro-turn `m`
begins at the same time. The gate of a micro-turn is open if the model speaks.

Axis: N samples.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxtml.data.talks.mix import SCENARIOS, WITHOUT_USER_TURN
from jaxtml.data.tasks.scenarios import DIGITS, GREETINGS, I_SEE, number_words, reply_to
from jaxtml.evals.record import HeardWord, ObservedSession, ObservedUserTurn, Stretch
from jaxtml.session.records import MicroTurn, Reply
from jaxtml.stream.conversation import Conversation, Word
from jaxtml.stream.timebase import MICRO_TURN_MS, MICRO_TURN_SAMPLES, SAMPLE_RATE

PAUSE_S = 0.38  # a shorter gap between two words is no pause; pauses that the mixer inserts last 0.4 s or more
AUDIBLE_RMS = 10 ** (-50 / 20)  # the model's voice is trained at -24 dBFS
_FRAME = SAMPLE_RATE // 200  # samples: 5 ms
_MICRO_TURN_S = MICRO_TURN_MS / 1000
_NUMBER_WORDS = frozenset((*DIGITS, *(word for value in range(10, 100) for word in number_words(value).split())))


def observe(name: str, set_name: str, voice: str, conversation: Conversation, reply: Reply) -> ObservedSession:
    """Returns the record of one session."""
    return ObservedSession(
        id=name,
        set=set_name,
        voice=voice,
        seconds=len(conversation.user) / SAMPLE_RATE,
        turns=user_turns(conversation),
        heard=heard_words(reply.turns),
        stretches=speech_stretches(reply),
        step_ms=float(np.median([micro_turn.step_ms for micro_turn in reply.turns])),
    )


# --- the user's side


def user_turns(conversation: Conversation) -> tuple[ObservedUserTurn, ...]:
    """Returns the user turns, from the labels of the conversation."""
    scenes = [scene for scene in conversation.scenario.split() if scene in SCENARIOS.keys() - WITHOUT_USER_TURN]
    expected_replies = conversation.expected.split(" | ") if conversation.user_end_s else []
    turns, remaining = [], list(conversation.user_words)
    for end_s, scene, expected in zip(conversation.user_end_s, scenes, expected_replies, strict=True):
        count = sum(word.end_s <= end_s + 0.01 for word in remaining)
        words = tuple(Word(word.text, round(word.start_s, 4), round(word.end_s, 4)) for word in remaining[:count])
        remaining = remaining[count:]
        gaps = [(a.end_s, b.start_s) for a, b in zip(words, words[1:], strict=False)]
        pauses = tuple(gap for gap in gaps if gap[1] - gap[0] >= PAUSE_S)
        intent = intent_of([word.text for word in words])
        turns.append(ObservedUserTurn(words[0].start_s, round(end_s, 4), scene, intent, expected, words, pauses))
    return tuple(turns)


def intent_of(words: Sequence[str]) -> str:
    """Returns the intent of a user turn: a row of the table in `jaxtml.data.tasks.scenarios`."""
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
    return "number" if words[-1] in _NUMBER_WORDS else "repeat"


# --- the model's side


def heard_words(micro_turns: Sequence[MicroTurn]) -> tuple[HeardWord, ...]:
    """Returns the model's transcript as words. A word that is written in pieces has the time of its last piece."""
    words: list[HeardWord] = []
    for micro_turn in micro_turns:
        at_s = (micro_turn.t_ms + MICRO_TURN_MS) / 1000
        for number, piece in enumerate(micro_turn.heard.split()):
            continues = number == 0 and bool(words) and not micro_turn.heard[0].isspace()
            if continues:
                words[-1] = HeardWord(words[-1].text + piece, at_s)
            else:
                words.append(HeardWord(piece, at_s))
    return tuple(words)


def speech_stretches(reply: Reply) -> tuple[Stretch, ...]:
    """Returns the stretches in which the gate was open, with their text and their audible part."""
    speaking = np.array([False, *(micro_turn.gate == "speak" for micro_turn in reply.turns), False])
    edges = np.flatnonzero(speaking[1:] != speaking[:-1]).reshape(-1, 2)
    audible = _audible_frames(reply.wave)
    frames_per_micro_turn = MICRO_TURN_SAMPLES // _FRAME
    stretches = []
    for number, (first, end) in enumerate(edges):
        # The voice rings out in the micro-turn after the last, unless the next stretch begins there.
        ring_end = min(end + 2, edges[number + 1][0] + 1 if number + 1 < len(edges) else end + 2)
        start_frame = (first + 1) * frames_per_micro_turn
        frames = np.flatnonzero(audible[start_frame : ring_end * frames_per_micro_turn]) + start_frame
        text = "".join(micro_turn.text for micro_turn in reply.turns[first:end])
        stretches.append(
            Stretch(
                open_s=round((first + 1) * _MICRO_TURN_S, 3),
                close_s=round((end + 1) * _MICRO_TURN_S, 3),
                first_s=float(frames[0] * _FRAME / SAMPLE_RATE) if len(frames) else None,
                last_s=float((frames[-1] + 1) * _FRAME / SAMPLE_RATE) if len(frames) else None,
                text=" ".join(text.split()),
            )
        )
    return tuple(stretches)


def _audible_frames(wave: np.ndarray) -> np.ndarray:
    """`[N]` -> `[N / 80]` bool: which frames of 5 ms are above -50 dBFS."""
    frames = np.pad(wave, (0, -len(wave) % _FRAME)).reshape(-1, _FRAME)
    return np.sqrt(np.mean(np.square(frames), axis=1)) > AUDIBLE_RMS


def stretch_sound(stretch: Stretch, wave: np.ndarray) -> np.ndarray:
    """Returns the sound of a stretch: a part of the session's reply `wave` `[N]`, until the voice has rung out."""
    end_s = max(stretch.close_s, stretch.last_s or 0.0)
    return wave[round(stretch.open_s * SAMPLE_RATE) : round(end_s * SAMPLE_RATE)]

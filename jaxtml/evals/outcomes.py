"""What became of each of the user's turns and words in one session: the rules by which `bars` counts. Pure.

Times are seconds on the clock of the recording, see `jaxtml.evals.events`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from jaxtml.data.tasks.scenarios import is_complete, reply_to
from jaxtml.evals import judge
from jaxtml.evals.align import align
from jaxtml.evals.events import ObservedSession, ObservedUserTurn, Stretch

WINDOW_S = 1.6  # how long after the user's end a take-over still is one
_LATE_S = 2.0  # how long after its end a word may still be written down
_EVIDENCE_S = 0.2  # one micro-turn: an opening earlier than this after the voice began cannot have known of it


@dataclass(frozen=True)
class Outcome:
    """What became of one turn of the user.

    Attributes:
      cut_in: the gate opened while the turn was under way: from 0.2 s after its start until its end.
      broken: for each pause, whether the gate opened in it, or within 0.2 s after it (less than a micro-turn of the
        voice that goes on can have been heard by then).
      reply: the first stretch that opened within `WINDOW_S` after the end and before the user's next turn.
      gate_s: from the end to that opening; `voice_s`: to its first audible sample, None if there is none.
      interrupted: the next turn began before the reply was over: its text says nothing about the answer.
      heard: the transcript from the turn's start up to the opening.
      said: everything said from the opening until the next turn.
      stop_s: if the model was audible when the turn began: from then to the last audible sample of that stretch.
    """

    session: ObservedSession
    turn: ObservedUserTurn
    cut_in: bool
    broken: tuple[bool, ...]
    reply: Stretch | None
    interrupted: bool
    heard: tuple[str, ...]
    said: str
    stop_s: float | None

    @property
    def gate_s(self) -> float | None:
        return self.reply.open_s - self.turn.end_s if self.reply else None

    @property
    def voice_s(self) -> float | None:
        return self.reply.first_s - self.turn.end_s if self.reply and self.reply.first_s is not None else None

    @property
    def right_to_heard(self) -> bool:
        return bool(self.heard) and self.said == reply_to(self.heard)

    @property
    def heard_a_sentence(self) -> bool:
        return is_complete(self.heard)

    @property
    def right_to_said(self) -> bool:
        return self.reply is not None and self.said == self.turn.expected


def outcomes(session: ObservedSession) -> tuple[Outcome, ...]:
    """What became of each turn of a session."""
    found = []
    for number, turn in enumerate(session.turns):
        last = number + 1 == len(session.turns)
        next_s = math.inf if last else session.turns[number + 1].start_s
        opened = [stretch.open_s for stretch in session.stretches]
        replies = [s for s in session.stretches if turn.end_s <= s.open_s <= min(turn.end_s + WINDOW_S, next_s)]
        reply = replies[0] if replies else None
        until = reply.open_s if reply else math.inf
        after = [s for s in session.stretches if reply and reply.open_s <= s.open_s < next_s]
        talking = [s for s in session.stretches if s.open_s < turn.start_s < (s.last_s or 0.0)]
        found.append(
            Outcome(
                session,
                turn,
                cut_in=any(turn.start_s + _EVIDENCE_S <= at < turn.end_s for at in opened),
                broken=tuple(any(a <= at < b + _EVIDENCE_S for at in opened) for a, b in turn.pauses),
                reply=reply,
                interrupted=any(s.close_s > next_s for s in after),
                heard=tuple(word.text for word in session.heard if turn.start_s <= word.at_s <= until),
                said=" ".join(s.text for s in after if s.text),
                stop_s=(talking[0].last_s or 0.0) - turn.start_s if talking else None,
            )
        )
    return tuple(found)


@dataclass(frozen=True)
class WordResult:
    """One true word and what was written for it ("" if nothing)."""

    true: str
    heard: str


def word_results(session: ObservedSession) -> tuple[list[WordResult], int]:
    """Every true word of a session with what was heard for it, and how many words were heard that nobody said.

    Both word sequences of the whole session are aligned; a heard word can stand for a true one from that one's start
    until 2 s after its end, so that chance hits elsewhere do not count.
    """
    true = [word for turn in session.turns for word in turn.words]
    pairs = align(
        [word.text for word in true],
        [word.text for word in session.heard],
        lambda i, j: true[i].start_s <= session.heard[j].at_s <= true[i].end_s + _LATE_S,
    )
    results = [
        WordResult(true[i].text, session.heard[j].text if j is not None else "") for i, j in pairs if i is not None
    ]
    return results, sum(pair.true is None for pair in pairs)


def unasked(session: ObservedSession) -> int:
    """Openings that answer no turn and lie inside none."""
    answers = {id(outcome.reply) for outcome in outcomes(session) if outcome.reply}
    inside = [s for s in session.stretches if any(t.start_s <= s.open_s < t.end_s for t in session.turns)]
    return len(session.stretches) - len(answers) - len(inside)


def uninterrupted(session: ObservedSession) -> list[int]:
    """Indices of the stretches with text during which the user did not begin a turn."""
    return [
        number
        for number, stretch in enumerate(session.stretches)
        if stretch.text and not any(stretch.open_s < turn.start_s < stretch.close_s for turn in session.turns)
    ]


def listener_errors(sessions: Iterable[ObservedSession]) -> tuple[int, int]:
    """`(word errors, words)` of the independent listener over the stretches that it heard."""
    pairs = [
        judge.errors(session.stretches[n].text, understood)
        for session in sessions
        for n in uninterrupted(session)
        if (understood := session.stretches[n].understood) is not None
    ]
    return sum(wrong for wrong, _ in pairs), sum(words for _, words in pairs)

"""The outcome of each user turn and of each word: the rules by which `jaxtml.evals.metrics` counts. Pure.

Times are seconds on the clock of the recording, see `jaxtml.evals.observation`. The model's gate is open while it
speaks. A stretch is a run of micro-turns (200 ms each) with an open gate.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from jaxtml.data.tasks.scenarios import is_complete, reply_to
from jaxtml.evals.align import align
from jaxtml.evals.judge import count_errors
from jaxtml.evals.record import ObservedSession, ObservedUserTurn, Stretch

TAKE_OVER_S = 1.6  # an opening of the gate takes over the floor if it comes within this time after the user's end
_LATE_S = 2.0  # the model may write a word down until this long after the word's end
# One micro-turn. If the gate opens within this time after the user began to speak, the model decided before it had
# heard the user.
_REACTION_S = 0.2


@dataclass(frozen=True)
class TurnOutcome:
    """The outcome of one user turn.

    Attributes:
      session: the session.
      turn: the user turn.
      cut_in: the gate opened while the user spoke: from 0.2 s after the start of the turn until its end.
      broken: for each pause of the turn, whether the gate opened in the pause, or within 0.2 s after it. An opening so
        soon after the pause counts too: the model decided before it had heard a micro-turn of the next words.
      reply: the first stretch that opened within `TAKE_OVER_S` after the end and before the next user turn.
      interrupted: the next user turn began before the reply was over. The reply may then be cut short, so the metrics
        of answers leave the turn out.
      heard: the transcript from the turn's start up to the opening of the reply.
      said: everything said from the opening of the reply until the next user turn.
      stop_s: if a stretch of the model's speech was audible when the turn began: the time from the start of the turn to
        the last audible sample of this stretch; else None.
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
        """Seconds from the user's end to the opening of the gate."""
        return self.reply.open_s - self.turn.end_s if self.reply else None

    @property
    def voice_s(self) -> float | None:
        """Seconds from the user's end to the first audible sample; None if there is none."""
        return self.reply.first_s - self.turn.end_s if self.reply and self.reply.first_s is not None else None

    @property
    def right_to_heard(self) -> bool:
        """Whether the reply is right for the words that the model heard."""
        return bool(self.heard) and self.said == reply_to(self.heard)

    @property
    def heard_a_sentence(self) -> bool:
        """Whether the words that the model heard are a sentence of the short-answer task."""
        return is_complete(self.heard)

    @property
    def right_to_said(self) -> bool:
        """Whether the reply is right for the words that the user said."""
        return self.reply is not None and self.said == self.turn.expected


def turn_outcomes(session: ObservedSession) -> tuple[TurnOutcome, ...]:
    """Returns the outcome of each user turn of a session."""
    outcomes = []
    openings = [stretch.open_s for stretch in session.stretches]
    for number, turn in enumerate(session.turns):
        last = number + 1 == len(session.turns)
        next_s = math.inf if last else session.turns[number + 1].start_s
        latest_s = min(turn.end_s + TAKE_OVER_S, next_s)
        reply = next((s for s in session.stretches if turn.end_s <= s.open_s <= latest_s), None)
        heard_until_s = reply.open_s if reply else math.inf
        said = [s for s in session.stretches if reply and reply.open_s <= s.open_s < next_s]
        talking = [s for s in session.stretches if s.open_s < turn.start_s < (s.last_s or 0.0)]
        outcomes.append(
            TurnOutcome(
                session,
                turn,
                cut_in=any(turn.start_s + _REACTION_S <= at_s < turn.end_s for at_s in openings),
                broken=tuple(any(a <= at_s < b + _REACTION_S for at_s in openings) for a, b in turn.pauses),
                reply=reply,
                interrupted=any(s.close_s > next_s for s in said),
                heard=tuple(word.text for word in session.heard if turn.start_s <= word.at_s <= heard_until_s),
                said=" ".join(s.text for s in said if s.text),
                stop_s=(talking[0].last_s or 0.0) - turn.start_s if talking else None,
            )
        )
    return tuple(outcomes)


@dataclass(frozen=True)
class WordOutcome:
    """What the model heard for one word that the user said.

    Attributes:
      true: the word that the user said.
      heard: the word that the model wrote down for it; "" for none.
    """

    true: str
    heard: str


def word_outcomes(session: ObservedSession) -> tuple[list[WordOutcome], int]:
    """Returns the outcome of every word that the user said, and how many words were heard that were not said.

    The said words of the whole session are aligned with the heard words. A heard word can stand for a said word from
    that word's start until 2 s after its end, so that chance matches elsewhere do not count.
    """
    true = [word for turn in session.turns for word in turn.words]
    pairs = align(
        [word.text for word in true],
        [word.text for word in session.heard],
        lambda i, j: true[i].start_s <= session.heard[j].at_s <= true[i].end_s + _LATE_S,
    )
    outcomes = [
        WordOutcome(true[i].text, session.heard[j].text if j is not None else "") for i, j in pairs if i is not None
    ]
    return outcomes, sum(pair.reference is None for pair in pairs)


def count_unasked(session: ObservedSession) -> int:
    """Returns how many openings of the gate neither answer a user turn nor lie inside one."""
    replies = {id(outcome.reply) for outcome in turn_outcomes(session) if outcome.reply}
    inside = [s for s in session.stretches if any(t.start_s <= s.open_s < t.end_s for t in session.turns)]
    return len(session.stretches) - len(replies) - len(inside)


def uninterrupted_stretches(session: ObservedSession) -> list[int]:
    """Returns the indices of the stretches with text during which no user turn began."""
    return [
        number
        for number, stretch in enumerate(session.stretches)
        if stretch.text and not any(stretch.open_s < turn.start_s < stretch.close_s for turn in session.turns)
    ]


def own_voice_errors(sessions: Iterable[ObservedSession]) -> tuple[int, int]:
    """Returns `(word errors, words)` of the judge's transcripts, over the stretches that it transcribed."""
    counts = [
        count_errors(session.stretches[number].text, understood)
        for session in sessions
        for number in uninterrupted_stretches(session)
        if (understood := session.stretches[number].understood) is not None
    ]
    return sum(errors for errors, _ in counts), sum(words for _, words in counts)

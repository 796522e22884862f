"""How often each scenario is drawn. Used by `jaxtml.data.talks`, and part of a dataset's digest."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ScenarioWeights:
    """How often each scenario is drawn.

    The first six are relative to each other. The other numbers are chances.
    Names and values are part of every row cache's digest: a new field makes existing caches unusable.

    Attributes:
      exchange, hesitation, barge_in, distraction: the next scenario of a session in which the user speaks.
      aside: a person says something that is not for the assistant. It is transcribed and not answered.
      side_talk: the same further away, at any time. It is neither transcribed nor answered, and a reply goes on.
      silence: chance that nobody speaks in the whole session.
      typed: chance that the user types in the whole session instead of speaking. In such a session
        replies follow each other closely, so the model learns to speak mostly from these sessions.
      joined: chance that a user turn is joined from single words of the user's voice.
      nonsense: chance that a joined user turn is no sentence. When a model mishears a user turn, its own transcript is
        often no sentence. The model has to answer nevertheless.
      overheard: chance that people talk to each other in a session in which nobody speaks to the assistant.
      reshaped: chance that the session's user has another vocal tract, pitch and tempo than the recorded voice.
      hard_channel: chance of a channel with hard conditions, see `channel.draw_channel`.
      engines: share of the sessions whose user has a voice of each engine. Neural voices sound most like people. eSpeak
        has the most voices, but a speech recogniser mishears half of its words.
    """

    exchange: float = 0.5
    hesitation: float = 0.22
    barge_in: float = 0.2
    distraction: float = 0.08
    aside: float = 0.14
    side_talk: float = 0.08
    silence: float = 0.04
    typed: float = 0.4
    joined: float = 0.4
    nonsense: float = 0.15
    overheard: float = 0.5
    reshaped: float = 0.85
    hard_channel: float = 0.5
    engines: tuple[tuple[str, float], ...] = (
        ("kokoro", 0.45),
        ("flite", 0.18),
        ("piper", 0.09),
        ("espeak", 0.28),
        ("human", 0.1),
    )

"""How often each scenario is drawn. Called by `jaxtml.data.talks.mix`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ScenarioWeights:
    """How often each scenario is drawn.

    `exchange`, `hesitation`, `barge_in` and `distraction` are relative to each other. The other numbers are chances.
    Names and values are part of every row cache's digest: a new field makes existing caches unusable.

    Attributes:
      exchange, hesitation, barge_in, distraction: the next scenario of a session of spoken turns.
      silence: chance that nobody speaks in the whole session.
      typed: chance that the user types in the whole session instead of speaking. Replies follow each other closely
        there: it is where the model's own voice gets most of its practice.
      joined: chance that a user turn is joined from single words of the user's voice.
      nonsense: chance that such a turn is no sentence. What a model mishears is no sentence either, and the model has
        to answer it.
      engines: share of the sessions whose user has a voice of each engine. Neural voices sound most like people. A
        judge of speech mishears half of eSpeak's words, but no engine has more voices.
    """

    exchange: float = 0.5
    hesitation: float = 0.22
    barge_in: float = 0.2
    distraction: float = 0.08
    silence: float = 0.04
    typed: float = 0.4
    joined: float = 0.4
    nonsense: float = 0.15
    engines: tuple[tuple[str, float], ...] = (("kokoro", 0.45), ("flite", 0.18), ("piper", 0.09), ("espeak", 0.28))

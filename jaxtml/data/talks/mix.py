"""Draws a session: scenarios one after the other, then the channel through which the microphone hears the user.

A scenario is a rule for when each side is heard, for example an interruption. One session has one user (one voice, one
room) and several scenarios. Called by `jaxtml.data.conversations` (training) and `jaxtml.evals.material` (evaluation).

A new text alone needs no scenario. Add it to `jaxtml.data.tasks.scenarios` (a greeting is one line in `GREETINGS`), and
run `jaxtml data` again: it speaks what the bank lacks. The digest of the dataset follows the texts by itself.

How to add a scenario:

1. What the user says and the one right reply: if the existing texts do not fit, extend `sample_user_text`, `reply_to`
   and `assistant_texts` in `jaxtml.data.tasks.scenarios`.
2. When each side is heard: a function `(rng, draft, user) -> bool` in `jaxtml.data.talks.timing`. Copy the form of
   `exchange` there. `user_turns.draw_user_turn` gives the user's sound. The function adds the scenario's name to
   `draft.scenarios` once for each user turn that it writes, or once if it writes none (a cough).
3. How often it is drawn: a field of the same name at the end of `jaxtml.data.talks.weights.ScenarioWeights`. Its
   docstring lists the weights that are relative to each other.
4. Its entry in `SCENARIOS` below; in `WITHOUT_USER_TURN` too if the user says nothing that wants a reply. The
   evaluation reads both. The sessions with a recorded human voice have a list of their own, `KINDS` in
   `recorded_prompts.py`.
5. A new weight changes the digest of the dataset, so old caches are refused. If you change the code of a scenario that
   exists, raise `_FORMAT` in `jaxtml.data.conversations` instead. The pinned digest in `tests/data/test_dataset.py`
   changes with either.
6. Its timing rules as a test in `tests/data/talks/test_mix.py`. New sentences go into `USER_TEXTS` of
   `tests/data/tones.py`, which speaks for the tests.
7. Look at some: `jaxtml data tiny --out FOLDER --show 5`. A folder with a bank keeps it: only new texts are spoken.

A session is a pure function of the random generator, the bank and the weights. If you change the order of the random
draws, the same seed gives another session. Row caches on disk then hold other rows than the dataset makes, so raise
`_FORMAT` (step 5).

Axis glossary: N samples of the session.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from jaxtml.data.talks import timing
from jaxtml.data.talks.background_sounds import babble
from jaxtml.data.talks.channel import Channel, apply_channel, draw_channel
from jaxtml.data.talks.session_draft import SessionDraft
from jaxtml.data.talks.speakers import Speakers
from jaxtml.data.talks.user_turns import SessionUser
from jaxtml.data.talks.vocal_tract import VocalTract, draw_vocal_tract
from jaxtml.data.talks.weights import ScenarioWeights
from jaxtml.stream.conversation import Conversation
from jaxtml.stream.timebase import MICRO_TURN_SAMPLES, SAMPLE_RATE

Scenario = Callable[[np.random.Generator, SessionDraft, SessionUser], bool]

SCENARIOS: dict[str, Scenario] = {
    "exchange": timing.exchange,
    "hesitation": timing.hesitation,
    "barge_in": timing.barge_in,
    "distraction": timing.distraction,
    "aside": timing.aside,
    "side_talk": timing.side_talk,
}
"""The scenarios of a session in which the user speaks, by the name of their weight."""

WITHOUT_USER_TURN = frozenset({"distraction", "aside", "side_talk"})
"""The scenarios in which the user says nothing that wants a reply."""

_MAX_MISSES = 4  # scenarios that find no room since the last user turn; then the session counts as full


def make_conversation(
    rng: np.random.Generator,
    speakers: Speakers,
    weights: ScenarioWeights = ScenarioWeights(),
    micro_turns: int = 100,
    channel: Channel | None = None,
) -> Conversation:
    """Draws a session with one user.

    Args:
      rng: everything random comes from this generator.
      speakers: the voices.
      weights: how often each scenario is drawn.
      micro_turns: length of the session; 100 (20 s) hold about five exchanges.
      channel: the user's room, microphone and line. None draws one; `channel.CLEAN` leaves the voice as it is.

    Returns:
      A conversation of `3200 * micro_turns` samples. `scenario` has the names of its scenarios in order. `expected` has
      its replies in order, with " | " between them; an interrupted reply is there in full.
    """
    draft = SessionDraft.silent(micro_turns)
    draft.free = int(rng.exponential(0.5) * SAMPLE_RATE) + int(rng.integers(MICRO_TURN_SAMPLES))
    if rng.random() < weights.silence:
        timing.fill_with_silence(rng, draft, speakers, weights.overheard)
    elif rng.random() < weights.typed:
        timing.fill_with_typing(rng, draft, speakers)
    else:
        _fill_with_scenarios(rng, draft, _draw_user(rng, speakers, weights))
    if channel is None:
        channel = draw_channel(rng, weights.hard_channel)
    others = babble(rng, speakers, len(draft.user)) if channel.babble_db is not None else None
    is_new_session = rng.random() < 0.3
    return Conversation(
        user=apply_channel(rng, channel, draft.user, draft.assistant, others),
        assistant=draft.assistant,
        user_words=tuple(draft.words),
        speech=tuple(draft.speech),
        typed=tuple(draft.typed),
        clock_s=0.0 if is_new_session else float(np.exp(rng.uniform(np.log(1.0), np.log(4 * 3600.0)))),
        wall_clock_s=float(rng.uniform(1.70e9, 2.05e9)),
        scenario=" ".join(draft.scenarios),
        expected=" | ".join(draft.replies),
        user_end_s=tuple(draft.user_turn_ends_s),
    )


def _draw_user(rng: np.random.Generator, speakers: Speakers, weights: ScenarioWeights) -> SessionUser:
    voice = speakers.draw_voice(rng, weights.engines)
    if rng.random() < weights.reshaped:
        return SessionUser(speakers, weights, voice, draw_vocal_tract(rng))
    rate = float(np.exp(rng.uniform(np.log(0.85), np.log(1.18))))
    return SessionUser(speakers, weights, voice, VocalTract(formants=rate, pitch=rate, tempo=rate))


def _fill_with_scenarios(rng: np.random.Generator, draft: SessionDraft, user: SessionUser) -> None:
    """Writes scenarios one after the other until several have found no room since the last user turn."""
    names = list(SCENARIOS)
    odds = np.array([getattr(user.weights, name) for name in names])
    misses = 0
    while misses < _MAX_MISSES:
        name = names[int(rng.choice(len(names), p=odds / odds.sum()))]
        if not SCENARIOS[name](rng, draft, user):
            misses += 1
        elif name not in WITHOUT_USER_TURN:  # a cough may fit where no user turn fits any more
            misses = 0

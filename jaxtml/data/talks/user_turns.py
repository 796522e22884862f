"""The sound of one user turn: a recorded sentence, or single words joined into one, with or without a hesitation.

Called by the scenarios in `jaxtml.data.talks.timing`, which decide when the user turn is heard.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from jaxtml.data.talks import edits
from jaxtml.data.talks.edits import Clip
from jaxtml.data.talks.speakers import Speakers
from jaxtml.data.talks.vocal_tract import VocalTract, reshape
from jaxtml.data.talks.weights import ScenarioWeights
from jaxtml.data.tasks.scenarios import (
    draw_bare_list,
    draw_nonsense,
    incomplete_after,
    is_complete,
    reply_to,
    sample_user_text,
)
from jaxtml.stream.timebase import SAMPLE_RATE

_JOIN_ATTEMPTS = 4
_RECORDED_NONSENSE = 0.5


@dataclass(frozen=True)
class SessionUser:
    """The one user of a session.

    Attributes:
      speakers: the bank's utterances.
      weights: how often user turns are joined from single words.
      voice: the user's voice, a key of `speakers.by_voice`.
      tract: how the user differs from the recorded voice.
    """

    speakers: Speakers
    weights: ScenarioWeights
    voice: str
    tract: VocalTract


def draw_user_turn(rng: np.random.Generator, user: SessionUser) -> Clip | None:
    """Draws one user turn with its speech at unit level. Returns None if the bank has no reply to the turn."""
    speakers, weights = user.speakers, user.weights
    clip = None
    is_recorded = user.voice not in speakers.by_voice
    if is_recorded or rng.random() < weights.joined:
        # A recorded person has said few of the task's sentences. Nonsense has more of the words.
        nonsense = _RECORDED_NONSENSE if is_recorded else weights.nonsense
        clip = _join_single_words(rng, speakers, user.voice, is_nonsense=rng.random() < nonsense)
    if clip is None and is_recorded:
        return None
    if clip is None:
        indices = speakers.by_voice[user.voice]
        clip = speakers.clip(int(indices[int(rng.integers(len(indices)))]))
    if reply_to(clip.text.split()) not in speakers.replies:
        return None
    clip = reshape(clip, _vary(rng, user.tract))
    return edits.set_level(clip, 10 ** (rng.uniform(-2, 2) / 20))


def _vary(rng: np.random.Generator, tract: VocalTract) -> VocalTract:
    """Returns the speaker in another mood: no two sentences have the same tempo and pitch."""
    rate = float(rng.uniform(0.97, 1.03))
    return replace(tract, formants=tract.formants * rate, pitch=tract.pitch * rate, tempo=tract.tempo * rate)


def _join_single_words(rng: np.random.Generator, speakers: Speakers, voice: str, is_nonsense: bool) -> Clip | None:
    """Joins a user turn from recordings in which a voice says single words.

    Draws texts until the bank has a recording of every word of a text. Returns None if the first few texts all fail.
    """
    places = speakers.single_words.get(voice, {})
    for _ in range(_JOIN_ATTEMPTS):
        words = _text_of_single_words(rng, speakers, voice, is_nonsense).split()
        if all(word in places for word in words):
            break
    else:
        return None
    clips = []
    for word in words:
        index, number = places[word][int(rng.integers(len(places[word])))]
        clips.append(edits.set_level(edits.cut_word(speakers.clip(index), number), 1.0))
    # Where the user turn could already be over, a gap as long as a micro-turn would look like its end.
    gaps_s = [
        rng.uniform(0.03, 0.15) if is_nonsense or is_complete(words[:k]) else rng.uniform(0.05, 0.35)
        for k in range(1, len(words))
    ]
    return edits.join(clips, [int(gap_s * SAMPLE_RATE) for gap_s in gaps_s])


def _text_of_single_words(rng: np.random.Generator, speakers: Speakers, voice: str, is_nonsense: bool) -> str:
    if voice in speakers.texts:
        texts = speakers.texts[voice]
        if is_nonsense or not texts:
            return draw_nonsense(rng, sorted(speakers.single_words[voice]))
        return texts[int(rng.integers(len(texts)))]
    if is_nonsense:
        return draw_nonsense(rng)
    return draw_bare_list(rng) if rng.random() < 0.6 else sample_user_text(rng)[1]


def hesitate(rng: np.random.Generator, clip: Clip) -> Clip | None:
    """Inserts one pause, seldom two, where the sentence is not complete yet.

    Returns None if the words are no sentence, or if there is no such place in the sentence.
    """
    words = clip.text.split()
    places = [k for k in range(1, len(words)) if incomplete_after(words, k)] if is_complete(words) else []
    for k in rng.permutation(places)[: 1 + (rng.random() < 0.2)].astype(int).tolist():
        clip = edits.insert_pause(clip, k, int(rng.uniform(0.4, 1.6) * SAMPLE_RATE))
    return clip if places else None

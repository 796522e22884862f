"""Recorded prompts become sentences of the short-answer task. Words and user turns lie where their sound is."""

import numpy as np
import pytest
import soundfile

from jaxtml.data.talks import recorded_prompts
from jaxtml.data.talks.recorded_prompts import KINDS, Prompts, make_prompted_conversation
from jaxtml.data.tasks.scenarios import VOCABULARY, incomplete_after, is_complete, reply_to
from jaxtml.errors import InputError
from jaxtml.stream.timebase import MICRO_TURN_SAMPLES, SAMPLE_RATE

SOUND_S, AROUND_S = 0.4, 0.15


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with every prompt as 0.4 s of a tone at 8 kHz, with 0.15 s of silence on both sides."""
    folder = tmp_path_factory.mktemp("prompts")
    t = np.arange(int(SOUND_S * 8000)) / 8000
    for number, file in enumerate([*recorded_prompts._files().values(), *recorded_prompts.SOUNDS]):
        tone = np.pad(0.3 * np.sin(2 * np.pi * (300 + 20 * number) * t), int(AROUND_S * 8000))
        path = folder / f"{file}.wav"
        path.parent.mkdir(exist_ok=True)
        soundfile.write(path, tone, 8000)
    return folder


@pytest.fixture(scope="module")
def prompts(folder):
    return Prompts.read(folder)


def talks_of(prompts, scenario, count=12):
    of_scenario = [kind for kind in KINDS if kind[0] == scenario]
    kinds = [of_scenario[i % len(of_scenario)] for i in range(count)]
    return [make_prompted_conversation(np.random.default_rng(i), prompts, kind) for i, kind in enumerate(kinds)]


def sounding(wave: np.ndarray) -> np.ndarray:
    """Returns the time in seconds of each sample that is well above the noise."""
    return np.flatnonzero(np.abs(wave) > 0.3 * np.abs(wave).max()) / SAMPLE_RATE


def test_prompts_are_cut_to_their_sound(prompts):
    assert prompts.source == "8 kHz WAV"
    for text, clip in prompts.clips.items():
        seconds = len(clip.wave) / SAMPLE_RATE
        assert seconds == pytest.approx(SOUND_S, abs=0.031), text  # blocks of 10 ms, 5 ms of margin
        assert " ".join(word.text for word in clip.words) == text
        assert clip.words[-1].end_s == pytest.approx(len(clip.wave) / SAMPLE_RATE)


def test_every_prompt_is_of_the_tasks_vocabulary():
    assert {word for text in recorded_prompts._files() for word in text.split()} <= set(VOCABULARY)


def test_a_sentence_is_covered_by_prompts_or_refused(prompts):
    assert prompts.cover("is twenty one less than four") == ("is", "twenty", "one", "less than", "four")
    assert prompts.cover("what is three plus four") is None


@pytest.mark.parametrize("scenario", ["exchange", "hesitation", "barge_in"])
def test_a_user_turn_ends_where_its_sound_ends_and_a_reply_has_room(prompts, scenario):
    for talk in talks_of(prompts, scenario):
        assert len(talk.user) % MICRO_TURN_SAMPLES == 0 and not talk.assistant.any()
        heard = sounding(talk.user)
        assert talk.user_end_s[-1] - 0.03 < heard[-1] <= talk.user_end_s[-1]
        assert heard[0] >= talk.user_words[0].start_s
        assert len(talk.user) / SAMPLE_RATE - talk.user_end_s[-1] >= 4.4
        assert talk.user_words[0].start_s >= 0.4
        for word in talk.user_words:
            assert ((heard > word.start_s) & (heard < word.end_s)).any(), word


def test_the_expected_reply_fits_what_was_said_and_is_empty_for_a_number_alone(prompts):
    numbers_alone = 0
    for talk in talks_of(prompts, "exchange", 60):
        words = [word.text for word in talk.user_words]
        assert talk.expected == (reply_to(words) if is_complete(words) else "")
        numbers_alone += not talk.expected
    assert 5 < numbers_alone < 15


def test_gaps_are_short_where_the_sentence_could_be_over(prompts):
    short, wide = [], []
    for talk in talks_of(prompts, "exchange", 60):
        words = [word.text for word in talk.user_words]
        for k in range(1, len(words)):
            gap = talk.user_words[k].start_s - talk.user_words[k - 1].end_s
            (wide if incomplete_after(words, k) else short).append(gap)
    assert max(short) <= 0.16 and max(wide) <= 0.26
    assert len(wide) > 30 and max(wide) > 0.2


def test_a_hesitation_has_one_long_pause_where_the_sentence_is_open(prompts):
    for talk in talks_of(prompts, "hesitation"):
        words = [word.text for word in talk.user_words]
        gaps = [b.start_s - a.end_s for a, b in zip(talk.user_words, talk.user_words[1:], strict=False)]
        long = [k + 1 for k, gap in enumerate(gaps) if gap > 0.5]
        assert len(long) == 1 and incomplete_after(words, long[0])
        assert 0.6 <= max(gaps) <= 1.61


def test_a_barge_in_is_a_second_user_turn_while_the_first_one_is_answered(prompts):
    for talk in talks_of(prompts, "barge_in"):
        first_end, second_end = talk.user_end_s
        second = next(word for word in talk.user_words if word.start_s > first_end)
        assert 0.69 < second.start_s - first_end < 1.01 and second_end > second.start_s
        assert talk.scenario == "exchange barge_in" and len(talk.expected.split(" | ")) == 2
        assert len([word for word in talk.user_words if word.end_s <= first_end + 0.01]) >= 3


def test_nobody_speaks_in_a_silent_session_but_it_is_not_digital_silence(prompts):
    for talk in talks_of(prompts, "silence", 6):
        assert talk.user_words == () and talk.user_end_s == () and talk.scenario == "silence" and talk.expected == ""
        assert np.std(talk.user) > 1e-5


def test_a_session_is_a_function_of_its_seed(prompts):
    for kind in KINDS:
        first, second = (make_prompted_conversation(np.random.default_rng(5), prompts, kind) for _ in range(2))
        np.testing.assert_array_equal(first.user, second.user)
        assert first.user_words == second.user_words


def test_missing_packages_are_named_with_the_command_that_installs_them(tmp_path):
    with pytest.raises(InputError, match="apt-get install asterisk-core-sounds-en"):
        Prompts.read(tmp_path)


def test_the_installed_prompts_can_say_every_kind_of_session():
    if not (recorded_prompts.FOLDER / "digits" / "1.wav").is_file():
        pytest.skip(recorded_prompts.INSTALL)
    prompts = Prompts.read()
    assert set(recorded_prompts._files()) == prompts.clips.keys() and len(prompts.sounds) == len(
        recorded_prompts.SOUNDS
    )
    for text, clip in prompts.clips.items():
        assert 0.15 < len(clip.wave) / SAMPLE_RATE < 1.3, text
        assert np.abs(clip.wave[-160:]).max() < 0.5 * np.abs(clip.wave).max()
    for number, kind in enumerate(KINDS):
        assert len(make_prompted_conversation(np.random.default_rng(number), prompts, kind).user) > 3 * SAMPLE_RATE

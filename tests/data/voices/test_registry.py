"""Voices: every engine times its words and leaves no silence around them.

The same call gives the same samples. No test voice is heard in training.
"""

import numpy as np
import pytest

from jaxtml.data import packages
from jaxtml.data.voices import espeak, flite, kokoro, phoneme_line, piper, registry
from jaxtml.data.voices.utterance import FRAME, Rendering, Utterance, finish, tokens_of, words_of
from jaxtml.errors import InputError
from jaxtml.stream.timebase import SAMPLE_RATE

ENGINES = ("espeak:en-us+f3", "flite:slt", "kokoro:af_heart", "kokoro:af_bella+am_adam", "piper:joe")


def speak(voice: str, text: str, **how: float) -> Utterance:
    """Calls `synthesise`, and skips the test if the engine is not installed."""
    try:
        return registry.synthesise(voice, text, **how)
    except InputError as error:
        pytest.skip(str(error))


def tone(seconds: float, rate_hz: int, level: float = 0.5) -> np.ndarray:
    return (level * np.sin(2 * np.pi * 440 * np.arange(int(seconds * rate_hz)) / rate_hz)).astype(np.float32)


def two_beeps(rate_hz: int = 24_000) -> Rendering:
    """Returns 0.3 s of silence, 0.2 s of tone, 0.4 s of silence, 0.3 s of tone, and 0.5 s of noise 60 dB lower."""
    noise = np.random.default_rng(0).normal(0, 3e-4, int(0.5 * rate_hz))
    pieces = [np.zeros(int(0.3 * rate_hz)), tone(0.2, rate_hz), np.zeros(int(0.4 * rate_hz)), tone(0.3, rate_hz), noise]
    return Rendering(np.concatenate(pieces).astype(np.float32), rate_hz, (0.0, 0.8))


def test_an_utterance_is_cut_to_its_sound_and_a_pause_belongs_to_no_word():
    said = finish(two_beeps(), "test:beeps", "one, two")
    near = pytest.approx
    assert [word.text for word in said.words] == ["one", "two"]
    assert (said.words[0].start_s, said.words[0].end_s) == (0.0, near(0.2, abs=0.011))
    assert (said.words[1].start_s, said.words[1].end_s) == (near(0.6, abs=0.011), near(0.9, abs=0.011))
    assert said.words[-1].end_s * SAMPLE_RATE == near(len(said.wave))
    assert said.wave.dtype == np.float32 and len(said.wave) % FRAME == 0


def test_every_engine_is_brought_to_one_loudness():
    loud = finish(two_beeps(), "test:beeps", "one two")
    quiet = two_beeps()
    quiet = finish(Rendering(quiet.wave * 0.01, quiet.rate_hz, quiet.starts_s), "test:beeps", "one two")
    np.testing.assert_allclose(loud.wave, quiet.wave, atol=1e-4)


def test_words_that_an_engine_starts_at_the_same_time_still_follow_each_other():
    beeps = two_beeps()
    said = finish(Rendering(beeps.wave, beeps.rate_hz, (0.0, 0.9, 0.9, 0.9)), "test:beeps", "a b c d")
    edges = [edge for word in said.words for edge in (word.start_s, word.end_s)]
    assert edges == sorted(edges)
    assert all(word.end_s > word.start_s for word in said.words)


def test_silence_is_not_an_utterance():
    with pytest.raises(ValueError, match="no sound"):
        finish(Rendering(np.zeros(8000, np.float32), 16_000, (0.0,)), "test:none", "hello")


def test_text_becomes_lower_case_words_without_punctuation():
    assert words_of("Twenty-three, isn't it?") == ["twenty", "three", "isn't", "it"]
    assert tokens_of("yes. no") == ["yes", ".", "no"]


@pytest.mark.parametrize("text", ["say 23", "a + b", "?!", "naïve"])
def test_text_that_cannot_be_labelled_is_refused(text):
    with pytest.raises(InputError):
        words_of(text)


def test_no_test_voice_is_heard_in_training_not_even_in_a_mixture():
    def people(names):
        return {(name.split(":")[0], part) for name in names for part in _variants(name)}

    def _variants(name):
        engine, _, rest = name.partition(":")
        return [rest.split("+")[1]] if engine == "espeak" else rest.split("+")

    assert not people(registry.TRAIN_VOICES) & people(registry.TEST_VOICES)
    own = people([registry.OWN_VOICE])
    assert not own & (people(registry.TRAIN_VOICES) | people(registry.TEST_VOICES))
    per_engine = [name.split(":")[0] for name in registry.TEST_VOICES]
    assert per_engine.count("kokoro") >= 4 and per_engine.count("flite") >= 1 and per_engine.count("espeak") >= 12


@pytest.mark.parametrize("voice", ENGINES)
def test_words_come_in_order_and_the_last_ends_with_the_sound(voice):
    said = speak(voice, "What is two, plus three?")
    assert [word.text for word in said.words] == ["what", "is", "two", "plus", "three"]
    edges = [edge for word in said.words for edge in (word.start_s, word.end_s)]
    assert edges == sorted(edges) and edges[0] == 0.0
    assert said.words[-1].end_s * SAMPLE_RATE == pytest.approx(len(said.wave))
    assert 0.6 < said.words[-1].end_s < 3.0
    tail = said.wave[-FRAME * 6 :]
    assert np.sqrt(np.mean(tail**2)) > 0.01 * np.sqrt(np.mean(said.wave**2))


def _hiss_onsets(wave: np.ndarray) -> np.ndarray:
    """Returns the times in seconds at which at least 25 ms of hiss begin.

    In hiss, most of the power is above 3.5 kHz. Only an s makes hiss.
    """
    frames = np.lib.stride_tricks.sliding_window_view(np.pad(wave, (120, 200)), 320)[::FRAME] * np.hanning(320)
    power = np.abs(np.fft.rfft(frames)) ** 2
    total = power.sum(1)
    hiss = (power[:, 70:].sum(1) > 0.5 * total) & (total > 1e-3 * np.quantile(total, 0.95))
    onsets = np.array([i for i in range(1, len(hiss) - 5) if hiss[i : i + 5].all() and not hiss[i - 1]])
    return onsets * FRAME / SAMPLE_RATE


@pytest.mark.parametrize("voice", ENGINES)
def test_a_word_that_starts_with_s_starts_where_its_hiss_starts(voice):
    errors = []
    for text in ("three six two seven one six", "my number is four seven"):
        said = speak(voice, text)
        onsets = _hiss_onsets(said.wave)
        starts = [word.start_s for word in said.words if word.text[0] == "s"]
        errors += [np.abs(onsets - start).min() for start in starts]
    assert np.median(errors) <= 0.03


@pytest.mark.parametrize("voice", ["flite:awb", "kokoro:af_heart", "piper:joe"])
def test_the_same_call_gives_the_same_samples(voice):
    first = speak(voice, "good morning", rate=1.1, pitch=1.05)
    speak(voice, "something else")
    np.testing.assert_array_equal(first.wave, speak(voice, "good morning", rate=1.1, pitch=1.05).wave)


@pytest.mark.parametrize("voice", ["espeak:en-us+m3", "flite:rms", "piper:joe"])
def test_pitch_moves_the_voice_and_keeps_its_speed(voice):
    low, high = (speak(voice, "nine nine nine", pitch=pitch) for pitch in (0.9, 1.15))

    def fundamental(wave):
        power = np.abs(np.fft.rfft(wave[: len(wave) // 2], 1 << 17)) ** 2
        correlation = np.fft.irfft(power)[SAMPLE_RATE // 230 : SAMPLE_RATE // 70]  # 70 to 230 Hz excludes octaves
        return SAMPLE_RATE / (SAMPLE_RATE // 230 + np.argmax(correlation))

    assert fundamental(high.wave) > 1.1 * fundamental(low.wave)
    assert len(high.wave) == pytest.approx(len(low.wave), rel=0.12)


def test_rate_shortens_speech():
    slow, fast = (speak("espeak:en-us+m3", "good afternoon", rate=rate) for rate in (0.8, 1.25))
    assert len(fast.wave) < 0.8 * len(slow.wave)


def test_words_that_espeak_runs_together_are_timed_apart():
    speak("espeak:en-us+f3", "one")
    assert espeak.phonemes(["of", "the", "house"], "en-us")[:2] == ["ʌv", "ðə"]
    said = speak("espeak:en-us+f3", "one of the red ones")
    assert [word.text for word in said.words] == ["one", "of", "the", "red", "ones"]
    assert all(word.end_s - word.start_s > 0.02 for word in said.words)


def test_kokoro_reads_its_own_letters():
    speak("kokoro:af_heart", "one")
    assert kokoro.spell("t͡ʃˈɑː͡ɹli", british=False) == "ʧˈɑɹli"
    assert kokoro.spell("ɡˈo͡ʊ", british=True) == "ɡˈQ"
    line, begins = phoneme_line.phoneme_line("yes, i am", "en-us", lambda ipa: kokoro.spell(ipa, british=False))
    assert line.endswith(".") and [line[begin - 1] for begin in begins[1:]] == [" ", " "]


def test_every_listed_voice_exists():
    speak("espeak:en-us+f3", "one")
    for name in (*registry.ESPEAK_TRAIN, *registry.ESPEAK_TEST):
        espeak.render("one", name.partition(":")[2], 1.0, 1.0)
    assert {name.partition(":")[2] for name in (*registry.FLITE_TRAIN, *registry.FLITE_TEST)} == set(flite.NAMES)
    try:
        styles = kokoro._styles()
    except InputError as error:
        pytest.skip(str(error))
    used = (registry.OWN_VOICE, *registry.KOKORO_TRAIN, *registry.KOKORO_TEST, *registry.KOKORO_MIXED)
    assert all(part in styles for name in used for part in name.partition(":")[2].split("+"))


def test_an_unknown_voice_or_engine_is_refused():
    with pytest.raises(InputError, match="no speech engine 'siri'"):
        registry.synthesise("siri:anna", "hello")
    with pytest.raises(ValueError, match="no voice"):
        piper.render("hello", "anna", 1.0)


def test_a_missing_or_altered_package_is_refused_with_the_command_that_installs_it(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="tools/install_voices"):
        packages.package_file("no_such_speech_package", "model.onnx")
    with pytest.raises(InputError, match="tools/install_voices"):
        packages.package_file("numpy", "no_such_file.onnx")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(InputError, match="tools/install_voices"):
        packages.cached_file("voices.tgz")
    (tmp_path / "model").write_bytes(b"not the model")
    with pytest.raises(InputError, match="pinned"):
        packages.read_pinned([tmp_path / "model"], "0" * 64)

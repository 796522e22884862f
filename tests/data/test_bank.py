"""The utterance bank: what is planned, that a build may be killed, and that a half-built or damaged bank is seen."""

import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from jaxtml.data import bank
from jaxtml.data.voices import registry
from jaxtml.data.voices.utterance import Utterance, words_of
from jaxtml.errors import InputError
from jaxtml.stream.conversation import Word

CASTS = (
    bank.Cast("train", ("espeak:a", "espeak:b", "espeak:c"), 300, pitch=(0.8, 1.2)),
    bank.Cast("test", ("flite:d",), 30),
    bank.Cast("train", ("kokoro:e", "kokoro:f"), 70),
)


def beep(item: bank.PlannedUtterance) -> Utterance:
    """A stand-in for an engine: every word is 0.1 s of its own tone. Pure, and quick."""
    words = words_of(item.text)
    pitches = [200 + sum(map(ord, item.voice + word)) % 400 for word in words]
    wave = np.concatenate([np.sin(np.arange(1600) * 2 * np.pi * pitch / 16_000) * 0.5 for pitch in pitches])
    times = tuple(Word(word, 0.1 * i, 0.1 * (i + 1)) for i, word in enumerate(words))
    return Utterance(wave.astype(np.float32), times, item.voice, item.text)


def slow_beep(item: bank.PlannedUtterance) -> Utterance:
    time.sleep(0.01)
    return beep(item)


def fails(item: bank.PlannedUtterance) -> Utterance:
    raise InputError("the speech package flite is not installed: run tools/install_voices")


def dies(item: bank.PlannedUtterance) -> Utterance:
    os.kill(os.getpid(), signal.SIGKILL)
    return beep(item)


def say_something(rng: np.random.Generator) -> str:
    return f"say {['one', 'two', 'three'][int(rng.integers(3))]} {['red', 'green'][int(rng.integers(2))]}"


def planned() -> tuple[tuple[bank.PlannedUtterance, ...], ...]:
    return bank.plan(CASTS, ["hello", "yes it is"], say_something, seed=7)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("bank")
    bank.build(path, planned(), 2, beep)
    return path


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}


def test_a_plan_is_a_function_of_its_seed():
    assert planned() == planned()
    assert planned() != bank.plan(CASTS, ["hello", "yes it is"], say_something, seed=8)


def test_the_model_speaks_first_and_the_slow_voices_last():
    shards = planned()
    assert [item.text for item in shards[0]] == ["hello", "yes it is"]
    assert {item.voice for item in shards[0]} == {registry.OWN_VOICE}
    slow = [{item.voice.startswith("kokoro:") for item in shard} for shard in shards[1:]]
    assert slow == [{False}, {False}, {True}, {True}]


def test_any_number_of_finished_shards_is_balanced_over_voices_and_splits():
    first = planned()[1]
    counts = [sum(item.voice == voice for item in first) for voice in CASTS[0].voices]
    assert max(counts) - min(counts) <= 1
    assert sum(item.split == "test" for item in first) == pytest.approx(len(first) / 11, abs=1)


def test_rates_and_pitches_stay_in_their_bounds():
    items = [item for shard in planned() for item in shard if item.voice.startswith("espeak")]
    assert all(0.85 <= item.rate <= 1.2 and 0.8 <= item.pitch <= 1.2 for item in items)
    assert len({item.rate for item in items}) > 100


def test_every_utterance_is_read_back_as_it_was_spoken(folder):
    opened = bank.Bank.open(folder)
    items = [item for shard in planned() for item in shard]
    assert len(opened) == len(items) and opened.complete
    for index in (0, 1, 2, 200, len(items) - 1):
        said, read = beep(items[index]), opened.utterance(index)
        assert (read.text, read.voice) == (said.text, said.voice)
        assert read.wave.dtype == np.float32
        np.testing.assert_allclose(read.wave, said.wave, atol=1 / 32767)
        assert [word.text for word in read.words] == [word.text for word in said.words]
        np.testing.assert_allclose([w.end_s for w in read.words], [w.end_s for w in said.words], atol=1e-3)


def test_utterances_are_chosen_by_split_and_role(folder):
    opened = bank.Bank.open(folder)
    assert opened.select(role="assistant").tolist() == [0, 1]
    assert len(opened.select(split="train", role="user")) == 370
    test = opened.select(split="test", role="user")
    assert {opened.entries[index].item.voice for index in test} == {"flite:d"}
    assert opened.replies == {"hello": 0, "yes it is": 1}


def test_a_bank_travels_to_a_loader_process(folder):
    opened = bank.Bank.open(folder)
    opened.utterance(0)
    there = pickle.loads(pickle.dumps(opened))
    assert not there._maps
    np.testing.assert_array_equal(there.utterance(5).wave, opened.utterance(5).wave)


def test_a_killed_build_goes_on_where_it_was_and_ends_the_same(folder, tmp_path):
    code = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[2]); import test_bank\n"
        "from jaxtml.data import bank\n"
        "if __name__ == '__main__': bank.build(Path(sys.argv[1]), test_bank.planned(), 1, test_bank.slow_beep)"
    )
    script = tmp_path / "build.py"
    script.write_text(code)
    where = tmp_path / "bank"
    command = [sys.executable, str(script), str(where), str(Path(__file__).parent)]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])})
    deadline = time.monotonic() + 60
    while not (where / "00001.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    half = bank.Bank.open(where)
    assert 0 < len(half) < 402 and not half.complete
    finished = (where / "00001.pcm").stat().st_mtime_ns
    bank.build(where, planned(), 2, beep)
    assert (where / "00001.pcm").stat().st_mtime_ns == finished
    assert {k: v for k, v in contents(where).items() if k.count(".") == 1} == contents(folder)
    assert bank.Bank.open(where).digest == bank.Bank.open(folder).digest != half.digest


def test_what_stops_a_worker_stops_the_build_in_its_own_words(tmp_path):
    with pytest.raises(InputError, match="tools/install_voices"):
        bank.build(tmp_path / "a", planned(), 1, fails)
    with pytest.raises(RuntimeError, match="shard 0 died"):
        bank.build(tmp_path / "b", planned(), 1, dies)


def test_a_folder_of_another_plan_is_not_mixed_with_this_one(folder):
    with pytest.raises(InputError, match="another plan"):
        bank.build(folder, planned()[:2], 1, beep)


def test_a_missing_empty_or_damaged_bank_is_refused_in_one_line(folder, tmp_path):
    with pytest.raises(InputError, match="no utterance bank"):
        bank.Bank.open(tmp_path / "nowhere")
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "bank.json").write_bytes((folder / "bank.json").read_bytes())
    with pytest.raises(InputError, match="no finished shard"):
        bank.Bank.open(copy)
    for name, data in contents(folder).items():
        (copy / name).write_bytes(data)
    for name, cut in (("00002.pcm", 10), ("00002.jsonl", 300), ("bank.json", 20)):
        whole = (copy / name).read_bytes()
        (copy / name).write_bytes(whole[:-cut])
        with pytest.raises(InputError, match="damaged"):
            bank.Bank.open(copy)
        (copy / name).write_bytes(whole)
    (copy / "00001.pcm").unlink()
    with pytest.raises(InputError, match="damaged"):
        bank.Bank.open(copy)


def test_real_voices_are_stored_as_synthesised(tmp_path):
    pytest.importorskip("espeakng_loader", reason="tools/install_voices installs eSpeak NG")
    items = tuple(
        bank.PlannedUtterance("user", "train", voice, "alpha bravo") for voice in ("espeak:en-us+f3", "espeak:en+m1")
    )
    bank.build(tmp_path / "a", (items,), 1)
    bank.build(tmp_path / "b", (items,), 1)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert 0.4 < bank.Bank.open(tmp_path / "a").entries[1].seconds < 2.0


def test_casts_with_words_name_the_vocabulary_a_few_words_at_a_time():
    vocabulary = tuple(f"word{letter}" for letter in "abcdefghij")
    casts = (bank.Cast("train", ("espeak:a", "espeak:b"), 2, words=True, rate=(0.55, 1.0)), *CASTS)
    items = [i for shard in bank.plan(casts, [], say_something, 7, vocabulary) for i in shard if i.role == "words"]
    for voice in ("espeak:a", "espeak:b"):
        named = [words_of(item.text) for item in items if item.voice == voice]
        assert sorted(word for words in named for word in words) == sorted(2 * vocabulary), "each word twice"
        assert {len(words) for words in named} == {bank.WORDS_AT_ONCE}
    assert all(item.text.count(".") == bank.WORDS_AT_ONCE for item in items), "each in the tone of a sentence's end"
    assert all(0.55 <= item.rate <= 1 for item in items)

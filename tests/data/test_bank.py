"""The utterance bank: plans are balanced, a killed build continues, a half-built or damaged bank is recognised."""

import dataclasses
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from jaxtml.data import bank, bank_plan
from jaxtml.data.bank_plan import VoiceGroup
from jaxtml.data.recordings import amazon_queen
from jaxtml.data.voices import registry
from jaxtml.data.voices.utterance import Utterance, words_of
from jaxtml.errors import InputError
from jaxtml.stream.conversation import Word

GROUPS = (
    VoiceGroup("train", ("espeak:a", "espeak:b", "espeak:c"), 300, pitch=(0.8, 1.2)),
    VoiceGroup("test", ("flite:d",), 30),
    VoiceGroup("train", ("kokoro:e", "kokoro:f"), 70),
)


def beep(planned: bank.PlannedUtterance) -> Utterance:
    """A quick stand-in for an engine: every word is 0.1 s of its own tone."""
    words = words_of(planned.text)
    pitches = [200 + sum(map(ord, planned.voice + word)) % 400 for word in words]
    wave = np.concatenate([np.sin(np.arange(1600) * 2 * np.pi * pitch / 16_000) * 0.5 for pitch in pitches])
    times = tuple(Word(word, 0.1 * i, 0.1 * (i + 1)) for i, word in enumerate(words))
    return Utterance(wave.astype(np.float32), times, planned.voice, planned.text)


def slow_beep(planned: bank.PlannedUtterance) -> Utterance:
    time.sleep(0.01)
    return beep(planned)


def fails(planned: bank.PlannedUtterance) -> Utterance:
    raise InputError("the speech package flite is not installed: run tools/install_voices")


def dies(planned: bank.PlannedUtterance) -> Utterance:
    os.kill(os.getpid(), signal.SIGKILL)
    return beep(planned)


def say_something(rng: np.random.Generator) -> str:
    return f"say {['one', 'two', 'three'][int(rng.integers(3))]} {['red', 'green'][int(rng.integers(2))]}"


def plan() -> tuple[tuple[bank.PlannedUtterance, ...], ...]:
    return bank_plan.plan_bank(GROUPS, ["hello", "yes it is"], say_something, seed=7)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("bank")
    bank.build(path, plan(), 2, beep)
    return path


def files_of(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}


def test_a_plan_is_a_function_of_its_seed():
    assert plan() == plan()
    assert plan() != bank_plan.plan_bank(GROUPS, ["hello", "yes it is"], say_something, seed=8)


def test_the_models_replies_are_built_first_and_the_slow_voices_last():
    shards = plan()
    assert [planned.text for planned in shards[0]] == ["hello", "yes it is"]
    assert {planned.voice for planned in shards[0]} == {registry.OWN_VOICE}
    is_slow = [{planned.voice.startswith("kokoro:") for planned in shard} for shard in shards[1:]]
    assert is_slow == [{False}, {False}, {True}, {True}]


def test_any_number_of_finished_shards_is_balanced_over_voices_and_splits():
    shard = plan()[1]
    counts = [sum(planned.voice == voice for planned in shard) for voice in GROUPS[0].voices]
    assert max(counts) - min(counts) <= 1
    assert sum(planned.split == "test" for planned in shard) == pytest.approx(len(shard) / 11, abs=1)


def test_rates_and_pitches_stay_in_their_bounds():
    utterances = [planned for shard in plan() for planned in shard if planned.voice.startswith("espeak")]
    assert all(0.85 <= planned.rate <= 1.2 and 0.8 <= planned.pitch <= 1.2 for planned in utterances)
    assert len({planned.rate for planned in utterances}) > 100


def test_every_utterance_is_read_back_as_it_was_spoken(folder):
    opened = bank.Bank.open(folder)
    utterances = [planned for shard in plan() for planned in shard]
    assert len(opened) == len(utterances) and opened.complete
    for index in (0, 1, 2, 200, len(utterances) - 1):
        spoken, read = beep(utterances[index]), opened.utterance(index)
        assert (read.text, read.voice) == (spoken.text, spoken.voice)
        assert read.wave.dtype == np.float32
        np.testing.assert_allclose(read.wave, spoken.wave, atol=1 / 32767)
        assert [word.text for word in read.words] == [word.text for word in spoken.words]
        np.testing.assert_allclose([w.end_s for w in read.words], [w.end_s for w in spoken.words], atol=1e-3)


def test_utterances_are_selected_by_split_and_role(folder):
    opened = bank.Bank.open(folder)
    assert opened.select(role="assistant").tolist() == [0, 1]
    assert len(opened.select(split="train", role="user")) == 370
    test = opened.select(split="test", role="user")
    assert {opened.entries[index].planned.voice for index in test} == {"flite:d"}
    assert opened.replies == {"hello": 0, "yes it is": 1}


def test_a_pickled_bank_leaves_its_memory_maps_behind_and_reads_the_same(folder):
    opened = bank.Bank.open(folder)
    opened.utterance(0)
    copy = pickle.loads(pickle.dumps(opened))
    assert not copy._maps
    np.testing.assert_array_equal(copy.utterance(5).wave, opened.utterance(5).wave)


def test_a_killed_build_continues_where_it_was_and_ends_the_same(folder, tmp_path):
    code = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[2]); import test_bank\n"
        "from jaxtml.data import bank\n"
        "if __name__ == '__main__': bank.build(Path(sys.argv[1]), test_bank.plan(), 1, test_bank.slow_beep)"
    )
    script = tmp_path / "build.py"
    script.write_text(code)
    killed = tmp_path / "bank"
    command = [sys.executable, str(script), str(killed), str(Path(__file__).parent)]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])})
    deadline = time.monotonic() + 60
    while not (killed / "00001.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    half = bank.Bank.open(killed)
    assert 0 < len(half) < 402 and not half.complete
    finished = (killed / "00001.pcm").stat().st_mtime_ns
    bank.build(killed, plan(), 2, beep)
    assert (killed / "00001.pcm").stat().st_mtime_ns == finished
    assert {k: v for k, v in files_of(killed).items() if k.count(".") == 1} == files_of(folder)
    assert bank.Bank.open(killed).digest == bank.Bank.open(folder).digest != half.digest


def test_the_error_of_a_worker_is_the_error_of_the_build(tmp_path):
    with pytest.raises(InputError, match="tools/install_voices"):
        bank.build(tmp_path / "a", plan(), 1, fails)
    with pytest.raises(RuntimeError, match="shard 0 died"):
        bank.build(tmp_path / "b", plan(), 1, dies)


@pytest.fixture
def copied(folder, tmp_path) -> Path:
    """A copy of the finished bank."""
    return shutil.copytree(folder, tmp_path / "copied")


def other_plan() -> tuple[tuple[bank.PlannedUtterance, ...], ...]:
    """The plan of the finished bank with a reply and a user's sentence more, and without its last shard."""
    replies, sentences, *others, _ = plan()
    reply = bank.PlannedUtterance("assistant", "train", registry.OWN_VOICE, "good day")
    user = bank.PlannedUtterance("user", "train", "espeak:a", "good day", 0.9)
    return ((replies[0], reply, replies[1]), (user, *sentences), *others)


def test_a_bank_of_another_plan_keeps_what_it_has_and_speaks_only_what_is_new(copied):
    before, wanted = files_of(copied), [planned for shard in other_plan() for planned in shard]
    assert [planned.text for planned in bank.missing_utterances(copied, other_plan())] == ["good day", "good day"]
    bank.build(copied, other_plan(), 1, beep)
    assert bank.missing_utterances(copied, other_plan()) == []
    after = files_of(copied)
    assert all(after[name] == data for name, data in before.items() if name != "bank.json")
    (new_index,) = [name for name in after.keys() - before.keys() if name[0] == "0" and name.endswith(".jsonl")]
    assert len(after[new_index].splitlines()) == 1 + 2
    opened = bank.Bank.open(copied)
    assert opened.complete and [entry.planned for entry in opened.entries] == wanted
    for index in (1, 3, 200, len(wanted) - 1):
        np.testing.assert_allclose(opened.utterance(index).wave, beep(wanted[index]).wave, atol=1 / 32767)
    bank.build(copied, other_plan(), 1, dies)
    assert files_of(copied) == after, "nothing is spoken again"


def test_an_append_that_was_stopped_leaves_a_bank_that_can_be_used_and_goes_on(copied, folder):
    first = bank.Bank.open(folder)
    with pytest.raises(RuntimeError, match="died"):
        bank.build(copied, other_plan(), 1, dies)
    half = bank.Bank.open(copied)
    assert not half.complete
    assert [e.planned for e in half.entries] == [e.planned for e in first.entries][: len(half)]
    bank.build(copied, other_plan(), 1, beep)
    whole = bank.Bank.open(copied)
    assert whole.complete and len({first.digest, half.digest, whole.digest}) == 3


def test_a_bank_that_returns_to_its_first_plan_has_its_first_digest_and_speaks_nothing_twice(copied, folder):
    bank.build(copied, other_plan(), 1, beep)
    appended = bank.Bank.open(copied)
    bank.build(copied, plan(), 1, dies)
    assert bank.Bank.open(copied).digest == bank.Bank.open(folder).digest
    assert (copied / "bank.json").read_bytes() == (folder / "bank.json").read_bytes()
    bank.build(copied, other_plan(), 1, dies)
    assert bank.Bank.open(copied).digest == appended.digest


def test_a_bank_without_bank_json_is_known_by_its_shards(copied, folder):
    (copied / "bank.json").unlink()
    bank.build(copied, plan(), 1, dies)
    assert bank.Bank.open(copied).digest == bank.Bank.open(folder).digest


def test_a_damaged_order_file_is_refused_in_one_line(copied):
    bank.build(copied, other_plan(), 1, beep)
    (order,) = copied.glob("order-*.jsonl")
    order.write_bytes(order.read_bytes()[:-20])
    with pytest.raises(InputError, match=r"order-.* damaged: remove .*bank\.json"):
        bank.Bank.open(copied)
    (copied / "bank.json").unlink()
    bank.build(copied, other_plan(), 1, dies)
    assert bank.Bank.open(copied).complete


def test_a_plan_for_an_existing_bank_replaces_its_sentences_only_by_new_texts():
    spoken = [planned for shard in plan() for planned in shard]

    def say_more(rng: np.random.Generator) -> str:
        text = say_something(rng)
        return "say four red" if text == "say one red" and rng.random() < 0.2 else text

    def plan_for(spoken: Sequence[bank.PlannedUtterance]) -> list[bank.PlannedUtterance]:
        shards = bank_plan.plan_bank(GROUPS, ["hello", "yes it is"], say_more, 7, spoken=spoken)
        return [planned for shard in shards for planned in shard]

    anew, kept = plan_for([]), plan_for(spoken)
    assert len(set(anew) - set(spoken)) > 200, "other random draws"
    assert {planned.text for planned in set(kept) - set(spoken)} == {"say four red"}
    count = sum(planned.text == "say four red" for planned in anew)
    assert sum(planned.text == "say four red" for planned in kept) == count > 0
    assert sorted(planned.voice for planned in kept) == sorted(planned.voice for planned in anew)
    assert plan_for(anew) == anew


def test_a_plan_for_a_bank_says_single_words_that_are_new_and_keeps_the_others():
    voices = ("espeak:a", "kokoro:b")
    groups = (VoiceGroup("train", voices, 2, single_words=True),)

    def plan_for(words: str, spoken: Sequence[bank.PlannedUtterance] = ()) -> list[bank.PlannedUtterance]:
        shards = bank_plan.plan_bank(groups, [], say_something, 7, words.split(), spoken)
        return [planned for shard in shards for planned in shard]

    spoken = plan_for("ab cd ef gh ij kl mn op")
    more = plan_for("ab cd ef gh ij kl mn op howdy", spoken)
    assert set(spoken) <= set(more)
    new = [planned for planned in more if planned not in spoken]
    assert [planned.voice for planned in new] == list(voices)
    for planned in new:
        assert planned.text.count("howdy.") >= 1 and len(words_of(planned.text)) == bank_plan.WORDS_PER_UTTERANCE
    for voice in voices:
        said = [word for planned in more if planned.voice == voice for word in words_of(planned.text)]
        assert min(said.count(word) for word in ["ab", "cd", "ef", "gh", "ij", "kl", "mn", "op", "howdy"]) == 2


def test_a_voice_whose_bounds_changed_is_spoken_anew():
    spoken = [planned for shard in plan() for planned in shard]
    slower = tuple(dataclasses.replace(group, rate=(0.5, 0.6)) for group in GROUPS)
    shards = bank_plan.plan_bank(slower, ["hello", "yes it is"], say_something, 7, spoken=spoken)
    assert not {planned for shard in shards[1:] for planned in shard} & set(spoken)


def test_the_plan_of_existing_banks_is_the_one_of_earlier_versions(monkeypatch):
    """A bank holds this digest. With another digest, `jaxtml data` would append to it."""
    monkeypatch.setattr(amazon_queen, "is_installed", lambda: False)
    shards = bank_plan.full_plan(1)
    assert bank._digest(shards) == "54607fd0a283894facd41b86aa2132115259179a42dd3a18313add44114be915"
    assert bank_plan.full_plan(1, [planned for shard in shards for planned in shard]) == shards


def test_a_missing_empty_or_damaged_bank_is_refused_in_one_line(folder, tmp_path):
    with pytest.raises(InputError, match="no utterance bank"):
        bank.Bank.open(tmp_path / "nowhere")
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "bank.json").write_bytes((folder / "bank.json").read_bytes())
    with pytest.raises(InputError, match="no finished shard"):
        bank.Bank.open(copy)
    for name, data in files_of(folder).items():
        (copy / name).write_bytes(data)
    for name, cut in (("00002.pcm", 10), ("00002.jsonl", 300), ("bank.json", 20)):
        intact = (copy / name).read_bytes()
        (copy / name).write_bytes(intact[:-cut])
        with pytest.raises(InputError, match="damaged"):
            bank.Bank.open(copy)
        (copy / name).write_bytes(intact)
    (copy / "00001.pcm").unlink()
    with pytest.raises(InputError, match="damaged"):
        bank.Bank.open(copy)


def test_real_voices_are_stored_as_synthesised(tmp_path):
    pytest.importorskip("espeakng_loader", reason="tools/install_voices installs eSpeak NG")
    shard = tuple(
        bank.PlannedUtterance("user", "train", voice, "alpha bravo") for voice in ("espeak:en-us+f3", "espeak:en+m1")
    )
    bank.build(tmp_path / "a", (shard,), 1)
    bank.build(tmp_path / "b", (shard,), 1)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    assert 0.4 < bank.Bank.open(tmp_path / "a").entries[1].seconds < 2.0


def test_groups_of_single_words_say_the_whole_vocabulary_a_few_words_at_a_time():
    vocabulary = tuple(f"word{letter}" for letter in "abcdefghij")
    groups = (VoiceGroup("train", ("espeak:a", "espeak:b"), 2, single_words=True, rate=(0.55, 1.0)), *GROUPS)
    shards = bank_plan.plan_bank(groups, [], say_something, 7, vocabulary)
    utterances = [planned for shard in shards for planned in shard if planned.role == "words"]
    for voice in ("espeak:a", "espeak:b"):
        named = [words_of(planned.text) for planned in utterances if planned.voice == voice]
        assert sorted(word for words in named for word in words) == sorted(2 * vocabulary), "each word twice"
        assert {len(words) for words in named} == {bank_plan.WORDS_PER_UTTERANCE}
    stops = [planned.text.count(".") for planned in utterances]
    assert set(stops) == {bank_plan.WORDS_PER_UTTERANCE}, "each word ends like a sentence"
    assert all(0.55 <= planned.rate <= 1 for planned in utterances)

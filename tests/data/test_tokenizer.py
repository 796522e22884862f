"""A data folder keeps its tokenizer unless the user asks for another one. One that does not fit is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from jaxtml import config as configs
from jaxtml.checkpoint.files import SHIPPED
from jaxtml.config import Config
from jaxtml.data.tasks import scenarios
from jaxtml.data.tokenizer import choose_tokenizer
from jaxtml.errors import InputError

TINY = configs.load("tiny")
SHIPPED_FILE = (SHIPPED / "tokenizer.json").read_bytes()


def foreign(path: Path, size: int = 500, first_space: bool = False, alphabet: list[str] | None = None) -> Path:
    """Writes a tokenizer as other projects have them: byte-level, but with no space before the first word of a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=first_space)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=alphabet or pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(["a text", "of words"] if alphabet else scenarios.corpus(500), trainer)
    tokenizer.save(str(path))
    return path


def with_room(room: int) -> Config:
    return configs.override(TINY, f"duplex.control_base={room}")


def test_a_new_folder_gets_the_tokenizer_of_the_shipped_weights_also_when_the_task_has_new_texts(tmp_path, monkeypatch):
    monkeypatch.setitem(scenarios.GREETINGS, "grüß gott", "good day")
    codec = choose_tokenizer(TINY, tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == SHIPPED_FILE
    assert codec.decode(codec.encode("grüß gott")) == " grüß gott"


def test_the_shipped_tokenizer_is_the_one_that_the_texts_of_the_task_give(tmp_path):
    choose_tokenizer(TINY, tmp_path, train=True)
    assert (tmp_path / "tokenizer.json").read_bytes() == SHIPPED_FILE


def test_a_config_with_little_room_gets_a_small_tokenizer_and_one_without_room_for_bytes_is_refused(tmp_path):
    assert choose_tokenizer(with_room(300), tmp_path).size == 300
    (tmp_path / "other").mkdir()
    with pytest.raises(InputError, match="give at least 256"):
        choose_tokenizer(with_room(255), tmp_path / "other")
    assert not any((tmp_path / "other").iterdir())


def test_a_folder_keeps_its_tokenizer_unless_another_one_is_asked_for(tmp_path, caplog):
    choose_tokenizer(with_room(300), tmp_path)
    before = (tmp_path / "tokenizer.json").read_bytes()
    assert choose_tokenizer(TINY, tmp_path).size == 300
    with caplog.at_level("WARNING"):
        assert choose_tokenizer(TINY, tmp_path, given=SHIPPED).size == 604
    assert (tmp_path / "tokenizer.json").read_bytes() == SHIPPED_FILE
    (kept,) = tmp_path.glob("tokenizer-*.json")
    assert kept.read_bytes() == before and kept.name in caplog.text


def test_a_tokenizer_of_another_project_writes_words_apart(tmp_path):
    codec = choose_tokenizer(TINY, tmp_path, given=foreign(tmp_path / "release.json"))
    assert codec.decode([*codec.encode("hello"), *codec.encode("there")]) == " hello there"
    assert codec.encode("hello there") == [*codec.encode("hello"), *codec.encode("there")]


@pytest.mark.parametrize("config", [with_room(450), configs.override(with_room(450), "name=other")])
def test_a_tokenizer_whose_ids_meet_the_control_tokens_is_refused(config, tmp_path):
    release = foreign(tmp_path / "release.json")
    with pytest.raises(InputError, match=f"ids up to 499, {config.name} has its control tokens from 450 on"):
        choose_tokenizer(config, tmp_path, given=release)
    assert not (tmp_path / "tokenizer.json").exists()


def test_the_largest_id_counts_and_not_the_number_of_ids(tmp_path):
    path = foreign(tmp_path / "release.json")
    content = json.loads(path.read_text())
    last = max(content["model"]["vocab"], key=content["model"]["vocab"].get)
    content["model"]["vocab"][last] = 1010
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match="ids up to 1010"):
        choose_tokenizer(TINY, tmp_path, given=path)


def test_a_tokenizer_that_loses_words_of_the_task_is_refused(tmp_path):
    path = foreign(tmp_path / "latin.json", alphabet=list("atexofwrdsĠ"))
    with pytest.raises(InputError, match="cannot write 'afternoon', a word of the task") as caught:
        choose_tokenizer(TINY, tmp_path, given=path)
    assert "--new-tokenizer" in str(caught.value)


def test_a_tokenizer_that_is_not_there_is_refused(tmp_path):
    for given in (tmp_path, tmp_path / "nowhere.json"):
        with pytest.raises(InputError, match=r"--tokenizer .*there is no .*\.json"):
            choose_tokenizer(TINY, tmp_path, given=given)


def test_a_config_of_a_release_gets_a_warning_that_its_tokenizer_is_missing(tmp_path, caplog):
    with caplog.at_level("WARNING"):
        choose_tokenizer(configs.load("inkling_small"), tmp_path)
    assert "604 ids, the vocabulary of inkling_small has 200058" in caplog.text and "--tokenizer" in caplog.text

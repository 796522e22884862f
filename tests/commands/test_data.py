"""`jaxtml data` says what is missing, and refuses what cannot work before the long work."""

from __future__ import annotations

from jaxtml.checkpoint.files import SHIPPED


def test_no_build_with_show_refuses_a_missing_bank(refusal, tmp_path):
    assert "bank" in refusal("data", "tiny", "--out", tmp_path / "d", "--no-build", "--show", 1)


def test_no_build_without_a_bank_is_refused_and_makes_nothing(refusal, tmp_path):
    line = refusal("data", "tiny", "--out", tmp_path / "d", "--no-build")
    # 20,004 utterances, and 3,271 more where the recordings of people are installed.
    assert "there is no speech bank" in line and "leave out --no-build, and the command speaks all 2" in line
    assert not (tmp_path / "d").exists()


def test_a_file_in_place_of_the_folder_is_refused(refusal, tmp_path):
    (tmp_path / "file").touch()
    assert "file is a file: name a folder" in refusal("data", "tiny", "--out", tmp_path / "file")


def test_a_number_of_rows_that_no_cache_can_have_is_refused_before_anything_is_made(refusal, tmp_path):
    assert "multiple of 64" in refusal("data", "tiny", "--out", tmp_path / "d", "--rows", 100)
    assert not (tmp_path / "d").exists()


def test_a_cache_of_another_size_is_refused_before_anything_is_spoken(refusal, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "cache.json").write_text('{"digest": "", "rows": 128}')
    assert "holds a cache of 128 rows, not 64" in refusal("data", "tiny", "--out", tmp_path, "--rows", 64)
    assert not (tmp_path / "bank").exists()


def test_two_tokenizers_cannot_be_asked_for_at_once(jaxtml, tmp_path):
    status, _, err = jaxtml("data", "tiny", "--out", tmp_path, "--tokenizer", SHIPPED, "--new-tokenizer")
    assert status == 2 and "not allowed with" in err

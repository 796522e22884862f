"""A release with a license, a `vocab.tiktoken` and other files, and conversions of it. It has less than 1 MB."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from absl import logging

from jaxtml.checkpoint import chunks
from jaxtml.checkpoint.inkling.safetensors_file import read_header, write_at
from jaxtml.checkpoint.orbax import sink
from jaxtml.convert.conversion import convert

EXTRA_FILES = {
    "generation_config.json": '{"temperature": 0.7}\n',
    "preprocessor_config.json": '{"feature_size": 80}\n',
    "tokenizer_config.json": "{}\n",
    "chat_template.jinja": "{{ messages }}\n",
    "LICENSE": "Apache-2.0\n",
    "vocab.tiktoken": "YQ== 0\n",
}
FILES_OF_WEIGHTS = {"hf_quant_config.json": "{}", "quantize_config.json": "{}", "manifest.json": "[]", ".cache": ""}
TOKEN_IDS = {"audio_token_id": 17, "image_token_id": 16, "audio_bos_token_id": 19, "image_bos_token_id": 18}


@pytest.fixture
def many_chunks(monkeypatch) -> None:
    """Cuts even the small models of the tests into many chunks: about twenty of their parameters have several."""
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 2**15)
    monkeypatch.setattr(sink, "PIECE_BYTES", 2**11)


@pytest.fixture
def info_log(caplog) -> Iterator[pytest.LogCaptureFixture]:
    """`caplog` with all messages from INFO on.

    It sets the verbosity of absl. A conversion saves and restores this verbosity, which would undo `caplog.set_level`.
    """
    before = logging.get_verbosity()
    logging.set_verbosity(logging.INFO)
    yield caplog
    logging.set_verbosity(before)


@pytest.fixture(scope="session")
def extra_files() -> dict[str, str]:
    """The text of the files of `full_release` that a conversion copies, by name."""
    return EXTRA_FILES


@pytest.fixture(scope="session")
def files_of_weights() -> dict[str, str]:
    """The text of the files of `full_release` that belong to its weights, by name."""
    return FILES_OF_WEIGHTS


@pytest.fixture(scope="session")
def token_ids() -> dict[str, int]:
    """The ids of placeholders in the `config.json` of `full_release`."""
    return TOKEN_IDS


@pytest.fixture(scope="session")
def full_release(release, tmp_path_factory) -> Path:
    """A release with the files that come with the weights of a real one, but with no `tokenizer.json`."""
    folder = tmp_path_factory.mktemp("full_release") / "hf"
    shutil.copytree(release, folder)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= {"eos_token_id": 7, "bos_token_id": None}
    (folder / "config.json").write_text(json.dumps(config | TOKEN_IDS))
    for name, text in (EXTRA_FILES | FILES_OF_WEIGHTS).items():
        (folder / name).write_text(text)
    return folder


@pytest.fixture(scope="session")
def ours(full_release, tmp_path_factory) -> Path:
    """`full_release`, converted to a jaxtml checkpoint."""
    folder = tmp_path_factory.mktemp("ours") / "ours"
    convert(full_release, folder)
    return folder


@pytest.fixture
def result(request, ours, tmp_path) -> Path:
    """A converted checkpoint of the test's own, in the format that the test's parameter says."""
    if request.param == "hf":
        convert(ours, tmp_path / "result", to="hf")
    else:
        shutil.copytree(ours, tmp_path / "result")
    return tmp_path / "result"


@pytest.fixture(scope="session")
def damage() -> Callable[[Path], str]:
    """`damage(folder)` changes one bit of one tensor and returns the tensor's name in the manifest."""

    def flip_a_bit(folder: Path) -> str:
        if (folder / "model.safetensors").is_file():
            name = "model.llm.layers.2.attn.wq_du.weight"
            stored = read_header(folder / "model.safetensors")[name]
            write_at(stored, 5, np.array([stored.mapped().view(np.uint8).reshape(-1)[5] ^ 1], np.uint8))
            return name
        file = next(file for file in (folder / "state" / "embed.weight" / "c").rglob("*") if file.is_file())
        raw = bytearray(file.read_bytes())
        raw[9] ^= 1
        file.write_bytes(raw)
        return "embed/weight"

    return flip_a_bit

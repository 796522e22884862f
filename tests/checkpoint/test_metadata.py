"""Wrong JSON in any file of a checkpoint is either read or refused in one line, never a traceback."""

from __future__ import annotations

import copy
import itertools
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jaxtml.checkpoint.files import STATE
from jaxtml.checkpoint.inkling.config import config_from_inkling, inkling_config
from jaxtml.checkpoint.inkling.directory import read_json
from jaxtml.checkpoint.manifest import read_manifest
from jaxtml.checkpoint.opening import open_checkpoint
from jaxtml.checkpoint.orbax import sink
from jaxtml.checkpoint.source import InMemorySource
from jaxtml.convert.conversion import write_checkpoint
from jaxtml.errors import InputError

WRONG_VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 3, 2**31, 2**70, 10**400, 0.5, float("nan"), float("inf"), -1e300),
    *("", "x", "../x", [], [[]], [-1], ["x"], [1, 2, 3], {}, {"x": 1}, [[1, 2]], [[1, 1, "x"]]),
)


def _wrong_documents(document: Any, each: int) -> Iterator[tuple[str, Any]]:
    """Yields the document with one wrong value, or with one key missing, and says which.

    Every value at any depth of the document, but only the first item of a list, is replaced `each` times by the next
    entry of `WRONG_VALUES`.
    """
    wrong_values = itertools.cycle(WRONG_VALUES)

    def positions(node: Any, at: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
        yield at
        if isinstance(node, dict):
            for key in node:
                yield from positions(node[key], (*at, key))
        elif isinstance(node, list) and node:
            yield from positions(node[0], (*at, 0))

    for at in positions(document, ()):
        for wrong in itertools.islice(wrong_values, each):
            changed = [copy.deepcopy(document)]
            node: Any = changed
            for key in (0, *at)[:-1]:
                node = node[key]
            node[(0, *at)[-1]] = wrong
            yield f"{at} = {wrong!r:.40}", changed[0]
        if at and isinstance(at[-1], str):
            changed = copy.deepcopy(document)
            node = changed
            for key in at[:-1]:
                node = node[key]
            del node[at[-1]]
            yield f"without {at}", changed


def _count_refused(document: Any, read: Callable[[Any], Any], each: int = len(WRONG_VALUES)) -> int:
    """Reads every wrong document, and returns how many were refused. Each refusal must be one line."""
    refused = 0
    for what, changed in _wrong_documents(document, each):
        try:
            read(changed)
        except InputError as error:
            assert "\n" not in str(error) and len(str(error)) < 1000, what
            refused += 1
        except Exception as error:
            raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
    return refused


@pytest.fixture
def no_log(caplog) -> None:
    caplog.set_level(logging.CRITICAL, "absl")


@pytest.mark.usefixtures("no_log")
@pytest.mark.parametrize("spelling", ["released", "ours"])
def test_wrong_configs_of_a_release(spelling, releasable, tmp_path):
    described = inkling_config(releasable)
    if spelling == "released":
        text = described["text_config"]
        text |= {
            "dense_intermediate_size": text["intermediate_size"],
            "intermediate_size": text["moe_intermediate_size"],
        }
        text |= {"local_layer_ids": [0, 1, 3], "dense_mlp_idx": 1}
        for name in ("layer_types", "mlp_layer_types", "moe_intermediate_size"):
            del text[name]
    read = _rewritten(tmp_path / "config.json", lambda: config_from_inkling(read_json(tmp_path / "config.json")))
    assert read(described).backbone.global_layers == releasable.backbone.global_layers
    assert _count_refused(described, read) > 500


def _rewritten(file: Path, read: Callable[[], Any]) -> Callable[[Any], Any]:
    """Returns a function that writes a document to the file and calls `read`."""

    def write_and_read(document: Any) -> Any:
        file.write_text(json.dumps(document))
        return read()

    return write_and_read


def test_wrong_indexes_of_a_release(release, tmp_path):
    shutil.copytree(release, tmp_path / "hf")
    index = {
        "metadata": {"total_size": 1},
        "weight_map": {"model.llm.norm.weight": "model.safetensors", "model.llm.embed.weight": "model.safetensors"},
    }
    file = tmp_path / "hf" / "model.safetensors.index.json"
    assert _count_refused(index, _rewritten(file, lambda: open_checkpoint(tmp_path / "hf"))) > 50


def test_wrong_headers_of_a_shard(release, tmp_path):
    shutil.copytree(release, tmp_path / "hf")
    file = tmp_path / "hf" / "model.safetensors"
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    few = {name: header[name] for name in ("__metadata__", "model.llm.norm.weight")}

    def read(few: Any) -> None:
        text = json.dumps(header | few if isinstance(few, dict) else few).encode()
        file.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])
        open_checkpoint(tmp_path / "hf")

    read(few)
    assert _count_refused(few, read) > 50


def test_wrong_documents_of_a_jaxtml_checkpoint(small, lively, tmp_path, monkeypatch):
    monkeypatch.setattr(sink, "PIECE_BYTES", 512)
    folder = tmp_path / "ours"
    two_layers = replace(
        small, backbone=replace(small.backbone, n_layers=2, global_layers=(1,))
    )  # each document opens it
    write_checkpoint(InMemorySource(two_layers, lively(two_layers)), folder, "memory")
    for name in ("config.json", f"{STATE}/_METADATA", f"{STATE}/norm.weight/zarr.json"):
        document = json.loads((folder / name).read_text())
        if name.endswith("_METADATA"):
            tree = document["tree_metadata"]
            document["tree_metadata"] = dict(list(tree.items())[:1])
        good = (folder / name).read_text()
        read = _rewritten(folder / name, lambda: open_checkpoint(folder).read("norm/weight", (slice(None),)))
        each = 1 if name == "config.json" else 7  # fewer wrong values for the config, which is slow to read
        assert _count_refused(document, read, each) > 20
        (folder / name).write_text(good)
    open_checkpoint(folder)


@pytest.mark.parametrize("text", [b"[" * 100_000, b'{"a": ' * 100_000, b"1" * 10_000, b'"\xff"', b"NaN", b""])
def test_json_that_python_cannot_parse(text, release, tmp_path):
    shutil.copytree(release, tmp_path / "hf")
    shutil.copytree(release, tmp_path / "index")
    for place in ("hf/config.json", "index/model.safetensors.index.json", "ours/config.json", "made/manifest.json"):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        (tmp_path / place).write_bytes(text)
    for read, folder in (
        (open_checkpoint, "hf"),
        (open_checkpoint, "index"),
        (open_checkpoint, "ours"),
        (read_manifest, "made"),
    ):
        with pytest.raises(InputError) as refused:
            read(tmp_path / folder)
        assert "\n" not in str(refused.value)

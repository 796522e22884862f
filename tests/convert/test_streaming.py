"""A conversion is whole or not there, goes on where it was killed, and is what its checksums say."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxtml import config as configs
from jaxtml.checkpoint import chunks
from jaxtml.checkpoint.chunks import chunk_indices, chunk_shape, conversion_chunks
from jaxtml.checkpoint.inkling.safetensors_file import read_header, write_at
from jaxtml.checkpoint.inkling.source import ReleasedCheckpoint
from jaxtml.checkpoint.opening import open_checkpoint, read_checkpoint
from jaxtml.checkpoint.orbax.sink import OrbaxSink
from jaxtml.checkpoint.orbax.source import OrbaxCheckpoint, load_checkpoint
from jaxtml.checkpoint.source import InMemorySource, first_device_shapes, place_parameters, spec_table
from jaxtml.convert import journal, streaming
from jaxtml.convert.conversion import convert, write_checkpoint
from jaxtml.convert.journal import Journal
from jaxtml.convert.verification import compare_tensors
from jaxtml.errors import InputError
from jaxtml.model.interaction import InteractionModel
from jaxtml.model.spec import Params, flatten
from jaxtml.parallel.mesh import MeshShape, make_mesh

pytestmark = pytest.mark.usefixtures("many_chunks")


@pytest.fixture(scope="module")
def params(config, lively) -> Params:
    return lively(config)


@pytest.fixture(scope="module")
def released(config, params, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("released") / "hf"
    write_checkpoint(InMemorySource(config, params), folder, "memory", "hf", "bfloat16")
    return folder


def test_chunks_cover_every_number_once(config):
    for path, spec in spec_table(config).items():
        seen = np.zeros(spec.shape, int)
        for index in chunk_indices(spec, chunk_shape(spec, 2)):
            seen[index] += 1
        assert (seen == 1).all(), path
        assert 2 * np.prod(chunk_shape(spec, 2)) <= chunks.CHUNK_BYTES


def test_the_chunks_of_a_layer_follow_each_other_in_the_released_tensor(config):
    for path, spec in spec_table(config).items():
        if spec.released is not None:
            inner = spec.shape[spec.stacked :]
            ours = spec.released.load(np.arange(math.prod(inner)).reshape(spec.released.shape))
            parts = [ours[index[spec.stacked :]] for index in chunk_indices(spec, chunk_shape(spec, 2))]
            parts = parts[: len(parts) // math.prod(spec.shape[: spec.stacked])]
            lie = np.concatenate([part.transpose(spec.released.order).ravel() for part in parts])
            np.testing.assert_array_equal(lie, np.arange(ours.size), err_msg=path)


@pytest.mark.parametrize("experts", [2039, 31])
def test_sizes_that_nothing_divides_make_no_more_files_than_others(experts, small):
    """A prime number of rows, of which a file has room for some; 31 experts, of which it has room for 8."""
    width = 8 if experts > 1000 else 64
    backbone = dataclasses.replace(small.backbone, n_experts=experts, d_ff_expert=width)
    specs = spec_table(dataclasses.replace(small, backbone=backbone))
    for spec in (spec for path, spec in specs.items() if "expert" in spec.axes and path.startswith("layers")):
        shape = chunk_shape(spec, 2)
        layers, size = math.prod(spec.shape[:2]), 2 * math.prod(spec.shape[2:])
        assert len(list(chunk_indices(spec, shape))) <= layers * (2 * size // chunks.CHUNK_BYTES + 2), shape


def test_the_large_models_are_written_in_bounded_chunks(monkeypatch):
    monkeypatch.undo()
    for name in ("inkling_small", "tml_interaction_small"):
        for path, spec in spec_table(configs.load(name)).items():
            assert 2 * math.prod(chunk_shape(spec, 2)) <= 2**23, path


def test_there_and_back_the_files_have_the_same_bytes(released, tmp_path):
    said = convert(released, tmp_path / "ours", verify=True)
    assert "tensors equal, logits of 64 tokens too" in said
    said = convert(tmp_path / "ours", tmp_path / "hf", to="hf", verify=True)
    assert "tensors equal, logits of 64 tokens too" in said
    for name in ("model.safetensors", "config.json"):
        assert (released / name).read_bytes() == (tmp_path / "hf" / name).read_bytes()
    held = {
        path: open_checkpoint(tmp_path / "ours").dtype(path).name
        for path in spec_table(open_checkpoint(released).config)
    }
    assert held["layers/block0/run0/attn/wq"] == "bfloat16"
    assert {name for path, name in held.items() if path.endswith("router_bias")} == {"float32"}


def test_orbax_itself_restores_what_was_written(released, tmp_path):
    from orbax.checkpoint import v1 as ocp

    convert(released, tmp_path / "ours")
    config, params = read_checkpoint(tmp_path / "ours")
    loaded = ocp.load(str(tmp_path / "ours"), first_device_shapes(config, "float32"))
    for (path, a), (_, b) in zip(flatten(loaded), flatten(params), strict=True):
        np.testing.assert_array_equal(np.asarray(a).astype(np.float32), b, err_msg=path)


@pytest.mark.parametrize("kind", ["released", "ours"])
def test_devices_read_their_own_parts_and_nothing_else(kind, config, released, tmp_path):
    directory = released
    if kind == "ours":
        directory = tmp_path / "ours"
        convert(released, directory)
    source, mesh = open_checkpoint(directory), make_mesh(MeshShape(data=4, expert=2))
    asked: list[tuple[str, tuple[slice, ...]]] = []

    class Watched:
        config, dtype = source.config, staticmethod(source.dtype)

        def read(self, path, index):
            asked.append((path, index))
            return source.read(path, index)

    def shape(spec):
        axes = [{"expert": "expert", "expert_embed": "data"}.get(axis) for axis in spec.axes]
        sharding = NamedSharding(mesh, PartitionSpec(*axes))
        return jax.ShapeDtypeStruct(spec.shape, "float32", sharding=sharding)

    table_of = InteractionModel(source.config).specs()
    ours = place_parameters(Watched(), jax.tree.map(shape, table_of))
    _, everything = read_checkpoint(directory)
    for (path, a), (_, b) in zip(flatten(ours), flatten(everything), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=path)
    w13 = next(
        path for path, spec in spec_table(source.config).items() if "gate_up" in spec.axes and "expert" in spec.axes
    )
    spec = spec_table(source.config)[w13]
    sizes = {tuple(len(range(*cut.indices(n))) for cut, n in zip(index, spec.shape, strict=True))
             for path, index in asked if path == w13}  # fmt: skip
    assert sizes == {(*spec.shape[:2], spec.shape[2] // 2, 2, spec.shape[4] // 4, spec.shape[5])}


KILLED = """
import os, signal, sys
from pathlib import Path
from jaxtml.checkpoint import chunks
from jaxtml.convert.journal import Journal
from jaxtml.convert.conversion import convert
chunks.CHUNK_BYTES = 8192
note, seen = Journal.note, []
def killed(self, *args):
    note(self, *args)
    seen.append(args)
    if len(seen) == 100:
        os.kill(os.getpid(), signal.SIGKILL)
Journal.note = killed
convert(sys.argv[1], sys.argv[2], to=sys.argv[3])
"""


@pytest.mark.parametrize("to", ["orbax", "hf"])
def test_a_conversion_that_was_killed_goes_on_without_doing_anything_twice(to, released, tmp_path, monkeypatch):
    source = released
    if to == "hf":
        convert(released, tmp_path / "source")
        source = tmp_path / "source"
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", KILLED, str(source), str(tmp_path / "out"), to]
    killed = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    assert not (tmp_path / "out").exists(), "nothing half written has the name"
    (folder,) = tmp_path.glob(".out.converting")
    lines = [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines() if line]
    with open(folder / "journal.jsonl", "a") as journal:
        journal.write('{"layer": "cut o')  # what a crash may leave
    done = {(line["layer"], line["chunks"]) for line in lines[1:]}
    assert len(done) >= 100
    again: list[tuple[str, int]] = []
    note = Journal.note
    monkeypatch.setattr(
        Journal,
        "note",
        lambda self, layer, count, *rest: (again.append((layer, count)), note(self, layer, count, *rest)),
    )
    assert "tensors equal" in convert(source, tmp_path / "out", to=to, verify=True)
    assert not done & set(again) and len(again) == len(set(again)) > 0
    assert not list(tmp_path.glob(".out*"))
    convert(source, tmp_path / "straight", to=to)
    manifests = [json.loads((tmp_path / name / "manifest.json").read_text())["tensors"] for name in ("out", "straight")]
    assert manifests[0] == manifests[1]


def test_another_source_or_another_boot_begins_anew(released, tmp_path, monkeypatch):
    write_, left = OrbaxSink.write, [50]

    def stopped(self, *args):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return write_(self, *args)

    def interrupted() -> int:
        """Chunks that a conversion which stops after 50 found done."""
        left[0] = 50
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(OrbaxSink, "write", stopped)
            convert(released, tmp_path / "out")
        lines = (tmp_path / ".out.converting" / "journal.jsonl").read_text().splitlines()
        return sum('"layer"' in line for line in lines)

    first = interrupted()
    assert interrupted() > first, "the second went on"
    boot = tmp_path / "boot"
    boot.write_text("another")
    monkeypatch.setattr(journal, "_BOOT_ID", boot)
    assert interrupted() <= first
    boot.write_text("")
    os.utime(released / "model.safetensors")
    assert interrupted() <= first


@contextmanager
def _held_at(name: str, released: Path, out: Path, monkeypatch) -> Iterator[None]:
    """While another thread's conversion waits in this method of its sink."""
    begun, go = threading.Event(), threading.Event()
    method = getattr(OrbaxSink, name)

    def waiting(self, *args):
        begun.set()
        go.wait(60)
        return method(self, *args)

    monkeypatch.setattr(OrbaxSink, name, waiting)
    thread = threading.Thread(target=convert, args=(released, out))
    thread.start()
    try:
        assert begun.wait(60)
        yield
    finally:
        go.set()
        thread.join()


@pytest.mark.parametrize("dtype", [None, "float32"])
@pytest.mark.parametrize("held_at", ["prepare", "write"])
def test_two_conversions_to_one_place_do_not_mix(held_at, dtype, released, tmp_path, monkeypatch):
    refused = pytest.raises(InputError, match="is being written by another conversion")
    with _held_at(held_at, released, tmp_path / "out", monkeypatch), refused:
        convert(released, tmp_path / "out", dtype=dtype)
    assert OrbaxCheckpoint(tmp_path / "out").config.backbone == open_checkpoint(released).config.backbone
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    with pytest.raises(InputError, match="exists: name a new directory"):
        convert(released, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_one_error_ends_all_at_their_next_chunk(released, tmp_path, monkeypatch):
    """The threads wait until one has failed; each may end its chunk, and begins no other."""
    write_, failed, after = OrbaxSink.write, threading.Event(), []

    def failing(self, path, index, values):
        if path == first:
            failed.set()
            raise RuntimeError("broken")
        failed.wait(60)
        after.append(path)
        return write_(self, path, index, values)

    source, sink = ReleasedCheckpoint(released), OrbaxSink(open_checkpoint(released).config, _dtypes(released), {})
    first = next(iter(sink.specs))
    monkeypatch.setattr(OrbaxSink, "write", failing)
    with pytest.raises(RuntimeError, match="broken"):
        streaming.copy_parameters(source, sink, tmp_path / "out", "released", workers=4)
    assert len(after) < 40 < len(conversion_chunks(sink.specs, sink.dtype))


def _dtypes(folder: Path) -> dict[str, np.dtype]:
    source = open_checkpoint(folder)
    return {path: source.dtype(path) for path in spec_table(source.config)}


def test_a_disk_without_room_is_refused_before_anything_is_written(released, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6 - 1000, 1000))
    with pytest.raises(InputError, match=r"out needs 0.0 GB, .* has 0.0 GB left"):
        convert(released, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_is_one_line_and_the_conversion_goes_on_later(released, tmp_path, monkeypatch):
    prepare = OrbaxSink.prepare

    class Full:
        """An array that says what TensorStore says on a full disk."""

        def __getitem__(self, index):
            return self

        def write(self, values):
            raise ValueError(
                'RESOURCE_EXHAUSTED: Error writing local file "/o/state/norm.weight/c/0": Failed writing: '
                "Failed to write 348180 bytes to file 4: No space left on device [os_error_code='28']"
            )

    def almost_full(self, folder):
        prepare(self, folder)
        self.arrays |= dict.fromkeys(list(self.arrays)[30:], Full())

    with monkeypatch.context() as patched:
        patched.setattr(OrbaxSink, "prepare", almost_full)
        with pytest.raises(
            InputError, match="out.*: the disk is full; make room and convert again, it goes on from here"
        ):
            convert(released, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert "tensors equal" in convert(released, tmp_path / "out", verify=True)


def test_a_kill_while_the_disk_catches_up_costs_no_work(released, tmp_path, monkeypatch):
    def killed() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(os, "sync", killed)
        with pytest.raises(KeyboardInterrupt):
            convert(released, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    written: list[str] = []
    monkeypatch.setattr(OrbaxSink, "write", lambda self, path, *_: written.append(path))
    convert(released, tmp_path / "out")
    assert not written and open_checkpoint(tmp_path / "out").config == open_checkpoint(released).config
    assert not (tmp_path / "out" / journal.JOURNAL).exists()


def test_a_result_inside_its_source_is_refused(released):
    with pytest.raises(InputError, match="name a directory outside it"):
        convert(released, released / "out")


def test_a_tokenizer_comes_along_both_ways(released, codec, tmp_path):
    shutil.copytree(released, tmp_path / "source")
    codec.save(tmp_path / "source" / "tokenizer.json")
    convert(tmp_path / "source", tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "back", to="hf")
    for folder in ("ours", "back"):
        kept = (tmp_path / folder / "tokenizer.json").read_bytes()
        assert kept == (tmp_path / "source" / "tokenizer.json").read_bytes()


def test_a_link_is_followed_to_where_the_result_is_to_be(released, tmp_path):
    (tmp_path / "disk").mkdir()
    for target in ("empty", "new"):
        (tmp_path / target).symlink_to(tmp_path / "disk" / target)
        if target == "empty":
            (tmp_path / "disk" / target).mkdir()
        assert "tensors equal" in convert(released, tmp_path / target, verify=True)
        assert (tmp_path / target).is_symlink() and (tmp_path / "disk" / target / "config.json").is_file()


def test_a_chunk_that_is_not_there_is_missed(released, tmp_path):
    convert(released, tmp_path / "ours")
    (tmp_path / "ours" / "state" / "norm.weight" / "c" / "0").unlink()
    with pytest.raises(InputError, match="damaged or incomplete"):
        read_checkpoint(tmp_path / "ours")
    with pytest.raises(InputError, match="damaged or incomplete"):
        convert(tmp_path / "ours", tmp_path / "hf", to="hf")


def test_verification_names_what_differs(released, tmp_path, monkeypatch):
    convert(released, tmp_path / "ours")
    source = ReleasedCheckpoint(released)
    copied = tmp_path / "changed"
    shutil.copytree(released, copied)
    name = "model.llm.layers.3.attn.wq_du.weight"
    stored = read_header(copied / "model.safetensors")[name]
    changed = np.array(stored.mapped())
    changed[2, 3] += 1
    write_at(stored, 0, changed)
    result, specs = OrbaxCheckpoint(tmp_path / "ours"), spec_table(source.config)
    assert compare_tensors(source, result, specs) == len(
        json.loads((tmp_path / "ours" / "manifest.json").read_text())["tensors"]
    )
    (path, at), _ = next((key, place) for key, place in source.tensors.items() if place.name == name)
    with pytest.raises(
        InputError, match=f"differs from its source in 1 of .* tensors, first in {path}/{at[0]}/{at[1]}"
    ):
        compare_tensors(ReleasedCheckpoint(copied), result, specs)


def test_the_checkpoint_of_a_run_is_a_source_too_and_its_config_travels(config, params, tmp_path):
    write_checkpoint(InMemorySource(config, params), tmp_path / "a", "memory", "orbax", "float32")
    loaded, values = load_checkpoint(tmp_path / "a")
    assert configs.to_json(loaded) == configs.to_json(config)
    jax.tree.map(np.testing.assert_array_equal, values, params)

"""We read the files of the `safetensors` library, and it reads ours. Damaged files are refused."""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxtml.checkpoint.inkling.safetensors_file import DTYPES, create_file, header_text, read_header, write_at
from jaxtml.errors import InputError


@pytest.fixture
def tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "b.weight": rng.normal(size=(3, 5)).astype(np.float32),
        "a.weight": rng.normal(size=(4, 2, 7)).astype(ml_dtypes.bfloat16),
        "scalar": np.array([7], np.int64),
    }


def test_tensors_that_the_library_wrote_are_mapped(tensors, tmp_path):
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    found = read_header(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(found[name].mapped(), tensor)
        assert found[name].mapped().dtype == tensor.dtype and found[name].nbytes == tensor.nbytes


def test_the_library_reads_a_file_that_was_written_piece_by_piece(tensors, tmp_path):
    path = tmp_path / "x.safetensors"
    stored = create_file(path, header_text((name, t.shape, t.dtype) for name, t in tensors.items()))
    for name, tensor in tensors.items():
        for i in range(len(tensor)):
            write_at(stored[name], i * tensor[:1].nbytes, np.ascontiguousarray(tensor[i : i + 1]))
    for name, tensor in load_file(path).items():
        np.testing.assert_array_equal(tensor, tensors[name])


def test_a_header_is_that_of_the_library_to_the_byte(tmp_path):
    dtypes = (np.uint8, np.float16, ml_dtypes.bfloat16, np.int32, np.float32, np.int64)
    tensors = {f"{i}.é{dtype.__name__}": np.zeros((i, 3), dtype) for i, dtype in enumerate((*dtypes, *dtypes), 1)}
    save_file(tensors, tmp_path / "library.safetensors", metadata={"format": "pt"})
    create_file(tmp_path / "ours.safetensors", header_text((name, t.shape, t.dtype) for name, t in tensors.items()))
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "library.safetensors").read_bytes()


def test_a_file_with_the_same_header_is_kept_and_another_file_is_replaced(tmp_path):
    path, layout = tmp_path / "x.safetensors", header_text([("a", (4,), np.dtype(np.float32))])
    write_at(create_file(path, layout)["a"], 0, np.full(4, 3, np.float32))
    assert (create_file(path, layout)["a"].mapped() == 3).all()
    assert not create_file(path, header_text([("b", (4,), np.dtype(np.float32))]))["b"].mapped().any()


@pytest.mark.parametrize("name", ["F8_E4M3", "F8_E8M0"])
def test_floats_of_8_bits_that_the_library_cannot_read_are_mapped(name, tmp_path):
    codes = np.arange(1, 121, dtype=np.uint8)
    save_file({"x": codes}, tmp_path / "x.safetensors")
    raw = (tmp_path / "x.safetensors").read_bytes().replace(b'"U8"', f'"{name}"'.encode())
    length = int.from_bytes(raw[:8], "little") + len(name) - 2
    (tmp_path / "x.safetensors").write_bytes(length.to_bytes(8, "little") + raw[8:])
    np.testing.assert_array_equal(read_header(tmp_path / "x.safetensors")["x"].mapped(), codes.view(DTYPES[name]))


def _damaged(raw: bytes) -> dict[str, bytes]:
    """Returns files that are damaged, by what is wrong with them. `raw` is a good file."""

    def header(**changes: object) -> bytes:
        entry = {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]} | changes
        text = json.dumps({"x": entry}).encode()
        return len(text).to_bytes(8, "little") + text + b"\0" * 12

    return {
        "empty": b"",
        "a few bytes": b"abc",
        "cut off": raw[:-4],
        "header longer than the file": (2**40).to_bytes(8, "little") + raw[8:],
        "header that is not JSON": raw[:8] + b"#" + raw[9:],
        "header that is not an object": (2).to_bytes(8, "little") + b"[]",
        "tensor beyond the end": header(data_offsets=[0, 400]),
        "tensor before the beginning": header(data_offsets=[-4, 8]),
        "shape of another size": header(shape=[4]),
        "no offsets": header(data_offsets=None),
        "a gap": header(data_offsets=[4, 12], shape=[2]),
        "bytes behind the tensors": raw + b"\0" * 4,
    }


@pytest.mark.parametrize("how", _damaged(b"0123456789abc"))
def test_a_damaged_file_is_refused_in_one_line(how, tmp_path):
    save_file({"x": np.zeros(3, np.float32)}, tmp_path / "x.safetensors")
    path = tmp_path / "x.safetensors"
    path.write_bytes(_damaged(path.read_bytes())[how])
    with pytest.raises(InputError, match="is not a readable safetensors file") as refused:
        read_header(path)
    assert "\n" not in str(refused.value)

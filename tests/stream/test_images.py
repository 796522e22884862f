"""Patches equal those of the released image processor, and a patch of a video holds two frames."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxtml.stream.images import image_patches, patch_grid
from tests.oracle import TORCHVISION, oracle_environment

ROOT = Path(__file__).parents[2]
GOLDEN_TOOL = ROOT / "tools" / "goldens" / "make_frontend_golden.py"
TOOL = runpy.run_path(str(GOLDEN_TOOL), run_name="golden")

PADDING = (-1 / 255 - np.array([0.48145466, 0.4578275, 0.40821073])) / np.array([0.26862954, 0.26130258, 0.27577711])


def picture(seed: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("size", TOOL["IMAGE_SIZES"])
def test_patches_are_exactly_those_the_released_processor_gave(size: tuple[int, int]):
    golden = np.load(ROOT / "tests" / "golden" / "frontend.npz")
    name = f"patches_{size[0]}x{size[1]}"
    patches = image_patches(TOOL["golden_image"](*size))
    step = TOOL["PIXEL_STEP"]
    assert patches.dtype == np.float32 and patches.shape == tuple(golden[f"{name}_shape"])
    assert np.array_equal(patches[:, :, ::step, ::step], golden[f"{name}_some"])
    assert TOOL["checksum"](patches) == str(golden[f"{name}_sha256"])


REAL_SIZES = ((360, 640), (480, 640), (40, 40), (1, 1), (41, 39), (33, 401))


@pytest.fixture(scope="module")
def released_patches(tmp_path_factory) -> dict[tuple[int, int], np.ndarray]:
    """The released processor's patches of a picture of each size.

    It runs in a process of its own, because `transformers` behaves differently where torchvision is found.
    """
    pictures, patches = (tmp_path_factory.mktemp("released") / name for name in ("pictures.npz", "patches.npz"))
    np.savez(pictures, *(picture(0, *size) for size in REAL_SIZES))
    code = (
        "import runpy, sys, numpy as np\n"
        "tool, pictures, patches = sys.argv[1:]\n"
        "np.savez(patches, *runpy.run_path(tool)['released_patches'](list(np.load(pictures).values())))"
    )
    command = [sys.executable, "-c", code, str(GOLDEN_TOOL), str(pictures), str(patches)]
    process = subprocess.run(command, env=oracle_environment(TORCHVISION), capture_output=True, text=True)
    if "No module named 'torchvision'" in process.stderr:
        pytest.skip("needs torchvision: pip install torchvision")
    assert process.returncode == 0, process.stderr
    with np.load(patches) as arrays:
        return dict(zip(REAL_SIZES, arrays.values(), strict=True))


@pytest.mark.oracle
@pytest.mark.parametrize("size", REAL_SIZES)
def test_patches_equal_the_released_processor_at_real_sizes(size: tuple[int, int], released_patches):
    assert np.array_equal(image_patches(picture(0, *size)), released_patches[size])


def test_a_360p_frame_is_9_rows_of_17_patches():
    assert patch_grid(360, 640) == (9, 17)
    assert image_patches(picture(1, 360, 640)).shape == (153, 2, 40, 40, 3)


def test_every_row_ends_in_a_patch_with_padding():
    for width in (79, 80, 81):
        rows, columns = patch_grid(50, width)
        last = image_patches(np.full((50, width, 3), 255, np.uint8)).reshape(rows, columns, 2, 40, 40, 3)[:, -1]
        assert np.allclose(last[:, :, :, -1], PADDING, atol=1e-5), width


def test_a_still_picture_is_used_for_both_times():
    patches = image_patches(picture(2, 90, 120))
    assert np.array_equal(patches[:, 0], patches[:, 1])


def test_the_earlier_of_two_frames_comes_first():
    earlier, now = picture(3, 90, 120), picture(4, 90, 120)
    pair = image_patches(np.stack([earlier, now]))
    assert np.array_equal(pair[:, 0], image_patches(earlier)[:, 0])
    assert np.array_equal(pair[:, 1], image_patches(now)[:, 0])


@pytest.mark.parametrize(
    "frames",
    [
        np.zeros((40, 40), np.uint8),
        np.zeros((40, 40, 4), np.uint8),
        np.zeros((3, 40, 40, 3), np.uint8),
        np.zeros((0, 40, 3), np.uint8),
        np.zeros((40, 40, 3), np.float32),
    ],
)
def test_frames_of_another_shape_or_dtype_are_refused(frames: np.ndarray):
    with pytest.raises(ValueError, match="frames are"):
        image_patches(frames)

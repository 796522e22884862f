#!/usr/bin/env python3
"""Makes tests/golden/frontend.npz: the outputs of the released Inkling front end for inputs that anyone can make again.

Needs the `oracle` extra (torch, transformers) and torchvision. The tests compare our bins and patches with these
outputs on machines that have none of these packages. The tests make the inputs with `golden_wave` and `golden_image`
of this file.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from jaxtml.commands.arguments import run_tool, tool_parser
from jaxtml.errors import InputError

SEED = 20261123
GOLDEN = Path(__file__).parents[2] / "tests" / "golden" / "frontend.npz"
IMAGE_SIZES = ((70, 95), (80, 120), (39, 200))  # (height, width): ragged, whole tiles, less than one tile high
PIXEL_STEP = 7  # every seventh pixel of a side is stored beside the checksum, to show how large a difference is


def golden_wave() -> np.ndarray:
    """Returns `[160123]` float32, 10 s: noise that doubles every 7,000 samples, a glide in the middle, silence around.

    The samples are made of integers alone (raw output of the generator, and a triangle from a summed phase), so that
    every machine makes the same samples.
    """
    length, silence = 160_123, 8_000
    time = np.arange(length, dtype=np.int64)
    noise = (np.random.PCG64(SEED).random_raw(length) >> np.uint64(40)).astype(np.int64) - 2**23
    samples = noise >> (24 - 22 * time // length)
    samples[:silence] = 0
    samples[-silence:] = 0
    phase = np.cumsum(200 + time // 8) & 0xFFFF  # 65,536 is one period: the triangle glides from 50 Hz to 5 kHz
    triangle = (np.abs(phase - 32768) - 16384) << 8
    samples[length // 3 : length // 2] += triangle[length // 3 : length // 2]
    return (samples / 2**23).astype(np.float32)


def golden_image(height: int, width: int) -> np.ndarray:
    """Returns `[height, width, 3]` uint8 noise."""
    raw = np.random.PCG64(SEED + height * width).random_raw(height * width * 3)
    return (raw >> np.uint64(56)).astype(np.uint8).reshape(height, width, 3)


def checksum(array: np.ndarray) -> str:
    """Returns the SHA-256 of the array's bytes in C order."""
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def import_torchvision() -> None:
    """Imports torchvision, even if it was built for another version or build of torch than the installed one.

    In that case the compiled operators of torchvision do not load. The import then fails at two operators whose
    shapes torchvision registers. The released image processor calls no operator of torchvision, so this function
    declares the two without an implementation.
    """
    import torch

    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        operators = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            operators.define(f"{name}(Tensor boxes, Tensor scores, float iou_threshold) -> Tensor")
        importlib.import_module("torchvision")


def released_patches(images: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Returns the released processor's `[P, 2, 40, 40, 3]` float32 patches of each `[height, width, 3]` uint8 image."""
    import_torchvision()
    import torch
    from transformers.models.inkling.image_processing_inkling import InklingImageProcessor

    process = InklingImageProcessor()
    tensors = [torch.from_numpy(image).permute(2, 0, 1) for image in images]
    return [process(tensor, return_tensors="pt")["pixel_values"].numpy() for tensor in tensors]


def released_sound() -> dict[str, np.ndarray]:
    """Returns the released log-mels and bins of the golden wave, and bins of values close to the edges of bins."""
    import torch
    from transformers.models.inkling import feature_extraction_inkling, processing_inkling

    extractor = feature_extraction_inkling.InklingFeatureExtractor()
    features = extractor(golden_wave(), sampling_rate=16_000, return_tensors="pt")["input_features"][0]

    # The released processor requires a tokenizer. Its quantiser reads only these three attributes.
    class Quantiser:
        bin_centers = torch.linspace(-7.0, 2.0, 16, dtype=torch.float64).to(torch.float32)
        dmel_min_value, dmel_max_value = -7.0, 2.0

    def bins(log_mel: Any) -> np.ndarray:
        return processing_inkling.InklingProcessor._extract_dmel_bins(Quantiser(), log_mel).numpy().astype(np.uint8)

    middles = np.linspace(-6.7, 1.7, 15).astype(np.float32)
    close = (middles[:, None] + np.arange(-10, 11) * np.spacing(np.abs(middles))[:, None]).astype(np.float32)
    return {
        "wave_sha256": np.array(checksum(golden_wave())),
        "bins": bins(features),
        "close_to_edges": close,
        "close_to_edges_bins": bins(torch.from_numpy(close)),
        "log_mel_every_tenth": features[::10].numpy(),
    }


def make(args: argparse.Namespace) -> None:
    if not args.out.parent.is_dir():
        raise InputError(f"no folder {args.out.parent}: make it first, or give another --out")
    try:
        import_torchvision()
        entries = released_sound()
        images = released_patches([golden_image(*size) for size in IMAGE_SIZES])
    except ImportError as error:
        raise InputError(f"{error}: pip install -e '.[oracle]' torchvision") from error
    versions = [f"{name} {version(name)}" for name in ("torch", "torchvision", "transformers", "numpy")]
    entries["versions"] = np.array(versions)
    for size, patches in zip(IMAGE_SIZES, images, strict=True):
        name = f"patches_{size[0]}x{size[1]}"
        entries[f"{name}_shape"] = np.array(patches.shape)
        entries[f"{name}_sha256"] = np.array(checksum(patches))
        entries[f"{name}_some"] = patches[:, :, ::PIXEL_STEP, ::PIXEL_STEP]
    np.savez_compressed(args.out, allow_pickle=False, **entries)
    print(f"{args.out}: {args.out.stat().st_size} bytes, {', '.join(versions)}")


if __name__ == "__main__":
    parser = tool_parser(__doc__, "tools/goldens/make_frontend_golden.py --out /tmp/frontend.npz")
    parser.add_argument("--out", type=Path, default=GOLDEN, metavar="NPZ", help="default: tests/golden/frontend.npz")
    run_tool(parser, make)

"""Makes tests/golden/frontend.npz: what the released Inkling front end gives for inputs that anyone can make again.

    python tools/goldens/make_frontend_golden.py

Needs the `oracle` extra (torch, torchvision, transformers). The tests then compare to the released bins and patches on
machines that have none of these; they make the inputs with `golden_wave` and `golden_image` of this file.
"""

from __future__ import annotations

import hashlib
from importlib.metadata import version
from pathlib import Path

import numpy as np

SEED = 20261123
GOLDEN = Path(__file__).parents[2] / "tests" / "golden" / "frontend.npz"
IMAGE_SIZES = ((70, 95), (80, 120), (39, 200))  # height, width: ragged, whole tiles, under one tile high
PIXEL_STEP = 7  # of the pixels a side that are stored beside the checksum, to show how far off a change is


def golden_wave() -> np.ndarray:
    """`[160123]` float32, 10 s: noise that doubles every 7,000 samples, a glide in the middle, silence around.

    Made of integers alone (raw generator output, and a triangle from a phase that is summed), so that every machine
    makes the same samples.
    """
    length, silence = 160_123, 8_000
    time = np.arange(length, dtype=np.int64)
    noise = (np.random.PCG64(SEED).random_raw(length) >> np.uint64(40)).astype(np.int64) - 2**23
    samples = noise >> (24 - 22 * time // length)
    samples[:silence] = 0
    samples[-silence:] = 0
    phase = np.cumsum(200 + time // 8) & 0xFFFF  # 65536 a turn: the triangle glides from 50 Hz to 5 kHz
    triangle = (np.abs(phase - 32768) - 16384) << 8
    samples[length // 3 : length // 2] += triangle[length // 3 : length // 2]
    return (samples / 2**23).astype(np.float32)


def golden_image(height: int, width: int) -> np.ndarray:
    """`[height, width, 3]` uint8 noise."""
    raw = np.random.PCG64(SEED + height * width).random_raw(height * width * 3)
    return (raw >> np.uint64(56)).astype(np.uint8).reshape(height, width, 3)


def checksum(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def main() -> None:
    import torch
    from transformers.models.inkling import feature_extraction_inkling, image_processing_inkling, processing_inkling

    extractor = feature_extraction_inkling.InklingFeatureExtractor()
    features = extractor(golden_wave(), sampling_rate=16_000, return_tensors="pt")["input_features"][0]

    # The processor wants a tokenizer; its quantiser reads these three of its attributes.
    class Quantiser:
        bin_centers = torch.linspace(-7.0, 2.0, 16, dtype=torch.float64).to(torch.float32)
        dmel_min_value, dmel_max_value = -7.0, 2.0

    def released_bins(log_mel: torch.Tensor) -> np.ndarray:
        bins = processing_inkling.InklingProcessor._extract_dmel_bins(Quantiser(), log_mel)  # pyright: ignore
        return bins.numpy().astype(np.uint8)

    middles = np.linspace(-6.7, 1.7, 15).astype(np.float32)
    close = (middles[:, None] + np.arange(-10, 11) * np.spacing(np.abs(middles))[:, None]).astype(np.float32)
    entries = {
        "versions": np.array([f"{name} {version(name)}" for name in ("torch", "torchvision", "transformers", "numpy")]),
        "wave_sha256": np.array(checksum(golden_wave())),
        "bins": released_bins(features),
        "close_to_edges": close,
        "close_to_edges_bins": released_bins(torch.from_numpy(close)),
        "log_mel_every_tenth": features[::10].numpy(),
    }
    process = image_processing_inkling.InklingImageProcessor()
    for size in IMAGE_SIZES:
        picture = torch.from_numpy(golden_image(*size)).permute(2, 0, 1)
        patches = process(picture, return_tensors="pt")["pixel_values"].numpy()
        name = f"patches_{size[0]}x{size[1]}"
        entries[f"{name}_shape"] = np.array(patches.shape)
        entries[f"{name}_sha256"] = np.array(checksum(patches))
        entries[f"{name}_some"] = patches[:, :, ::PIXEL_STEP, ::PIXEL_STEP]
    np.savez_compressed(GOLDEN, **entries)
    print(f"{GOLDEN}: {GOLDEN.stat().st_size} bytes, {', '.join(entries['versions'])}")


if __name__ == "__main__":
    main()

"""What a run says of itself: one progress line, the same in `log.jsonl` and in TensorBoard. Called by `train.loop`."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from tensorboardX import SummaryWriter

from jaxtml.config import Config
from jaxtml.model.flops import train_flops_per_token
from jaxtml.parallel.chips import find_chip
from jaxtml.stream.tokens import PositionKind

TOLD = ("loss", "gate", "heard", "text", "flow", "mtp", "heard_right", "text_right")  # in the line; the log has all


class TrainProgress:
    """Means of what the steps since the last line gave, with speed, utilisation, balance of the experts and ETA.

    `MFU = tokens/s x FLOPs per token / (devices x peak FLOP/s)`, with the FLOPs of `model.flops` (6 N and attention,
    nothing for what is computed twice) and the chip's published dense bfloat16 peak. Padding counts as tokens.
    """

    def __init__(self, workdir: Path, config: Config, first: int, devices: int):
        self.workdir, self.config, self.first = workdir, config, first
        self.board = SummaryWriter(str(workdir / "tensorboard"), purge_step=first)
        self.began = self.reported = time.monotonic()
        self.flops = train_flops_per_token(config)
        chip = find_chip(jax.devices()[0].device_kind)
        self.peak = chip.flops / chip.devices * devices if chip else None
        if chip and self.peak:
            logging.info(
                "MFU = tokens/s x %.3g FLOPs per token / (%d devices of %s, %.4g FLOP/s in all)",
                self.flops, devices, chip.name, self.peak,
            )  # fmt: skip

    def report(self, done: int, pending: list[dict[str, Any]]) -> None:
        """One line for the steps up to `done`, whose metrics are `pending` (scalars, and "load" `[L, M, E]`)."""
        now = time.monotonic()
        load = np.sum([np.asarray(m["load"], np.float64) for m in pending], axis=0)
        means = {name: float(np.mean([float(m[name]) for m in pending])) for name in pending[0] if name != "load"}
        balance = balance_of(load)
        rate = len(pending) * self.config.train.batch * self.config.data.tokens / (now - self.reported)
        speed = {"tokens_per_s": round(rate), "step_s": round((now - self.reported) / len(pending), 4)}
        if self.peak:
            speed["mfu"] = round(rate * self.flops / self.peak, 4)
        with (self.workdir / "log.jsonl").open("a") as log:
            told = {"step": done, **speed, **{k: round(v, 5) for k, v in {**means, **balance}.items()}}
            log.write(json.dumps({**told, "load_by_layer": by_layer(load)}) + "\n")
        for name, value in {**means, **balance, **speed}.items():
            self.board.add_scalar(f"train/{name}", value, done)
        for layer, value in enumerate(by_layer(load)):
            self.board.add_scalar(f"load/layer_{layer:02}", value, done)
        eta_min = (self.config.train.steps - done) * (now - self.began) / (done - self.first) / 60
        logging.info(
            "%d/%d  %s  norm %.2f  load %s  %s%.2f s  %.0f tokens/s  %s  ETA %d:%02d",
            done,
            self.config.train.steps,
            "  ".join(f"{name} {means[name]:.3f}" for name in TOLD if name in means),
            means["grad_norm"],
            balance_line(load),
            f"{means['dropped']:.0f} dropped  " if means["dropped"] else "",
            speed["step_s"],
            rate,
            f"MFU {speed['mfu']:.1%}" if self.peak else f"{rate * self.flops / 1e9:.0f} GFLOP/s",
            *divmod(round(eta_min), 60),
        )
        self.reported = now

    def samples(self, done: int, text: str) -> None:
        self.board.add_text("samples", text, done)
        logging.info("samples at step %d\n%s", done, text)

    def close(self) -> None:
        self.board.close()


def balance_of(load: np.ndarray) -> dict[str, float]:
    """The least and the most loaded expert of any layer against the mean, for all tokens and by modality.

    `load` `[L, M, E]`: choices per layer, modality (`PositionKind`) and expert.
    """
    if not load.size:
        return {"load_min": 1.0, "load_max": 1.0}
    found = {"load_min": _against_mean(load.sum(axis=1)).min(), "load_max": _against_mean(load.sum(axis=1)).max()}
    for kind in PositionKind:
        if load[:, kind].any():
            found[f"load_max_{kind.name.lower()}"] = _against_mean(load[:, kind]).max()
    return {name: float(value) for name, value in found.items()}


def balance_line(load: np.ndarray) -> str:
    """`balance_of` in short: least and most loaded expert, in which layer, and that of the least balanced modality."""
    found = balance_of(load)
    line = f"{found['load_min']:.2f}..{found['load_max']:.2f}"
    if not load.size:
        return line
    modality = max((name for name in found if name.startswith("load_max_")), key=lambda name: found[name])
    worst = int(np.argmax(by_layer(load)))
    return f"{line} (layer {worst}; {modality.removeprefix('load_max_')} {found[modality]:.2f})"


def by_layer(load: np.ndarray) -> list[float]:
    """The most loaded expert of each layer against the mean."""
    return [round(float(layer.max()), 3) for layer in _against_mean(load.sum(axis=1))] if load.size else []


def _against_mean(load: np.ndarray) -> np.ndarray:
    """`[L, E]` -> the same in units of each layer's mean."""
    return load / np.maximum(load.mean(axis=-1, keepdims=True), 1e-9)

"""The reports of a run: a progress line, and the same figures in `log.jsonl` and in TensorBoard.

Called by `jaxtml.train.loop`, in the first process only. Names in `log.jsonl` are read by people's scripts: keep them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from absl import logging
from tensorboardX import SummaryWriter

from jaxtml.config import Config
from jaxtml.model.flops import train_flops_per_token
from jaxtml.parallel.chips import find_chip
from jaxtml.strict_json import dumps
from jaxtml.train.balance import balance_text, expert_balance, max_load_by_layer
from jaxtml.train.optimizer import rate_at, schedule
from jaxtml.train.step import Metrics

# The metrics of the progress line; `log.jsonl` has all.
LINE_METRICS = ("loss", "gate", "heard", "text", "flow", "mtp", "heard_right", "text_right", "draft_right")


class TrainProgress:
    """Reports means over the steps since the last report, with speed, utilisation, balance of the experts and ETA.

    `MFU = tokens/s x FLOPs per token / (devices x peak FLOP/s)`. FLOPs are counted by `jaxtml.model.flops`: 6 N and
    attention, and nothing for recomputation. The peak is the chip's published dense bfloat16 peak. Padding counts
    as tokens.
    """

    def __init__(self, workdir: Path, config: Config, first: int, devices: int):
        """Opens the logs of `workdir` for a run on `devices` devices that has done `first` steps."""
        self.workdir, self.config, self.first = workdir, config, first
        self.board = SummaryWriter(str(workdir / "tensorboard"), purge_step=first)
        self.began_s = self.reported_s = time.monotonic()
        self.schedule = schedule(config.train)
        self.flops = train_flops_per_token(config)
        chip = find_chip(jax.devices()[0].device_kind)
        self.peak = chip.flops / chip.devices * devices if chip else None
        if chip and self.peak:
            logging.info(
                "MFU = tokens/s x %.3g FLOPs per token / (%d devices of %s, %.4g FLOP/s in all)",
                self.flops, devices, chip.name, self.peak,
            )  # fmt: skip

    def report(self, done: int, steps: Sequence[Metrics], waited_s: float) -> None:
        """Reports on the last steps of a run.

        Args:
          done: the number of steps that the run has done.
          steps: the metrics of each step since the last report: scalars, and "load" (see `jaxtml.train.balance`).
          waited_s: seconds since the last report for which the devices waited for batches.
        """
        load = np.sum([np.asarray(metrics["load"], np.float64) for metrics in steps], axis=0)
        names = [name for name in steps[0] if name != "load"]
        means = {name: float(np.mean([float(metrics[name]) for metrics in steps])) for name in names}
        now_s = time.monotonic()
        speed = self._speed(len(steps), now_s - self.reported_s) | {"input_wait_s": round(waited_s / len(steps), 4)}
        rate = {"learning_rate": float(f"{rate_at(self.schedule, done - 1):.6g}")}  # of the last update
        self._write_log(done, means | expert_balance(load), speed | rate, load)
        self._write_board(done, means | expert_balance(load) | speed | rate, load)
        eta_min = (self.config.train.steps - done) * (now_s - self.began_s) / (done - self.first) / 60
        logging.info(
            "%d/%d  %s  rate %.3g  norm %.2f  load %s  %s"
            "%.2f s (%.2f waiting for data)  %.0f tokens/s  %s  ETA %d:%02d",
            done,
            self.config.train.steps,
            "  ".join(f"{name} {means[name]:.3f}" for name in LINE_METRICS if name in means),
            rate["learning_rate"],
            means["grad_norm"],
            balance_text(load),
            f"{means['dropped']:.0f} dropped  " if means["dropped"] else "",
            speed["step_s"],
            speed["input_wait_s"],
            speed["tokens_per_s"],
            f"MFU {speed['mfu']:.1%}" if self.peak else f"{speed['tokens_per_s'] * self.flops / 1e9:.0f} GFLOP/s",
            *divmod(round(eta_min), 60),
        )
        self.reported_s = now_s

    def samples(self, done: int, text: str) -> None:
        """Reports the sample conversations after `done` steps."""
        self.board.add_text("samples", text, done)
        logging.info("samples at step %d\n%s", done, text)

    def close(self) -> None:
        """Closes the logs."""
        self.board.close()

    def _speed(self, steps: int, seconds: float) -> dict[str, float]:
        rate = steps * self.config.train.batch * self.config.data.tokens / seconds
        speed = {"tokens_per_s": round(rate), "step_s": round(seconds / steps, 4)}
        return speed | {"mfu": round(rate * self.flops / self.peak, 4)} if self.peak else speed

    def _write_log(self, done: int, metrics: dict[str, float], speed: dict[str, float], load: np.ndarray) -> None:
        line = {"step": done, **speed, **{name: round(value, 5) for name, value in metrics.items()}}
        with (self.workdir / "log.jsonl").open("a") as log:
            log.write(dumps({**line, "load_by_layer": max_load_by_layer(load)}) + "\n")

    def _write_board(self, done: int, figures: dict[str, float], load: np.ndarray) -> None:
        for name, value in figures.items():
            self.board.add_scalar(f"train/{name}", value, done)
        for layer, value in enumerate(max_load_by_layer(load)):
            self.board.add_scalar(f"load/layer_{layer:02}", value, done)

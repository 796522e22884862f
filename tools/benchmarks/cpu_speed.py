#!/usr/bin/env python3
"""Ours against torch `transformers` on this machine's CPU: the same weights, in turn, in one run.

    tools/benchmarks/cpu_speed.py [--config tiny] [--rounds 7] [--json]

Two rows. Training: tokens/s of forward, backward and AdamW on 4 x 512 text tokens. Micro-turn: ms for one session that
reads 6 positions and then generates 6 tokens, one at a time, over its cache. Each round runs ours and theirs one after
the other; reported are medians, and the median of the rounds' ratios, so that other work on the machine hits both.
Needs the `oracle` extra (torch, transformers).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.table import Table

from jaxtml import config as configs
from jaxtml.checkpoint.inkling.vision_folds import default_folds
from jaxtml.checkpoint.source import InMemorySource
from jaxtml.config import Config, VisionConfig
from jaxtml.convert.conversion import write_checkpoint
from jaxtml.model.interaction import InteractionModel
from jaxtml.model.spec import Params, init_params

BATCH, TOKENS = 4, 512
READ, WRITTEN = 6, 6  # positions of a micro-turn: read at once, generated one by one
TURNS = 10  # micro-turns in a row per measurement
STEPS = 2  # training steps in a row per measurement
LEARNING_RATE = 1e-4
TEXT_PARTS = ("embed", "layers", "norm", "unembed")

Run = Callable[[], None]


class Ours:
    """The text path of the interaction model: embedding, backbone, logits."""

    def __init__(self, config: Config, params: Params):
        self.model = InteractionModel(config)
        self.vocab = config.backbone.vocab_size
        self.rest = {k: v for k, v in params.items() if k not in TEXT_PARTS}
        self.params = {k: params[k] for k in TEXT_PARTS}

    def logits(self, params: Params, ids: jax.Array) -> jax.Array:
        trunk = self.model.bind(params | self.rest)
        hidden, _ = self.model.backbone.forward(params["layers"], trunk.embed(ids, jnp.float32))
        return self.model.logits(params, trunk.norm(hidden))

    def training(self, ids: np.ndarray) -> Run:
        optimizer = optax.adamw(LEARNING_RATE)

        def loss(params: Params, ids: jax.Array) -> jax.Array:
            logits = self.logits(params, ids)[:, :-1]
            return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).mean()

        @partial(jax.jit, donate_argnums=(0, 1))
        def step(params: Params, moments: Any, ids: jax.Array) -> tuple[Params, Any, jax.Array]:
            value, grads = jax.value_and_grad(loss)(params, ids)
            updates, moments = optimizer.update(grads, moments, params)
            return cast(Params, optax.apply_updates(params, updates)), moments, value

        params = jax.tree.map(jnp.copy, self.params)
        state = [params, optimizer.init(params)]
        batch = jnp.asarray(ids)

        def run() -> None:
            for _ in range(STEPS):
                *state[:], value = step(*state, batch)
            value.block_until_ready()

        return run

    def micro_turns(self, ids: np.ndarray) -> Run:
        """One compiled program per micro-turn, state donated, as `duplex_step` does it."""
        backbone = self.model.backbone
        serving = {**self.params, "layers": backbone.prepare_for_serving(self.params["layers"])}

        def forward(params: Params, state: Any, position: jax.Array, ids: jax.Array) -> tuple[Any, jax.Array]:
            trunk = self.model.bind(params | self.rest)
            length = jnp.full((1,), ids.shape[1], jnp.int32)
            hidden, state = backbone.forward_cached(
                params["layers"], trunk.embed(ids, jnp.float32), state, position, length
            )
            return state, jnp.argmax(self.model.logits(params, trunk.norm(hidden[:, -1])), axis=-1)

        @partial(jax.jit, donate_argnums=1)
        def turn(params: Params, state: Any, position: jax.Array, ids: jax.Array) -> tuple[Any, jax.Array, jax.Array]:
            state, token = forward(params, state, position, ids)
            position = position + READ

            def one(_: int, carry: tuple) -> tuple:
                state, position, token = carry
                state, token = forward(params, state, position, token[:, None])
                return state, position + 1, token

            return jax.lax.fori_loop(0, WRITTEN, one, (state, position, token))

        read = jnp.asarray(ids[:1, :READ])

        def run() -> None:
            state, position = backbone.init_state(1, READ, jnp.float32), jnp.zeros((1,), jnp.int32)
            state = jax.tree.map(jnp.copy, state)
            for _ in range(TURNS):
                state, position, token = turn(serving, state, position, read)
            token.block_until_ready()

        return run


class Theirs:
    """`transformers`' Inkling, eager attention, float32, as many threads as torch takes by itself."""

    def __init__(self, directory: str):
        import torch
        from transformers import InklingForConditionalGeneration

        self.torch = torch
        self.model: Any = InklingForConditionalGeneration.from_pretrained(
            directory, attn_implementation="eager", dtype="float32"
        )

    def logits(self, ids: np.ndarray) -> np.ndarray:
        with self.torch.no_grad():
            return self.model.eval()(input_ids=self.torch.from_numpy(ids), use_cache=False).logits.numpy()

    def training(self, ids: np.ndarray) -> Run:
        torch = self.torch
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE)
        batch = torch.from_numpy(ids)

        def run() -> None:
            self.model.train()
            for _ in range(STEPS):
                logits = self.model(input_ids=batch, use_cache=False).logits[:, :-1]
                loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()

        return run

    def micro_turns(self, ids: np.ndarray) -> Run:
        torch = self.torch
        read = torch.from_numpy(ids[:1, :READ])

        def run() -> None:
            self.model.eval()
            cache = None
            with torch.no_grad():
                for _ in range(TURNS):
                    given = read
                    for _ in range(1 + WRITTEN):
                        out = self.model(input_ids=given, past_key_values=cache, use_cache=True, logits_to_keep=1)
                        cache, given = out.past_key_values, out.logits[:, -1:].argmax(-1)

        return run


def seconds(run: Run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def compare(ours: Run, theirs: Run, rounds: int, amount: float) -> dict[str, float]:
    """Medians of `amount` per second on either side, and of the ratio of neighbouring runs."""
    ours()
    theirs()
    pairs = [(seconds(ours), seconds(theirs)) for _ in range(rounds)]
    return {
        "ours": amount / statistics.median(a for a, _ in pairs),
        "torch": amount / statistics.median(b for _, b in pairs),
        "ratio": statistics.median(b / a for a, b in pairs),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="tiny")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    args = parser.parse_args()
    # transformers knows vision towers of Inkling's own widths alone; this run has no images
    config = dataclasses.replace(configs.load(args.config), vision=VisionConfig(default_folds(2)))
    params = init_params(InteractionModel(config).specs(), 0)
    ids = np.random.default_rng(0).integers(0, config.backbone.vocab_size, (BATCH, TOKENS))
    ours = Ours(config, params)
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(InMemorySource(config, params), Path(folder), "memory", "hf", "float32")
        theirs = Theirs(folder)
    reference = theirs.logits(ids)
    error = np.linalg.norm(jax.jit(ours.logits)(ours.params, jnp.asarray(ids)) - reference) / np.linalg.norm(reference)

    training = compare(ours.training(ids), theirs.training(ids), args.rounds, STEPS * BATCH * TOKENS)
    turns = compare(ours.micro_turns(ids), theirs.micro_turns(ids), args.rounds, TURNS)
    result = {"logits_relative_error": float(error), "training_tokens_per_s": training, "micro_turns_per_s": turns}
    if args.json:
        print(json.dumps(result))
        return 0
    table = Table(title=f"{config.name}: the same weights (logits differ by {error:.1e})")
    for column in ("", "ours", "torch transformers", "ratio"):
        table.add_column(column, justify="right")
    table.add_row(
        f"training, {BATCH} x {TOKENS} (tokens/s)",
        *(f"{training[k]:.0f}" for k in ("ours", "torch")),
        f"{training['ratio']:.2f}x",
    )
    table.add_row(
        f"micro-turn, {READ} + {WRITTEN} (ms)",
        *(f"{1e3 / turns[k]:.1f}" for k in ("ours", "torch")),
        f"{turns['ratio']:.2f}x",
    )
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""Compares our speed on this machine's CPU with that of torch `transformers`, for the same weights.

The benchmark measures two things:

- Training: tokens per second of forward pass, backward pass and AdamW, on 4 x 512 text tokens.
- Micro-turn: milliseconds in which one session reads 6 positions at once and then generates 6 tokens one by one, with
  a cache. Only the backbone and the logits are measured. A real micro-turn also has a flow head and a vocoder.

Each round runs our side and then the other side, so that other work on the machine disturbs both. The result has the
median of each side and the median of the rounds' ratios. Before the rounds, the benchmark compares the logits of both
sides and prints their relative difference.

Needs the `oracle` extra (torch and transformers).
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
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
from jaxtml.commands.arguments import count, run_tool, tool_parser
from jaxtml.config import Config, VisionConfig
from jaxtml.convert.conversion import write_checkpoint
from jaxtml.errors import InputError
from jaxtml.model.interaction import InteractionModel
from jaxtml.model.spec import Params, init_params
from jaxtml.strict_json import dumps

BATCH, TOKENS = 4, 512
READ, WRITTEN = 6, 6  # positions of a micro-turn that are read at once, and tokens that are generated one by one
MICRO_TURNS = 10  # in a row in each measurement
STEPS = 2  # training steps in a row in each measurement
LEARNING_RATE = 1e-4
TEXT_PARTS = ("embed", "layers", "norm", "unembed")  # parameters of the text path

Run = Callable[[], None]


class Ours:
    """The text path of the interaction model: embedding, backbone and logits."""

    def __init__(self, config: Config, params: Params):
        self.model = InteractionModel(config)
        self.other_params = {name: value for name, value in params.items() if name not in TEXT_PARTS}
        self.params = {name: params[name] for name in TEXT_PARTS}

    def logits(self, params: Params, ids: jax.Array) -> jax.Array:
        """Returns `[B, T, V]` float32 logits for `[B, T]` ids."""
        trunk = self.model.bind(params | self.other_params)
        hidden, _ = self.model.backbone.forward(params["layers"], trunk.embed(ids, jnp.float32))
        return self.model.logits(params, trunk.norm(hidden))

    def training(self, ids: np.ndarray) -> Run:
        """Returns a function that runs `STEPS` training steps on `[B, T]` ids."""
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
        """Returns a function that runs `MICRO_TURNS` micro-turns of one session.

        As in `jaxtml.model.duplex`, a micro-turn is one compiled program, and its state is donated.
        """
        backbone = self.model.backbone
        serving = {**self.params, "layers": backbone.prepare_for_serving(self.params["layers"])}

        def forward(params: Params, state: Any, position: jax.Array, ids: jax.Array) -> tuple[Any, jax.Array]:
            trunk = self.model.bind(params | self.other_params)
            length = jnp.full((1,), ids.shape[1], jnp.int32)
            hidden, state = backbone.forward_cached(
                params["layers"], trunk.embed(ids, jnp.float32), state, position, length
            )
            return state, jnp.argmax(self.model.logits(params, trunk.norm(hidden[:, -1])), axis=-1)

        @partial(jax.jit, donate_argnums=1)
        def micro_turn(params: Params, state: Any, position: jax.Array, ids: jax.Array) -> tuple:
            state, token = forward(params, state, position, ids)

            def write_token(_: int, carry: tuple) -> tuple:
                state, position, token = carry
                state, token = forward(params, state, position, token[:, None])
                return state, position + 1, token

            return jax.lax.fori_loop(0, WRITTEN, write_token, (state, position + READ, token))

        read = jnp.asarray(ids[:1, :READ])

        def run() -> None:
            # A copy, because the step donates the arrays of its state: they cannot be used again.
            state = jax.tree.map(jnp.copy, backbone.init_state(1, READ, jnp.float32))
            position = jnp.zeros((1,), jnp.int32)
            for _ in range(MICRO_TURNS):
                state, position, token = micro_turn(serving, state, position, read)
            token.block_until_ready()

        return run


class Theirs:
    """Inkling of `transformers`: eager attention, float32, with torch's own number of threads."""

    def __init__(self, directory: str):
        try:
            import torch
            from transformers import InklingForConditionalGeneration
        except ImportError as error:
            raise InputError(f"torch or transformers is missing ({error}): pip install -e '.[oracle]'") from error
        self.torch = torch
        self.model: Any = InklingForConditionalGeneration.from_pretrained(
            directory, attn_implementation="eager", dtype="float32"
        )

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """Returns `[B, T, V]` float32 logits for `[B, T]` ids."""
        with self.torch.no_grad():
            return self.model.eval()(input_ids=self.torch.from_numpy(ids), use_cache=False).logits.numpy()

    def training(self, ids: np.ndarray) -> Run:
        """Returns a function that runs `STEPS` training steps on `[B, T]` ids."""
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
        """Returns a function that runs `MICRO_TURNS` micro-turns of one session."""
        torch = self.torch
        read = torch.from_numpy(ids[:1, :READ])

        def run() -> None:
            self.model.eval()
            cache = None
            with torch.no_grad():
                for _ in range(MICRO_TURNS):
                    tokens = read
                    for _ in range(1 + WRITTEN):
                        out = self.model(input_ids=tokens, cache=cache, use_cache=True, logits_to_keep=1)
                        cache, tokens = out.cache, out.logits[:, -1:].argmax(-1)

        return run


def seconds(run: Run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def compare(ours: Run, theirs: Run, rounds: int, amount: float) -> dict[str, float]:
    """Returns the median speed of each side, and the median of the ratios of neighbouring runs.

    A run does `amount` units of work (tokens or micro-turns). Speeds are in units per second.
    """
    for run in (ours, theirs):  # compiles and warms up
        run()
    pairs = [(seconds(ours), seconds(theirs)) for _ in range(rounds)]
    return {
        "ours": amount / statistics.median(a for a, _ in pairs),
        "torch": amount / statistics.median(b for _, b in pairs),
        "ratio": statistics.median(b / a for a, b in pairs),
    }


def measure(config: Config, rounds: int) -> dict[str, Any]:
    """Returns the difference of the logits and the speeds of training and of micro-turns."""
    params = init_params(InteractionModel(config).specs(), 0)
    ids = np.random.default_rng(0).integers(0, config.backbone.vocab_size, (BATCH, TOKENS))
    ours = Ours(config, params)
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(InMemorySource(config, params), Path(folder), "memory", "hf", "float32")
        theirs = Theirs(folder)
    reference = theirs.logits(ids)
    error = np.linalg.norm(jax.jit(ours.logits)(ours.params, jnp.asarray(ids)) - reference) / np.linalg.norm(reference)
    return {
        "logits_relative_error": float(error),
        "training_tokens_per_s": compare(ours.training(ids), theirs.training(ids), rounds, STEPS * BATCH * TOKENS),
        "micro_turns_per_s": compare(ours.micro_turns(ids), theirs.micro_turns(ids), rounds, MICRO_TURNS),
    }


def show(name: str, result: dict[str, Any]) -> None:
    training, micro_turns = result["training_tokens_per_s"], result["micro_turns_per_s"]
    table = Table(title=f"{name}: the same weights (logits differ by {result['logits_relative_error']:.1e})")
    for column in ("", "ours", "torch transformers", "ratio"):
        table.add_column(column, justify="right")
    table.add_row(
        f"training, {BATCH} x {TOKENS} (tokens/s)",
        *(f"{training[side]:.0f}" for side in ("ours", "torch")),
        f"{training['ratio']:.2f}x",
    )
    table.add_row(
        f"micro-turn, {READ} + {WRITTEN} (ms)",
        *(f"{1e3 / micro_turns[side]:.1f}" for side in ("ours", "torch")),
        f"{micro_turns['ratio']:.2f}x",
    )
    Console().print(table)


def benchmark(args: argparse.Namespace) -> None:
    # `transformers` supports only the vision tower widths of Inkling. No image is used here.
    config = dataclasses.replace(configs.load(args.config), vision=VisionConfig(default_folds(2)))
    result = measure(config, args.rounds)
    if args.json:
        print(dumps(result))
    else:
        show(config.name, result)


if __name__ == "__main__":
    parser = tool_parser(__doc__, "tools/benchmarks/cpu_speed.py --rounds 1")
    parser.add_argument("--config", default="tiny", help="a name in configs/, or a path (default: tiny)")
    parser.add_argument("--rounds", type=count, default=7, help="pairs of runs (default: 7)")
    parser.add_argument("--json", action="store_true", help="print one JSON object to stdout")
    run_tool(parser, benchmark)

"""Fixtures that all tests share: one small model, its codec, conversations, and compiled steps.

The small model has every kind of layer, and attention windows that wrap within a second. It is compiled once per run.
Compiled programs are kept in one persistent cache per run, which several tests and several processes read.

The tests compile without the optimisers of XLA and LLVM. These took two thirds of a run, for programs that then run for
milliseconds. `XLA_FLAGS= tools/test` tests the programs as users run them.
"""

from __future__ import annotations

import gc
import os

# A program is not split into parts that are compiled in parallel: the tests keep all cores busy anyway.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1",
)

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtml.checkpoint.source import InMemorySource
from jaxtml.config import (
    AttentionConfig,
    BackboneConfig,
    Config,
    DataConfig,
    DuplexConfig,
    FlowConfig,
    ServeConfig,
    TrainConfig,
    VisionConfig,
    VocoderConfig,
    validate,
)
from jaxtml.convert.conversion import write_checkpoint
from jaxtml.data.rows import pad
from jaxtml.model.duplex.programs import Duplex
from jaxtml.model.interaction import InteractionModel
from jaxtml.model.spec import Params, init_params
from jaxtml.session.engine import Engine
from jaxtml.session.slots import Slots
from jaxtml.stream.conversation import Conversation, Speech, Word
from jaxtml.stream.encoding import encode
from jaxtml.stream.text import TextCodec
from jaxtml.stream.timebase import MICRO_TURN_SAMPLES
from tests.not_run import (  # noqa: F401  # hooks of pytest
    pytest_deselected,
    pytest_sessionfinish,
    pytest_terminal_summary,
    pytest_testnodedown,
)
from tests.oracle import pytest_runtest_setup  # noqa: F401
from tests.order import pytest_collection_modifyitems  # noqa: F401

jax.config.update("jax_num_cpu_devices", 8)  # for meshes; a program without a mesh runs on the first device

# Tracing makes millions of objects that live on. With Python's thresholds of 700 objects, the garbage collector visits
# them again and again, which takes a third of the time of tracing and lowering.
gc.set_threshold(100_000, 20, 50)

WAVE_TURNS = 14
SLOTS = 4  # slots of the shared compiled step
WORDS = ("the", "number", "is", "forty", "two", "a", "sky", "café")  # each is two or more tokens; café is six


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory) -> Iterator[None]:
    """A folder for the compiled programs of this run, shared by its processes and by the processes that tests start."""
    base = tmp_path_factory.getbasetemp()  # each process of pytest-xdist has its own, inside a folder that they share
    folder = str((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "compiled")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
    jax.config.update("jax_compilation_cache_dir", folder)
    yield
    del os.environ["JAX_COMPILATION_CACHE_DIR"]


def small_config() -> Config:
    """Returns the small model's config: sliding and global layers, dense and MoE layers, a repeated block of layers.

    The window of the sliding layers is about as long as a micro-turn. Global layers retain the text of about three
    micro-turns.
    """
    return Config(
        name="small_test",
        backbone=BackboneConfig(
            vocab_size=300,
            d_model=32,
            n_layers=5,
            n_dense=1,
            global_layers=(2, 4),
            sliding=AttentionConfig(n_heads=2, n_kv_heads=1, head_dim=16, window=12, rel_extent=8),
            global_=AttentionConfig(
                n_heads=4, n_kv_heads=2, head_dim=8, window=40, rel_extent=24, pinned=3, retained=20
            ),
            d_ff_dense=48,
            d_ff_expert=24,
            n_experts=4,
            experts_per_token=2,
            n_shared_experts=1,
            logits_divisor=1.5,
            log_scaling_floor=16,
            route_scale=2.0,
            init_std=0.2,
        ),
        duplex=DuplexConfig(control_base=280, max_typed=4, max_patches=2, max_heard=3, max_text=3),
        flow=FlowConfig(width=16, depth=1, draws=2, steps=2),
        vision=VisionConfig(folds=((1, 5, 4), (1, 2, 8), (1, 4, 16), (2, 1, 0))),
        vocoder=VocoderConfig(width=8, depth=2, expansion=2, kernel=3),
        data=DataConfig(turns=12, tokens=128),
        train=TrainConfig(batch=2, warmup=2, learning_rate=3e-3),
        serve=ServeConfig(background_text=True),
    )


def lively_params(config: Config, seed: int = 0) -> Params:
    """Returns initial parameters with noise on all of them except the vocoder's.

    Some parameters start at zero or one: the embeddings of the clock and of the model's own speech, the gates of the
    flow head, scales, biases. With the noise they change the outputs, so a test notices if a parameter is not used.
    """
    params = init_params(InteractionModel(config).specs(), seed)
    rng = np.random.default_rng(seed)

    def noisy(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        if path[0].key == "vocoder":
            return leaf
        return jnp.asarray(np.asarray(leaf) + np.float32(0.1) * rng.standard_normal(leaf.shape, np.float32))

    return jax.tree_util.tree_map_with_path(noisy, params)


@pytest.fixture(scope="session")
def compilations() -> list[str]:
    """A list that grows by one with every program that XLA compiles or takes from the persistent cache."""
    seen: list[str] = []

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        del duration_secs
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    return seen


@pytest.fixture(scope="session")
def small() -> Config:
    config = small_config()
    validate(config)
    return config


@pytest.fixture(scope="session")
def releasable(small) -> Config:
    """The small config, changed so that Inkling's released config format can express it, with two prediction heads."""
    # Inkling has one number for the window and the relative extent of sliding layers.
    sliding = replace(small.backbone.sliding, rel_extent=small.backbone.sliding.window)
    return replace(small, backbone=replace(small.backbone, sliding=sliding, mtp_heads=2, mtp_global=(1,)))


@pytest.fixture(scope="session")
def release(releasable, lively, tmp_path_factory) -> Path:
    """The directory of a small checkpoint in Inkling's released format, in bfloat16."""
    folder = tmp_path_factory.mktemp("release") / "hf"
    write_checkpoint(InMemorySource(releasable, lively(releasable)), folder, "memory", "hf", "bfloat16")
    return folder


@pytest.fixture(scope="session")
def lively() -> Callable[[Config], Params]:
    """`lively_params`, for tests that need a config other than the small one."""
    return lively_params


@pytest.fixture(scope="session")
def params(small) -> Params:
    """Float32 parameters of the small model, stacked as in training."""
    return lively_params(small)


@pytest.fixture(scope="session")
def codec() -> TextCodec:
    """A codec with a token for each byte and for the commonest pairs: it can write any text, in many tokens."""
    return TextCodec.train(["the number is forty two"] * 3, 270)


def random_talk(seed: int, turns: int = 16) -> Conversation:
    """Returns a valid conversation of noise, with random words, stretches of speech, typed text and frames."""
    rng = np.random.default_rng(seed)
    samples = turns * MICRO_TURN_SAMPLES
    user = (0.1 * rng.standard_normal(samples) * np.repeat(rng.random(turns) < 0.5, MICRO_TURN_SAMPLES)).astype(
        np.float32
    )
    assistant = np.zeros(samples, np.float32)
    ends = np.sort(rng.uniform(0.3, turns * 0.2, int(rng.integers(0, turns))))
    user_words = tuple(Word(WORDS[int(rng.integers(len(WORDS)))], float(end) - 0.2, float(end)) for end in ends)
    edges = np.sort(rng.choice(turns + 1, 2 * int(rng.integers(0, 4)), replace=False)).tolist()
    speech = []
    for start, end in zip(edges[::2], edges[1::2], strict=True):
        heard = slice((start + 1) * MICRO_TURN_SAMPLES, (end + 1) * MICRO_TURN_SAMPLES)
        assistant[heard] = 0.1 * rng.standard_normal(len(assistant[heard]))
        begins = np.sort(rng.uniform(0.2 * (start + 1), 0.2 * (end + 1), int(rng.integers(0, 2 * (end - start)))))
        words = tuple(Word(WORDS[int(rng.integers(len(WORDS)))], float(b), float(b) + 0.1) for b in begins)
        speech.append(Speech(start, end, words))
    typed = rng.choice(turns, int(rng.integers(0, 4)), replace=False).tolist()
    seen = rng.choice(turns, int(rng.integers(0, 4)), replace=False).tolist()
    pictures = [rng.integers(0, 256, (2, 40, int(rng.choice([20, 40])), 3), dtype=np.uint8) for _ in seen]
    return Conversation(
        user=user,
        assistant=assistant,
        user_words=user_words,
        speech=tuple(speech),
        typed=tuple((turn, "ok") for turn in typed),
        frames=tuple(zip(seen, pictures, strict=True)),
        clock_s=float(rng.integers(0, 10_000)),
        wall_clock_s=float(rng.uniform(1.7e9, 2.0e9)),
    )


@pytest.fixture(scope="session")
def talk() -> Callable[..., Conversation]:
    """`random_talk`, called as `talk(seed, turns)`."""
    return random_talk


@pytest.fixture(scope="session")
def random_batch(codec) -> Callable[[Config, Iterable[int]], dict[str, np.ndarray]]:
    """Makes a training batch of random conversations, one row per seed. Called as `random_batch(config, seeds)`."""

    def make(config: Config, seeds: Iterable[int]) -> dict[str, np.ndarray]:
        tokens = config.data.tokens
        talks = [random_talk(seed, config.data.turns) for seed in seeds]
        encoded = [encode(talk, codec, config.duplex, max_tokens=tokens, max_speech=tokens // 3) for talk in talks]
        rows = [pad(conversation, config) for conversation in encoded]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    return make


@pytest.fixture(scope="session")
def engine(small, params, codec) -> Engine:
    """The small model with greedy sampling. All tests share its compiled steps, which also return the logits."""
    duplex = Duplex(InteractionModel(small), trace=True)
    return Engine(small, codec, jax.jit(duplex.prepare)(params), duplex)


@pytest.fixture(scope="session")
def step(engine):
    """The compiled step of one micro-turn of `SLOTS` sessions."""
    return engine.compiled_step(SLOTS)


@pytest.fixture(scope="session")
def compiled(engine) -> Slots:
    """The slots of the small model, in buckets of 1, 2 and 4, compiled once per run. Tests use `slots` instead."""
    return Slots(engine, 4, (1, 2))


@pytest.fixture
def slots(compiled) -> Iterator[Slots]:
    """Four empty slots of the small model. Sessions that a test does not end are ended after the test."""
    yield compiled
    for session in list(compiled.live):
        compiled.end(session)


@pytest.fixture(scope="session")
def wave() -> np.ndarray:
    """Noise for 14 micro-turns."""
    return (0.1 * np.random.default_rng(4).standard_normal(WAVE_TURNS * MICRO_TURN_SAMPLES)).astype(np.float32)

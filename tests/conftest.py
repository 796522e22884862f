"""One small model for all tests: every kind of layer, windows that wrap within a second, compiled once per run.

Programs that several tests (or several processes of one test) compile come from one persistent cache per run. Two
thirds of a run were XLA's and LLVM's optimisers, over programs that then run for milliseconds: without them the suite
takes half as long. Set `XLA_FLAGS` yourself (to nothing) to test the programs as users run them.
"""

from __future__ import annotations

import os

os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false")

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtml.config import (
    AttentionConfig,
    BackboneConfig,
    Config,
    DataConfig,
    DuplexConfig,
    FlowConfig,
    TrainConfig,
    VisionConfig,
    VocoderConfig,
    validate,
)
from jaxtml.model.duplex.programs import Duplex
from jaxtml.model.interaction import InteractionModel
from jaxtml.model.spec import Params, init_params
from jaxtml.session.engine import Engine
from jaxtml.session.slots import Slots
from jaxtml.stream.conversation import Conversation, Speech, Word
from jaxtml.stream.text import TextCodec
from jaxtml.stream.timebase import MICRO_TURN_SAMPLES

jax.config.update("jax_num_cpu_devices", 8)  # meshes; a program without one runs on the first

WAVE_TURNS = 14
SLOTS = 4  # sessions of the shared compiled step
WORDS = ("the", "number", "is", "forty", "two", "a", "sky", "café")  # two or more tokens each, café six


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory) -> Iterator[None]:
    """Compiled programs of this run, shared by its processes and with those that they start."""
    base = tmp_path_factory.getbasetemp()  # of pytest-xdist's processes each has its own, in one that they share
    folder = str((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "compiled")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
    jax.config.update("jax_compilation_cache_dir", folder)
    yield
    del os.environ["JAX_COMPILATION_CACHE_DIR"]


def small_config() -> Config:
    """Sliding and global layers, dense and MoE, a stack that repeats; a micro-turn is about as long as a window."""
    return Config(
        name="small_test",
        backbone=BackboneConfig(
            vocab_size=300,
            d_model=32,
            n_layers=5,
            n_dense=1,
            global_layers=(2, 4),
            sliding=AttentionConfig(n_heads=2, n_kv_heads=1, head_dim=16, window=12, rel_extent=8),
            global_=AttentionConfig(n_heads=4, n_kv_heads=2, head_dim=8, window=40, rel_extent=24, pinned=3),
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
    )


def lively_params(config: Config, seed: int = 0) -> Params:
    """Initial parameters with noise on all but the vocoder: what starts at zero or one (clock, own voice, gates of the
    flow head, scales, biases) must show in the outputs, or a test could not see it missing."""
    params = init_params(InteractionModel(config).specs(), seed)
    rng = np.random.default_rng(seed)

    def noisy(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        if path[0].key == "vocoder":
            return leaf
        return jnp.asarray(np.asarray(leaf) + np.float32(0.1) * rng.standard_normal(leaf.shape, np.float32))

    return jax.tree_util.tree_map_with_path(noisy, params)


@pytest.fixture(scope="session")
def compilations() -> list[str]:
    """Grows by one with every program that XLA compiles, or takes from the persistent cache, from now on."""
    seen: list[str] = []

    def listen(event: str, duration_s: float, **_: Any) -> None:
        del duration_s
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
def lively() -> Callable[[Config], Params]:
    """`lively_params`, for tests that need another config than the small one."""
    return lively_params


@pytest.fixture(scope="session")
def params(small) -> Params:
    """Float32 parameters, stacked as training has them."""
    return lively_params(small)


@pytest.fixture(scope="session")
def codec() -> TextCodec:
    """A token a byte, but for the commonest pairs: any text can be written, words are long."""
    return TextCodec.train(["the number is forty two"] * 3, 270)


def random_talk(seed: int, turns: int = 16) -> Conversation:
    """A conversation of noise with random words, stretches of speech, typed text and frames, in the rules of one."""
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
    """`talk(seed, turns)`: see `random_talk`."""
    return random_talk


@pytest.fixture(scope="session")
def engine(small, params, codec) -> Engine:
    """The small model, greedy; its compiled steps keep the logits and are shared by all tests."""
    duplex = Duplex(InteractionModel(small), trace=True)
    return Engine(small, codec, jax.jit(duplex.prepare)(params), duplex)


@pytest.fixture(scope="session")
def step(engine):
    """One micro-turn of `SLOTS` sessions, compiled."""
    return engine.step(SLOTS)


@pytest.fixture(scope="session")
def compiled(engine) -> Slots:
    """Slots of the small model in buckets of 1, 2 and 4, compiled once."""
    return Slots(engine, 4, (1, 2))


@pytest.fixture
def slots(compiled) -> Iterator[Slots]:
    yield compiled
    for session in list(compiled.live):
        compiled.end(session)


@pytest.fixture(scope="session")
def wave() -> np.ndarray:
    """Noise for 14 micro-turns."""
    return (0.1 * np.random.default_rng(4).standard_normal(WAVE_TURNS * MICRO_TURN_SAMPLES)).astype(np.float32)

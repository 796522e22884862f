"""A loaded model ready to converse: compiled steps per batch size, and what a micro-turn's tokens mean in words.

Called by `converse`, the trainer's samples and the evaluations. Nothing here knows of files of sound or of networks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxtml.config import Config
from jaxtml.model.duplex.programs import Duplex
from jaxtml.model.duplex.state import DuplexState, MicroTurnInputs, MicroTurnOutputs
from jaxtml.model.interaction import InteractionModel
from jaxtml.model.placement import Placement, partition_specs
from jaxtml.model.spec import Params, ParamSpec
from jaxtml.parallel.mesh import SERVE, MeshShape, make_mesh
from jaxtml.stream.dmel import DmelStream
from jaxtml.stream.layout import plan_typed
from jaxtml.stream.reading import Reader
from jaxtml.stream.text import TextCodec
from jaxtml.stream.timebase import MICRO_TURN_MS, MICRO_TURN_SAMPLES
from jaxtml.stream.tokens import Control

if TYPE_CHECKING:
    from jaxtml.checkpoint.source import ParameterSource


@dataclass(frozen=True)
class MicroTurn:
    """One micro-turn of one session, in words.

    `t_ms` is when its input began; what it says is heard in `[t_ms + 200, t_ms + 400)`. `heard`, `text` and
    `delegate` are the pieces of text that this micro-turn added.
    """

    t_ms: int
    gate: str
    p_speak: float
    heard: str
    text: str
    delegate: str
    step_ms: float


@dataclass(frozen=True)
class Reply:
    """What one session gave: `wave` `[N]` float32 on the clock of its input, and a record per micro-turn."""

    wave: np.ndarray
    turns: tuple[MicroTurn, ...]

    @property
    def heard(self) -> str:
        return " ".join("".join(turn.heard for turn in self.turns).split())

    @property
    def text(self) -> str:
        return " ".join("".join(turn.text for turn in self.turns).split())


@dataclass(frozen=True)
class SlotInput:
    """What one session is given for a micro-turn: `bins` `[4, 80]` uint8, text as token ids behind a TYPED or
    BACKGROUND `mark`, `patches` `[P, 2, 40, 40, 3]` float32."""

    bins: np.ndarray
    text: tuple[int, ...] = ()
    mark: Control = Control.TYPED
    patches: np.ndarray | None = None


@dataclass
class Engine:
    """Model, parameters and compiled steps. Thread-safe as long as one thread steps.

    On a mesh of several processes, each has an engine, and all call the same in the same order.
    """

    config: Config
    codec: TextCodec
    params: Params
    duplex: Duplex
    mesh: Mesh | None = None  # None: one device
    _steps: dict[int, Any] = field(default_factory=dict)

    @classmethod
    def create(cls, config: Config, params: Params, codec: TextCodec) -> Engine:
        duplex = Duplex(InteractionModel(config, Placement(int8=config.serve.int8_experts)))
        return cls(config, codec, jax.jit(duplex.prepare)(params), duplex)

    @classmethod
    def load(cls, directory: str | Path, shape: MeshShape = MeshShape()) -> Engine:
        """Reads any checkpoint that `jaxtml convert` does, on a mesh each process what its own devices hold.

        Raises:
          InputError: as `open_checkpoint` and `TextCodec.load`; a mesh that is not that of the devices, or cannot share
          a
            parameter.
        """
        from jaxtml.checkpoint.files import TOKENIZER
        from jaxtml.checkpoint.opening import open_checkpoint, read_checkpoint

        tokenizer = Path(directory) / TOKENIZER
        if shape.devices == 1:
            return cls.create(*read_checkpoint(directory), TextCodec.load(tokenizer))
        return cls._on_mesh(open_checkpoint(directory), TextCodec.load(tokenizer), shape)

    @classmethod
    def _on_mesh(cls, source: ParameterSource, codec: TextCodec, shape: MeshShape) -> Engine:
        from jaxtml.checkpoint.source import place_parameters

        config, mesh = source.config, make_mesh(shape)
        placement = Placement(shape, config.serve.transport, int8=config.serve.int8_experts)
        duplex = Duplex(InteractionModel(config, placement))
        table = InteractionModel(config).serving_specs()

        def one(spec: ParamSpec, at: PartitionSpec) -> jax.ShapeDtypeStruct:
            dtype = np.float32 if "router" in spec.axes else duplex.dtype
            return jax.ShapeDtypeStruct(spec.shape, dtype, sharding=NamedSharding(mesh, at))

        shapes = jax.tree.map(one, table, partition_specs(table, shape, SERVE))
        with jax.set_mesh(mesh):
            held = jax.tree.map(partial(NamedSharding, mesh), duplex.layouts()[0])
            donated = () if placement.int8 else 0  # int8 has no use for the place of larger numbers
            prepare = jax.jit(duplex.prepare, out_shardings=held, donate_argnums=donated)
            return cls(config, codec, prepare(place_parameters(source, shapes)), duplex, mesh)

    def step(self, batch: int) -> Any:
        """The compiled step for `batch` slots; compiled at the first call."""
        if batch not in self._steps:
            with self._set_mesh():
                self._steps[batch] = self.duplex.compiled(self.params, batch, self.mesh)
        return self._steps[batch]

    def state(self, batch: int) -> DuplexState:
        """Of `batch` sessions that have not begun."""
        make = partial(self.duplex.init_state, batch)
        return make() if self.mesh is None else self.compiled(make)()

    def compiled(self, make: Callable[..., DuplexState], *shapes: Any, donated: tuple[int, ...] = ()) -> Any:
        """What makes one state of others, compiled ahead of time for `shapes`."""
        run: Any = make
        if self.mesh is not None:  # sessions travel: which way is the compiler's business
            run = jax.sharding.auto_axes(make, out_sharding=self.duplex.layouts()[1])
        with self._set_mesh():
            return jax.jit(run, donate_argnums=donated).lower(*shapes).compile()

    def empty(self, batch: int) -> MicroTurnInputs:
        """Inputs of a micro-turn in which nothing is given to anyone."""
        empty = self.duplex.empty_inputs(batch)
        return empty if self.mesh is None else self._placed(jax.device_get(empty))

    def _placed(self, inputs: MicroTurnInputs) -> MicroTurnInputs:
        """Host arrays, the same in all processes, as parts on their devices; those that are there already stay."""
        if (mesh := self.mesh) is None:
            return inputs

        def one(array: Any, at: PartitionSpec) -> jax.Array:
            if isinstance(array, jax.Array):
                return array
            return jax.make_array_from_callback(array.shape, NamedSharding(mesh, at), array.__getitem__)

        return jax.tree.map(one, inputs, self.duplex.layouts()[2])

    def _set_mesh(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def inputs(self, empty: MicroTurnInputs, given: Mapping[int, SlotInput]) -> MicroTurnInputs:
        """What a micro-turn gives to its slots; slots that are not in `given` are not active.

        Args:
          empty: `empty` of the batch.
          given: by slot.
        """
        batch, base = len(empty.active), self.config.duplex.control_base
        bins, active = np.zeros(empty.bins.shape, np.uint8), np.zeros(batch, bool)
        typed, lengths = np.zeros(empty.typed.shape, np.int32), np.zeros(batch, np.int32)
        patches: Any = empty.patches
        counts = np.zeros(batch, np.int32)
        if any(one.patches is not None for one in given.values()):
            patches = np.zeros(empty.patches.shape, np.float32)
        for slot, one in given.items():
            bins[slot], active[slot] = one.bins, True
            if one.text:
                lengths[slot] = 1 + len(one.text)
                typed[slot, : lengths[slot]] = [base + one.mark, *one.text]
            if one.patches is not None:
                counts[slot] = len(one.patches)
                patches[slot, : counts[slot]] = one.patches
        return self._placed(
            empty._replace(
                bins=bins, active=active, typed=typed, typed_length=lengths, patches=patches, patch_count=counts
            )
        )

    def reader(self) -> Reader:
        """Reads the tokens of one session."""
        return Reader(self.codec, self.config.duplex.control_base)


def converse(
    engine: Engine,
    waves: Sequence[np.ndarray],
    seed: int = 0,
    week_ms: int = 0,
    patches: Sequence[np.ndarray] | None = None,
    typed: Sequence[Sequence[tuple[int, str]]] | None = None,
) -> Iterator[tuple[MicroTurnOutputs, tuple[MicroTurn, ...]]]:
    """Runs one session per wave, side by side, a micro-turn at a time.

    Args:
      engine: the loaded model.
      waves: `[N]` float32 each, 16 kHz; shorter ones end in silence.
      seed: of the sampling.
      week_ms: wall clock at the start.
      patches: `[P, 2, 40, 40, 3]` float32 per micro-turn, as far as there is video; seen by every session.
      typed: per session, `(micro-turn, text)` as it is typed; longer text than a micro-turn takes goes on in the next.

    Yields:
      The outputs (host arrays) and one record per session.
    """
    batch = len(waves)
    turns = max(-(-len(wave) // MICRO_TURN_SAMPLES) for wave in waves)
    padded = [np.pad(wave, (0, turns * MICRO_TURN_SAMPLES - len(wave))) for wave in waves]
    step = engine.step(batch)
    state: DuplexState = engine.duplex.init_state(batch, seed, week_ms)
    empty = engine.empty(batch)
    streams, readers = [DmelStream() for _ in waves], [engine.reader() for _ in waves]
    plans = [plan_typed(texts, engine.codec, engine.config.duplex, turns) for texts in typed or [()] * batch]
    for turn in range(turns):
        began = time.perf_counter()
        rows = slice(turn * MICRO_TURN_SAMPLES, (turn + 1) * MICRO_TURN_SAMPLES)
        stepped = [stream.step(wave[rows]) for stream, wave in zip(streams, padded, strict=True)]
        streams = [stream for stream, _ in stepped]
        seen = patches[turn] if patches is not None and turn < len(patches) else None
        given = {
            i: SlotInput(bins, tuple(plan[turn]), patches=seen)
            for i, ((_, bins), plan) in enumerate(zip(stepped, plans, strict=True))
        }
        state, outputs = step(engine.params, state, engine.inputs(empty, given))
        host = jax.device_get(outputs)
        step_ms = 1000 * (time.perf_counter() - began)
        records = []
        for i in range(batch):
            words = readers[i].read(host.tokens[i, : host.count[i]].tolist())
            gate = "speak" if host.speaking[i] else "listen"
            p_speak = round(float(host.p_speak[i]), 4)
            records.append(MicroTurn(turn * MICRO_TURN_MS, gate, p_speak, *words[:3], round(step_ms, 2)))
        yield host, tuple(records)


def replies(
    engine: Engine,
    waves: Sequence[np.ndarray],
    seed: int = 0,
    typed: Sequence[Sequence[tuple[int, str]]] | None = None,
) -> list[Reply]:
    """Whole sessions, side by side; a reply has the length and clock of its wave. Arguments as for `converse`."""
    chunks: list[np.ndarray] = []
    records: list[tuple[MicroTurn, ...]] = []
    for outputs, turn in converse(engine, waves, seed, typed=typed):
        chunks.append(np.asarray(outputs.wave))
        records.append(turn)
    heard_later = np.zeros((len(waves), MICRO_TURN_SAMPLES), np.float32)
    joined = np.concatenate([heard_later, *chunks], axis=1)
    return [
        Reply(joined[i, : len(wave)], tuple(turn[i] for turn in records[: -(-len(wave) // MICRO_TURN_SAMPLES)]))
        for i, wave in enumerate(waves)
    ]

"""`Engine`: a loaded model that is ready to converse. It has the parameters and one compiled step per batch size.

`SessionBatch` (recordings, the library) and `Slots` (the server) run sessions on an engine. `jaxtml.train.samples` and
`tools/evaluate.py` make engines too. Nothing here knows audio files or networks.

A step computes one micro-turn, 200 ms of input and output, of all slots.

Axes: B session slots.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxtml.config import Config
from jaxtml.model.duplex.programs import Duplex, Step
from jaxtml.model.duplex.state import DuplexState, MicroTurnInputs
from jaxtml.model.interaction import InteractionModel
from jaxtml.model.placement import Placement, partition_specs
from jaxtml.model.spec import Params, ParamSpec
from jaxtml.parallel.mesh import SERVE, MeshShape, make_mesh
from jaxtml.session.records import SlotInput
from jaxtml.stream.reading import Reader
from jaxtml.stream.text import TextCodec

if TYPE_CHECKING:
    from jaxtml.checkpoint.source import ParameterSource


@dataclass
class Engine:
    """Model, parameters and compiled steps.

    One thread at a time may step. On a mesh of several processes each process has an engine, and all processes make the
    same calls in the same order.

    Attributes:
      config: of the model.
      codec: text to token ids and back.
      params: as `Duplex.prepare` returns them.
      duplex: makes the JAX functions that prepare parameters, begin sessions and compute micro-turns.
      mesh: the devices; None: one device.
    """

    config: Config
    codec: TextCodec
    params: Params
    duplex: Duplex
    mesh: Mesh | None = None
    _steps: dict[int, Step] = field(default_factory=dict)

    @classmethod
    def create(cls, config: Config, params: Params, codec: TextCodec) -> Engine:
        """Returns an engine on one device. `params` are in memory, in the form in which training keeps them."""
        duplex = Duplex(InteractionModel(config, Placement(int8=config.serve.int8_experts)))
        return cls(config, codec, jax.jit(duplex.prepare)(params), duplex)

    @classmethod
    def load(cls, directory: str | Path, shape: MeshShape = MeshShape()) -> Engine:
        """Returns an engine with the model of a checkpoint directory.

        The directory is a checkpoint of this project, a training run, or a released Inkling checkpoint. On a mesh, each
        process reads the parameters of its own devices only.

        Raises:
          InputError: there is no readable checkpoint or tokenizer (see `open_checkpoint` and `load_tokenizer`), the
            mesh does not fit the devices, or the mesh cannot split a parameter evenly.
        """
        from jaxtml.checkpoint.opening import open_checkpoint
        from jaxtml.checkpoint.source import read_parameters
        from jaxtml.checkpoint.tokenizer import load_tokenizer

        # Both are checked before the parameters are read, which may take minutes.
        source, codec = open_checkpoint(directory), load_tokenizer(directory)
        if shape.devices == 1:
            return cls.create(source.config, read_parameters(source), codec)
        return cls._load_on_mesh(source, codec, shape)

    @classmethod
    def _load_on_mesh(cls, source: ParameterSource, codec: TextCodec, shape: MeshShape) -> Engine:
        from jaxtml.checkpoint.source import place_parameters

        config, mesh = source.config, make_mesh(shape)
        placement = Placement(shape, config.serve.transport, int8=config.serve.int8_experts)
        duplex = Duplex(InteractionModel(config, placement))
        table = InteractionModel(config).serving_specs()

        def read_shape(spec: ParamSpec, partition: PartitionSpec) -> jax.ShapeDtypeStruct:
            dtype = np.float32 if "router" in spec.axes else duplex.dtype
            return jax.ShapeDtypeStruct(spec.shape, dtype, sharding=NamedSharding(mesh, partition))

        shapes = jax.tree.map(read_shape, table, partition_specs(table, shape, SERVE))
        with jax.set_mesh(mesh):
            prepared = jax.tree.map(partial(NamedSharding, mesh), duplex.layouts()[0])
            # Int8 results are smaller than their arguments, so XLA could not reuse donated buffers.
            donated = () if placement.int8 else 0
            prepare = jax.jit(duplex.prepare, out_shardings=prepared, donate_argnums=donated)
            return cls(config, codec, prepare(place_parameters(source, shapes)), duplex, mesh)

    def compiled_step(self, batch: int) -> Step:
        """Returns the step for `batch` slots. The first call compiles it."""
        if batch not in self._steps:
            with self._mesh_context():
                self._steps[batch] = self.duplex.compiled(self.params, batch, self.mesh)
        return self._steps[batch]

    def init_state(self, batch: int, seed: int = 0, week_ms: int = 0) -> DuplexState:
        """Returns the state of `batch` sessions that have not begun, on the engine's devices.

        Session i samples with the key (seed, i). `week_ms` is the wall clock at its beginning.
        """
        make = partial(self.duplex.init_state, batch, seed, week_ms)
        return make() if self.mesh is None else self.compile_for_state(make)()

    def compile_for_state(
        self, function: Callable[..., DuplexState], *shapes: object, donated: tuple[int, ...] = ()
    ) -> Callable[..., DuplexState]:
        """Compiles a function that returns a state.

        On a mesh the function may move sessions from one device to another. XLA chooses the transfers.

        Args:
          function: the function.
          *shapes: shapes of its arguments.
          donated: positions of the arguments whose buffers the result may reuse.
        """
        run = function
        if self.mesh is not None:
            run = jax.sharding.auto_axes(function, out_sharding=self.duplex.layouts()[1])
        with self._mesh_context():
            return jax.jit(run, donate_argnums=donated).lower(*shapes).compile()

    def empty_inputs(self, batch: int) -> MicroTurnInputs:
        """Returns inputs for `make_inputs`, on the engine's devices: nothing is heard, typed or seen.

        All slots are active; `make_inputs` decides which slots of a micro-turn are.
        """
        empty = self.duplex.empty_inputs(batch)
        return empty if self.mesh is None else self._place_inputs(jax.device_get(empty))

    def make_inputs(self, empty: MicroTurnInputs, given: Mapping[int, SlotInput]) -> MicroTurnInputs:
        """Returns the inputs of a micro-turn.

        Args:
          empty: from `empty_inputs`, for the same number of slots.
          given: the input of each active slot. All other slots are not active.
        """
        batch, base = len(empty.active), self.config.duplex.control_base
        bins, active = np.zeros(empty.bins.shape, np.uint8), np.zeros(batch, bool)
        typed, typed_length = np.zeros(empty.typed.shape, np.int32), np.zeros(batch, np.int32)
        patches: np.ndarray | jax.Array = empty.patches  # zeros of this size are made only if some slot has video
        patch_count = np.zeros(batch, np.int32)
        if any(slot_input.patches is not None for slot_input in given.values()):
            patches = np.zeros(empty.patches.shape, np.float32)
        for slot, slot_input in given.items():
            bins[slot], active[slot] = slot_input.bins, True
            if slot_input.text:
                typed_length[slot] = 1 + len(slot_input.text)
                typed[slot, : typed_length[slot]] = [base + slot_input.mark, *slot_input.text]
            if slot_input.patches is not None:
                patch_count[slot] = len(slot_input.patches)
                patches[slot, : patch_count[slot]] = slot_input.patches
        inputs: Any = (bins, typed, typed_length, patches, patch_count, active)  # host arrays
        return self._place_inputs(MicroTurnInputs(*inputs))

    def reader(self) -> Reader:
        """Returns a reader of the tokens of one session."""
        return Reader(self.codec, self.config.duplex.control_base)

    def _place_inputs(self, inputs: MicroTurnInputs) -> MicroTurnInputs:
        """Puts host arrays, which are the same in all processes, on the devices of the mesh.

        Arrays that are on the devices already stay there. Without a mesh, all arrays stay where they are.
        """
        if (mesh := self.mesh) is None:
            return inputs

        def place(array: np.ndarray | jax.Array, partition: PartitionSpec) -> jax.Array:
            if isinstance(array, jax.Array):
                return array
            return jax.make_array_from_callback(array.shape, NamedSharding(mesh, partition), array.__getitem__)

        return jax.tree.map(place, inputs, self.duplex.layouts()[2])

    def _mesh_context(self) -> AbstractContextManager[object]:
        return nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

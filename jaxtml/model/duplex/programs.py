"""`Duplex`: the programs of one model's micro-turn, compiled ahead of time, on one device or on a mesh.

Everything that runs micro-turns goes through this class: the session engine, `jaxtml plan` and the tests. The
computation itself is in `step.py`. This module decides how parameters are prepared for it, where parameters, state and
inputs lie on a mesh, and how the step is compiled. `Duplex` holds shapes and limits, never arrays.

Axes: B session slots.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.extend.backend
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxtml.errors import InputError
from jaxtml.model.duplex import state as states
from jaxtml.model.duplex.state import DuplexState, MicroTurnInputs, MicroTurnOutputs
from jaxtml.model.duplex.step import micro_turn
from jaxtml.model.experts.weights import quantise_experts
from jaxtml.model.interaction import InteractionModel
from jaxtml.model.placement import partition_specs
from jaxtml.model.spec import Params, ParamSpec
from jaxtml.parallel.mesh import SERVE

Step = Callable[[Params, DuplexState, MicroTurnInputs], tuple[DuplexState, MicroTurnOutputs]]
"""`(prepared parameters, state, inputs) -> (next state, outputs)`: one micro-turn."""


@dataclass(frozen=True)
class Duplex:
    """The micro-turn of one model.

    Attributes:
      model: placed on a mesh or on one device.
      trace: whether the outputs include the logits of the generated tokens.
      platform: "cpu", "tpu" or "cuda", where the step will run; None: the platform of the default device.
    """

    model: InteractionModel
    trace: bool = False
    platform: str | None = None

    @property
    def one_cpu(self) -> bool:
        """Whether the step runs on a single CPU device (see `cpu_batches`)."""
        platform = self.platform or jax.extend.backend.get_default_device().platform
        return platform == "cpu" and self.model.placement.mesh.devices == 1

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype in which the step computes."""
        return states.compute_dtype(self.model)

    def check_sessions(self, batch: int) -> None:
        """Raises `InputError` where the mesh cannot split `batch` sessions into equal parts."""
        mesh, parts = self.model.placement.mesh, self.model.placement.session_shards
        if batch % parts:
            raise InputError(
                f"mesh {mesh} splits the sessions into {parts} equal parts, and {batch} is not a multiple of {parts}: "
                f"serve a multiple of {parts} sessions, or name another mesh"
            )

    def prepare(self, params: Params) -> Params:
        """Returns the parameters as the step reads them.

        They are in the compute dtype, except the router, whose scores are float32. Routed experts are int8 where the
        placement says so. Prediction heads are left out.
        """
        int8 = self.model.placement.int8

        def cast(spec: ParamSpec, array: jax.Array) -> jax.Array:
            if int8 and "expert" in spec.axes:
                return array
            return array.astype(jnp.float32 if "router" in spec.axes else self.dtype)

        table = self.model.serving_specs()
        params = {name: params[name] for name in table}
        ready = jax.tree.map(cast, table, quantise_experts(params) if int8 else params)
        return {**ready, "layers": self.model.backbone.prepare_for_serving(ready["layers"])}

    def init_state(self, batch: int, seed: int = 0, week_ms: int = 0) -> DuplexState:
        """See `state.init_state`."""
        return states.init_state(self.model, batch, seed, week_ms)

    def empty_inputs(self, batch: int) -> MicroTurnInputs:
        """See `state.empty_inputs`."""
        return states.empty_inputs(self.model.config.duplex, batch)

    def begin_session(self, state: DuplexState, slot: jax.Array, key: jax.Array, week_ms: jax.Array) -> DuplexState:
        """See `state.begin_session`."""
        return states.begin_session(self.model, state, slot, key, week_ms)

    def take_slots(self, state: DuplexState, slots: jax.Array) -> DuplexState:
        """See `state.take_slots`."""
        return states.take_slots(self.model, state, slots)

    def layouts(self) -> tuple[Params, DuplexState, MicroTurnInputs]:
        """Returns where prepared parameters, state and inputs lie on the mesh.

        Each tree has a `PartitionSpec` in place of each array.
        """
        sessions, mesh = self.model.placement.session_axes, self.model.placement.mesh
        split = PartitionSpec(sessions)
        params = partition_specs(self.model.serving_specs(), mesh, SERVE)
        state = jax.tree.map(lambda _: split, jax.eval_shape(lambda: self.init_state(1)))
        state = state._replace(layers=self.model.backbone.state_partition_specs(sessions))
        inputs = jax.tree.map(lambda _: split, jax.eval_shape(lambda: self.empty_inputs(1)))
        return params, state, inputs

    def shapes(self, batch: int, mesh: Mesh | None = None) -> tuple[DuplexState, MicroTurnInputs]:
        """Returns state and inputs of `batch` slots as `jax.ShapeDtypeStruct`s, with shardings if `mesh` is given."""
        shapes = jax.eval_shape(lambda: (self.init_state(batch), self.empty_inputs(batch)))
        if mesh is None:
            return shapes

        def placed(a: jax.ShapeDtypeStruct, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, spec))

        return jax.tree.map(placed, shapes, self.layouts()[1:])

    def step(self, params: Params, state: DuplexState, inputs: MicroTurnInputs) -> tuple[DuplexState, MicroTurnOutputs]:
        """Computes one micro-turn (`step.micro_turn`).

        On a mesh (under `jax.set_mesh`), every device runs one program over its share of the sessions.

        Args:
          params: from `prepare`.
          state: from `init_state` or from the micro-turn before.
          inputs: what the micro-turn is given.
        """
        if self.model.placement.mesh.devices == 1:
            return self._local_step(params, state, inputs)
        arguments = self.layouts()
        results = (arguments[1], PartitionSpec(self.model.placement.session_axes))
        sharded = jax.shard_map(self._local_step, in_specs=arguments, out_specs=results, check_vma=False)
        return sharded(params, state, inputs)

    def _local_step(
        self, params: Params, state: DuplexState, inputs: MicroTurnInputs
    ) -> tuple[DuplexState, MicroTurnOutputs]:
        return micro_turn(self.model, params, state, inputs, trace=self.trace, one_cpu=self.one_cpu)

    def compiled(self, params: Params, batch: int, mesh: Mesh | None = None) -> Step:
        """Returns the step compiled ahead of time for `batch` slots; it donates the state and can never recompile.

        On a mesh (which the caller sets with `jax.set_mesh`), every device gets all outputs, so that any process can
        read them.
        """

        def replicated(
            params: Params, state: DuplexState, inputs: MicroTurnInputs
        ) -> tuple[DuplexState, MicroTurnOutputs]:
            state, outputs = self.step(params, state, inputs)
            return state, jax.tree.map(lambda a: jax.sharding.reshard(a, PartitionSpec()), outputs)

        step = self.step if mesh is None else replicated
        return jax.jit(step, donate_argnums=1).lower(params, *self.shapes(batch, mesh)).compile()

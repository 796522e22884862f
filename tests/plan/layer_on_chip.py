"""Compiles parts of a layer for one device of a topology that this machine lacks; prints the compiler's figures as
JSON.

    python tests/plan/layer_on_chip.py v5p:2x2x1

Called by test_chips in a process of its own, because a compiler stays in the process that has loaded it.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxtml import config as configs
from jaxtml.model.attention.retention import find_far_tokens
from jaxtml.model.attention.sequence import attend_sequence
from jaxtml.model.experts.grouped import grouped_swiglu
from jaxtml.model.experts.moe import MoE
from jaxtml.model.experts.weights import ExpertWeights
from jaxtml.model.spec import bind, specs
from jaxtml.parallel.work import count_jaxpr_work
from jaxtml.plan.topology import Topology

TOKENS = 8_192  # the compiler takes 20 s; with 16,384 tokens it takes 40 s
LONG = 32_768


def moe(shaped: Any, platform: str) -> dict[str, float]:
    """Returns the FLOPs of a MoE layer, forward and backward, as a multiple of what its tokens need.

    `counted` comes from the jaxpr; `compiled` comes from the compiler, where the compiler gives a figure.
    """
    config = dataclasses.replace(
        configs.load("inkling_small").backbone,
        d_model=1024, d_ff_expert=512, n_experts=16, experts_per_token=2, n_shared_experts=1,
    )  # fmt: skip
    layer = MoE(config, "mlp")
    params = {name: shaped(spec.shape, jnp.bfloat16) for name, spec in specs(layer).items()}

    def loss(params: Any, x: jax.Array) -> jax.Array:
        return bind(layer, params)(x)[0].astype(jnp.float32).sum()

    arguments = (params, shaped((1, TOKENS, config.d_model), jnp.bfloat16))
    jitted = jax.jit(jax.grad(loss, (0, 1)))
    # Traced for a CPU, the program of a GPU has `ragged_dot` in place of tokamax' kernels, which hide their products.
    with jax.default_device(jax.devices("cpu")[0]):
        counts = count_jaxpr_work(jitted.trace(*arguments).jaxpr, platform)
    analysis = jitted.lower(*arguments).compile().cost_analysis()
    worked = config.experts_per_token + config.n_shared_experts
    router = config.n_experts + config.n_shared_experts
    needed = 6 * TOKENS * config.d_model * (worked * 3 * config.d_ff_expert + router)
    figures = {"counted": counts.flops / needed}
    return figures | ({"compiled": analysis["flops"] / needed} if analysis else {})


def temporary_bytes(compiled: jax.stages.Compiled) -> float:
    """Returns the bytes that a compiled program needs besides its inputs and outputs."""
    analysis = compiled.memory_analysis()
    assert analysis is not None
    return analysis.temp_size_in_bytes


def attention(shaped: Any, window: int, extent: int, retained: int = 0) -> float:
    """Returns the bytes that attention over a long sequence needs besides its operands and gradients."""
    config = configs.load("inkling_small").backbone
    kind = dataclasses.replace(
        config.global_, window=window, rel_extent=extent, retained=retained, n_heads=8, n_kv_heads=2
    )
    groups, per_group, dim = 2, 4, kind.head_dim
    shapes = [
        (1, LONG, groups, per_group, dim), (1, LONG, groups, dim), (1, LONG, groups, dim),
        (1, LONG, groups, per_group, config.d_rel), (config.d_rel, extent),
    ]  # fmt: skip

    def loss(positions: jax.Array, *operands: jax.Array) -> jax.Array:
        far = find_far_tokens(kind, positions)
        return attend_sequence(kind, *operands, far=far).astype(jnp.float32).sum()

    arguments = [shaped(shape, jnp.bfloat16) for shape in shapes]
    grad = jax.jit(jax.grad(loss, range(1, 6)))
    return temporary_bytes(grad.lower(shaped((1, LONG), jnp.uint8), *arguments).compile())


def experts_in_place(shaped: Any, block: int, int8: bool) -> float:
    """Returns the bytes that serving needs, besides its rows, for one layer of a stack of four layers.

    A layer has 25 MB in bfloat16.
    """
    stack, count, dim, width = (2, 2), 8, 1024, 512
    kind = jnp.int8 if int8 else jnp.bfloat16
    w13, w2 = shaped((*stack, count, 2, dim, width), kind), shaped((*stack, count, width, dim), kind)
    scales = [shaped((*stack, count, *rest), jnp.float32) for rest in ((2, width), (dim,))] if int8 else [None, None]
    at = (shaped((), jnp.int32), shaped((), jnp.int32))
    rows, sizes = shaped((32 * block, dim), jnp.bfloat16), shaped((count,), jnp.int32)

    def run(rows: jax.Array, sizes: jax.Array, experts: ExpertWeights) -> jax.Array:
        return grouped_swiglu(rows, sizes, experts, block)

    experts = ExpertWeights(w13, w2, scales[0], scales[1], at)
    return temporary_bytes(jax.jit(run).lower(rows, sizes, experts).compile())


def main(text: str) -> None:
    jax.config.update("jax_platforms", "cpu")
    topology = Topology.parse(text)
    device = topology.find_devices()[0]
    sharding = NamedSharding(Mesh(np.array([device]), ("all",)), PartitionSpec())

    def shaped(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    with jax.default_device(device):
        figures = {
            "moe": moe(shaped, topology.platform),
            "attention": {
                "global": attention(shaped, LONG, 4096),
                "sliding": attention(shaped, 512, 512),
            },
            "retaining": attention(shaped, 4096, 1024, retained=8192),
        }
        figures["in_place"] = {
            f"{block} {int8}": experts_in_place(shaped, block, int8) for block, int8 in ((8, True), (128, False))
        }
    print(json.dumps(figures))


if __name__ == "__main__":
    main(sys.argv[1])

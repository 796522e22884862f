"""Work is counted as often as it is done: loops, branches by platform, collectives by axis."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from jaxtml.parallel.mesh import MeshShape, make_mesh
from jaxtml.parallel.work import Case, count_jaxpr_work, count_work, mark_pass

X = jax.ShapeDtypeStruct((8, 16), jnp.float32)
W = jax.ShapeDtypeStruct((16, 16), jnp.float32)
ONCE = 2 * 8 * 16 * 16


def test_the_body_of_a_loop_counts_as_often_as_it_runs():
    def looped(x, w):
        return jax.lax.scan(lambda x, _: (x @ w, None), x, None, length=5)[0]

    assert count_work(looped, X, W, platform="cpu").flops == 5 * ONCE
    forward_and_backward = jax.grad(lambda x, w: looped(x, w).sum(), argnums=(0, 1))
    assert count_work(forward_and_backward, X, W, platform="cpu").flops == 15 * ONCE


def test_recomputation_counts_again():
    def loss(x, w):
        return jax.checkpoint(lambda x: jnp.tanh(x @ w) @ w)(x).sum()

    assert count_work(jax.grad(loss, argnums=1), X, W, platform="cpu").flops >= 5 * ONCE


def test_a_loop_of_unknown_length_is_reported():
    def endless(x, w):
        return jax.lax.while_loop(lambda x: x.sum() < 1, lambda x: x @ w, x)

    work = count_work(endless, X, W, platform="cpu")
    assert (work.flops, work.open_loops) == (ONCE, 1)


def test_only_the_branch_of_the_platform_counts():
    def split(x, w):
        return jax.lax.platform_dependent(
            x, w, tpu=lambda x, w: x @ w, cuda=lambda x, w: x @ w @ w, default=lambda x, w: x @ w @ w @ w
        )

    assert [count_work(split, X, W, platform=p).flops / ONCE for p in ("tpu", "cuda", "cpu")] == [1, 2, 3]


def test_a_case_decides_branches_and_rounds():
    def program(x, w, flag):
        def run(width, x):
            return mark_pass(jnp.zeros((2, width, 16)))[0, :1] + x @ w

        x = jax.lax.cond(flag, lambda x: run(9, x @ w), lambda x: run(3, x), x)  # a narrow input, or a wide one
        x = jax.lax.while_loop(lambda x: x.sum() < 1, lambda x: run(1, x), x)
        return jax.lax.cond(flag, lambda x: x @ w @ w @ w, lambda x: x, x)  # what only some runs need

    jaxpr = jax.jit(program).trace(X, W, jax.ShapeDtypeStruct((), bool)).jaxpr

    def count(*case):
        work = count_jaxpr_work(jaxpr, "cpu", Case(*case))
        return work.flops / ONCE, {key: times for key, times in work.passes.items() if times}

    assert count(0, False, False) == (1, {(2, 3): 1})
    assert count(0, True, False) == (2, {(2, 9): 1})
    assert count(4, False, True) == (1 + 4 + 3, {(2, 3): 1, (2, 1): 4})


def test_a_condition_inside_a_layer_counts_with_its_work_whatever_the_case():
    def program(x, w, flags):
        return jax.lax.scan(lambda x, flag: (jax.lax.cond(flag, lambda x: x @ w, lambda x: x, x), None), x, flags)[0]

    jaxpr = jax.jit(program).trace(X, W, jax.ShapeDtypeStruct((6,), bool)).jaxpr
    assert count_jaxpr_work(jaxpr, "cpu", Case(0, False, False)).flops == 6 * ONCE


def test_weights_are_read_as_often_as_an_operation_takes_them():
    stack, table = jax.ShapeDtypeStruct((5, 16, 16), jnp.bfloat16), jax.ShapeDtypeStruct((1000, 16), jnp.bfloat16)
    unused = jax.ShapeDtypeStruct((99, 99), jnp.bfloat16)

    def program(stack, table, unused, ids, x):
        del unused
        x = x + table[ids]  # reads eight rows

        def layer(x, i):
            return jnp.tanh(x @ stack[i].astype(jnp.float32)), None  # one layer of the stack

        x, _ = jax.lax.scan(layer, x, jnp.arange(5))
        return x @ stack[0].astype(jnp.float32)

    arguments = (stack, table, unused, jax.ShapeDtypeStruct((8,), jnp.int32), X)
    jaxpr = jax.jit(program).trace(*arguments).jaxpr
    assert count_jaxpr_work(jaxpr, "cpu", weights=(True,) * 3).read == 2 * (6 * 16 * 16 + 8 * 16)
    assert count_jaxpr_work(jaxpr, "cpu", weights=(False, True)).read == 2 * 8 * 16
    assert count_jaxpr_work(jaxpr, "cpu").read == 0


def test_collectives_count_by_kind_axis_and_bytes():
    mesh = make_mesh(MeshShape(data=4, expert=2))

    def local(x, w):
        w = jax.lax.all_gather(w, "data", axis=0, tiled=True)
        out = jax.lax.scan(lambda s, _: (s + jax.lax.psum(x @ w, "expert"), None), jnp.zeros((1, 16)), None, length=3)[
            0
        ]
        return jax.lax.psum_scatter(out, ("data", "expert"), scatter_dimension=1, tiled=True)

    program = jax.shard_map(
        local, mesh=mesh, in_specs=(P(("data", "expert")), P("data")), out_specs=P(None, ("data", "expert")),
        check_vma=False,
    )  # fmt: skip
    arguments = (
        jax.ShapeDtypeStruct(X.shape, X.dtype, sharding=jax.NamedSharding(mesh, P(("data", "expert")))),
        jax.ShapeDtypeStruct(W.shape, W.dtype, sharding=jax.NamedSharding(mesh, P("data"))),
    )
    work = count_work(program, *arguments, platform="cpu")
    assert dict(work.sent) == {
        ("all_gather", ("data",)): 16 * 16 * 4 * 3 / 4,
        ("all_reduce", ("expert",)): 3 * 2 * 16 * 4 / 2,
        ("reduce_scatter", ("data", "expert")): 16 * 4 * 7 / 8,
    }
    assert list(work.calls.values()) == [1, 3, 1]
    assert work.flops == 3 * 2 * 16 * 16


def test_a_kernel_counts_by_its_own_estimate():
    from jaxtml.model.attention.flash import flash_attention

    tokens, width, rank = 512, 128, 16
    shapes = ((1, 2, tokens, width), (1, 1, tokens, width), (1, 1, tokens, width), (1, 2, tokens, rank), (rank, 64))
    arguments = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
    scale, segments = np.ones(tokens, np.float32), np.zeros((1, tokens), np.int32)
    work = count_work(
        lambda *a: flash_attention(*a, scale, segments, window=128, block=128), *arguments, platform="tpu"
    )
    blocks = 2 * (1 + 2 + 2 + 2)
    assert work.flops == blocks * 128 * 128 * (4 * width + 4 * rank)

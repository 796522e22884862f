"""Two ways to save time on a CPU: compute only slots that have work, and take branches without copies.

The time of a CPU grows with the number of slots that it computes, so a CPU skips slots that have nothing to do. The
time of an accelerator hardly grows; there `run_either` and `run_in_batches` are the plain JAX operations. Both
functions take `one_cpu`, which says whether the program runs on a single CPU device.

Called by `step.py`. On a CPU, `jaxtml.session.slots` also divides the sessions of a server into groups of at most
`CPU_BATCH` slots.

`carry` is any tree of arrays that a function takes and returns with the same shapes. Axes: B session slots.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp

Carry = TypeVar("Carry")

CPU_BATCH = 6
"""Slots that a CPU computes at a time."""


def run_either(
    one_cpu: bool,
    condition: jax.Array,
    if_true: Callable[[Carry], Carry],
    if_false: Callable[[Carry], Carry],
    carry: Carry,
) -> Carry:
    """Returns `if_true(carry)` where `condition` (bool scalar) holds, else `if_false(carry)`: `lax.cond`.

    On a CPU, XLA copies whatever passes through a `cond`: here the keys and values of all sessions. So on a CPU each
    branch is a loop of at most one round. Such loops work on the arrays in place.
    """
    if not one_cpu:
        return jax.lax.cond(condition, if_true, if_false, carry)

    def run_if(condition: jax.Array, run: Callable[[Carry], Carry], carry: Carry) -> Carry:
        def body(loop: tuple[jax.Array, Carry]) -> tuple[jax.Array, Carry]:
            return jnp.zeros_like(loop[0]), run(loop[1])

        return jax.lax.while_loop(lambda loop: loop[0], body, (condition, carry))[1]

    return run_if(~condition, if_false, run_if(condition, if_true, carry))


def run_in_batches(one_cpu: bool, run: Callable[[Carry], Carry], carry: Carry, axes: Carry, order: jax.Array) -> Carry:
    """Returns `run(carry)`. On a CPU, `run` gets `CPU_BATCH` slots at a time.

    A batch always has `CPU_BATCH` slots, and may include slots that have nothing to do. So the results of a session do
    not depend on the number of other sessions.

    Args:
      one_cpu: whether the program runs on a single CPU device.
      run: computes each slot of its argument independently. It must not change a slot that has nothing to do. A slot
        that has work is computed once.
      carry: arrays of B slots.
      axes: for each array of `carry`, the axis that counts slots.
      order: `[B]` int32: 0 for slots that come first, 1 for slots that come next, 2 for slots with nothing to do.
    """
    if len(order) <= CPU_BATCH or not one_cpu:
        return run(carry)

    def body(loop: tuple[Carry, jax.Array]) -> tuple[Carry, jax.Array]:
        carry, order = loop
        slots = jnp.argsort(order, stable=True)[:CPU_BATCH]
        batch = run(jax.tree.map(lambda axis, array: jnp.take(array, slots, axis=axis), axes, carry))
        carry = jax.tree.map(partial(_put_slots, slots), axes, carry, batch)
        return carry, order.at[slots].set(2)

    return jax.lax.while_loop(lambda loop: jnp.any(loop[1] < 2), body, (carry, order))[0]


def _put_slots(slots: jax.Array, axis: int, array: jax.Array, batch: jax.Array) -> jax.Array:
    """Returns `array` with the slots of `batch` written to its `slots` along `axis`.

    Writes one slot after the other. XLA then copies each slot in one piece, and changes `array` in place.
    """

    def put(i: jax.Array, array: jax.Array) -> jax.Array:
        slot = jax.lax.dynamic_slice_in_dim(batch, i, 1, axis)
        return jax.lax.dynamic_update_slice_in_dim(array, slot, slots[i], axis)

    return jax.lax.fori_loop(0, len(slots), put, array)

"""Refuses a server whose longest micro-turn takes more than 200 ms, and finds changes that make it fast enough.

A batch of sessions waits for its slowest one. If the longest micro-turn misses its time, all sessions fall behind now
and then, however fast the others are. Called by `planning`, before it compiles.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

from jaxtml.config import Config, DuplexConfig
from jaxtml.errors import InputError
from jaxtml.model.placement import Placement
from jaxtml.parallel.mesh import MeshShape
from jaxtml.plan.micro_turn import Course, Turn
from jaxtml.plan.report import ServingLoad, named_courses, time_course
from jaxtml.plan.topology import Topology
from jaxtml.stream.timebase import MICRO_TURN_MS

Measure = Callable[[Config, Topology, MeshShape], ServingLoad]
"""Traces the server's program for a mesh and measures it."""


class TooSlow(InputError):
    """The longest micro-turn of a server takes more than 200 ms."""


def check_real_time(
    config: Config,
    topology: Topology,
    mesh: MeshShape,
    measure: Measure,
    usual_mesh: Callable[[Config, Topology], MeshShape],
) -> None:
    """Checks that the longest micro-turn takes at most 200 ms, with the latency of collectives.

    Args:
      config: the model and its serving.
      topology: the hardware.
      mesh: the shape of the mesh over its devices.
      measure: measures a server.
      usual_mesh: returns the mesh for a plan of a topology that names none.

    Raises:
      TooSlow: the longest micro-turn takes longer. The message says which single changes would do.
    """
    load = measure(config, topology, mesh)
    longest = longest_ms(config, load, topology, mesh)
    if longest <= MICRO_TURN_MS:
        return
    found = [f"{text} ({ms:.0f} ms)" for text, ms in _remedies(config, load, topology, mesh, measure, usual_mesh)]
    remedy = f"try {', or '.join(found)}" if found else "no single change of the config or the topology would do"
    raise TooSlow(
        f"{config.name} is not served in real time on {topology}: its longest micro-turn takes {longest:.0f} ms at "
        f"best, and may take {MICRO_TURN_MS}: {remedy}"
    )


def longest_ms(config: Config, load: ServingLoad, topology: Topology, mesh: MeshShape) -> float:
    """Returns the milliseconds of the longest micro-turn, with the latency of collectives."""
    return 1e3 * time_course(config, load, topology, mesh, named_courses(load)["longest"]).total


def _remedies(
    config: Config,
    load: ServingLoad,
    topology: Topology,
    mesh: MeshShape,
    measure: Measure,
    usual_mesh: Callable[[Config, Topology], MeshShape],
) -> Iterator[tuple[str, float]]:
    """Yields single changes with which the longest micro-turn takes at most 200 ms, and the milliseconds it takes."""
    longest = named_courses(load)["longest"]

    def ms_at_best(course: Course, share: float = 1.0) -> float:
        return 1e3 * time_course(config, load, topology, mesh, course, share).total

    changes = [] if config.serve.int8_experts else [_int8(config)]
    if ms_at_best(longest._replace(wide=False)) <= MICRO_TURN_MS:
        changes += _shorter_inputs(config)
    if ms_at_best(longest, load.session_shards / load.sessions) <= MICRO_TURN_MS:
        changes += _fewer_sessions(config, load.session_shards)
    done: set[str] = set()
    for kind, text, changed in changes:
        if kind not in done:
            ms = longest_ms(changed, measure(changed, topology, mesh), topology, mesh)
            if ms <= MICRO_TURN_MS:
                done.add(kind)
                yield text, ms
    yield from _shorter_texts(config, load, topology, mesh)
    for place in (topology, *topology.larger()):
        other = usual_mesh(config, place)
        if other == mesh or config.serve.sessions % Placement(other, config.serve.transport).session_shards:
            continue  # nothing new, or so many chips cannot share so few sessions
        ms = longest_ms(config, measure(config, place, other), place, other)
        if ms <= MICRO_TURN_MS:
            yield (f"--mesh {other}" if place == topology else str(place)), ms
            return


Change = tuple[str, str, Config]
"""The kind of a change, the change in words, and the changed config."""


def _int8(config: Config) -> Change:
    changed = dataclasses.replace(config, serve=dataclasses.replace(config.serve, int8_experts=True))
    return "int8", "serve.int8_experts=true", changed


def _shorter_inputs(config: Config) -> Iterator[Change]:
    """Yields smaller limits of what comes in, the largest first."""
    for field in ("max_patches", "max_typed"):
        limit = getattr(config.duplex, field)
        while limit > 3:  # a limit of 1 would leave no room for typed text after its control token
            limit //= 2
            yield field, f"duplex.{field}={limit}", _with_duplex(config, **{field: limit})


def _fewer_sessions(config: Config, unit: int) -> Iterator[Change]:
    """Yields smaller numbers of sessions, multiples of `unit`, the largest first."""
    sessions = config.serve.sessions // 2 // unit * unit
    while sessions:
        changed = dataclasses.replace(config, serve=dataclasses.replace(config.serve, sessions=sessions))
        yield "sessions", f"serve.sessions={sessions}", changed
        sessions = sessions // 2 // unit * unit


def _shorter_texts(
    config: Config, load: ServingLoad, topology: Topology, mesh: MeshShape
) -> Iterator[tuple[str, float]]:
    """Yields the largest limits of heard and own text that are small enough, in proportion to the config's."""
    duplex = config.duplex
    heard = duplex.max_heard if duplex.heard else 0
    fixed = load.max_written - heard - duplex.max_text  # the tokens that begin the two texts
    for words in range(heard + duplex.max_text - 1, 1, -1):
        course = load.program.course(Turn(True, words + fixed, True), 0)
        ms = 1e3 * time_course(config, load, topology, mesh, course).total
        if ms <= MICRO_TURN_MS:
            max_heard = max(1, words * heard // (heard + duplex.max_text)) if heard else 0
            text = f"duplex.max_text={words - max_heard}"
            yield (f"duplex.max_heard={max_heard} with {text}" if heard else text), ms
            return


def _with_duplex(config: Config, **fields: int) -> Config:
    duplex: DuplexConfig = dataclasses.replace(config.duplex, **fields)
    return dataclasses.replace(config, duplex=duplex)

"""The training loop: `jaxtml train CONFIG --workdir DIR --data DIR`. Read it top to bottom.

A batch is a function of (seed, step) and a checkpoint holds parameters, moments and the step: a run that was killed
goes on with the numbers it would have had, on whatever mesh and with however many processes. In `workdir`:
`checkpoints/<step>` (Orbax), `config.json`, `tokenizer.json`, `data.txt` (a digest of what the rows are made from),
`log.jsonl` (a line per report), `tensorboard/`, `samples/<step>/` (conversations with unseen voices), `profile/` where
one was asked for, `unsound_<step>.npz` where training had to stop.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.sharding import NamedSharding, PartitionSpec

from jaxtml.checkpoint.files import TOKENIZER
from jaxtml.config import Config
from jaxtml.data.cache import CACHE_FOLDER, CachedRows
from jaxtml.data.dataset import ConversationDataset, Dataset, open_dataset
from jaxtml.data.pipeline import Batch, HostRows, batches
from jaxtml.errors import InputError
from jaxtml.model.interaction import InteractionModel
from jaxtml.model.placement import Placement
from jaxtml.model.spec import Params, count_parameters, init_params
from jaxtml.parallel.mesh import BATCH_AXES, MeshShape, make_mesh
from jaxtml.stream.text import TextCodec
from jaxtml.train import storage
from jaxtml.train.gradients import check_batch
from jaxtml.train.progress import TrainProgress
from jaxtml.train.samples import Sampler
from jaxtml.train.step import TrainState, make_train_step

REPORT_EVERY = 20
UNSOUND = 3  # steps in a row without a sound gradient after which training stops
PROFILE_FROM = 5  # steps after the start: by then everything is compiled


def train(
    config: Config,
    workdir: Path,
    data: Path,
    *,
    workers: int = 1,
    vocoder: Params | None = None,
    start_from: Path | None = None,
    mesh: MeshShape = MeshShape(),
    profile: int = 0,
) -> TrainState:
    """Trains or resumes in `workdir` up to `config.train.steps` updates.

    Args:
      config: the resolved config; resuming with another one is refused, but for `storage.FREE`.
      workdir: made if it is not there; the same folder for all processes.
      data: from `jaxtml data`: `bank/`, `tokenizer.json` and, where there is one, `cache/`.
      workers: processes that make batches in advance.
      vocoder: trained vocoder parameters to carry in the checkpoints.
      start_from: a checkpoint directory whose parameters a new run begins with, its vocoder too; fresh moments.
      mesh: of all devices of all processes.
      profile: steps to trace into `workdir/profile` (0: none).

    Raises:
      InputError: no data there, `workdir` holds a run of another config or on other data, `start_from` is of another
        size or has another tokenizer, the mesh does not fit, or `UNSOUND` steps in a row gave no sound gradient.
    """
    codec = TextCodec.load(data / TOKENIZER)
    if codec.size > config.duplex.control_base:
        raise InputError(f"{data / TOKENIZER} has {codec.size} entries, {config.name} {config.duplex.control_base}")
    check_batch(config.train, mesh)
    if config.train.transport == "ragged" and mesh.expert > 1 and jax.default_backend() == "cpu":
        raise InputError("train.transport ragged: a CPU has no ragged_all_to_all; set train.transport=ring")
    if mesh.devices < jax.process_count():
        raise InputError(
            f"mesh {mesh} is not of all devices of the {jax.process_count()} processes: name another --mesh"
        )
    dataset = open_dataset(config, codec, data)
    takes_samples = mesh.devices == 1 and isinstance(dataset, ConversationDataset)
    if (data / CACHE_FOLDER).is_dir():
        dataset = CachedRows.open(config, data / CACHE_FOLDER, dataset)
    model = InteractionModel(config, Placement(mesh, config.train.transport, config.train.capacity))
    total, active = count_parameters(model.specs())
    logging.info("%s: %.2fM parameters, %.2fM active, on %s", config.name, total / 1e6, active / 1e6, mesh)
    with jax.set_mesh(make_mesh(mesh)) if mesh.devices > 1 else nullcontext():
        storage.claim(workdir, config, data, dataset.digest)
        init, step = make_train_step(model)
        compiled = jax.jit(step, donate_argnums=0)
        saver = storage.checkpointer(workdir)
        if saver.latest is not None:
            first = saver.latest.step
            state = storage.load(saver, workdir, first, model)
            logging.info("resumed at step %d", first)
        else:
            first = 0
            params = _first_parameters(model, data, vocoder, start_from)
            state = jax.jit(init, donate_argnums=0)(params) if mesh.devices > 1 else init(params)
        steps, every = config.train.steps, config.train
        host_rows = _host_rows(every.batch, mesh)
        feed = batches(dataset, every.batch, start=first, workers=workers, host_rows=host_rows)
        progress = TrainProgress(workdir, config, first, mesh.devices) if jax.process_index() == 0 else None
        if mesh.devices > 1:
            logging.info("no samples are taken: that is done on one device")
        elif not takes_samples:
            logging.info("no samples are taken: dataset %s has no conversations", config.data.dataset)
        pending: list[dict[str, Any]] = []
        unsound = 0
        traced = range(first + PROFILE_FROM, min(first + PROFILE_FROM + profile, steps + 1))
        sampler: Sampler | None = None
        try:
            for done in range(first + 1, steps + 1):
                if traced and done == traced[0]:
                    jax.profiler.start_trace(str(workdir / "profile"))
                state, metrics = compiled(state, _placed(next(feed), host_rows, every.batch, mesh))
                pending.append(metrics)
                if traced and done == traced[-1]:
                    jax.block_until_ready(state)
                    jax.profiler.stop_trace()
                if done % REPORT_EVERY == 0 or done == steps:
                    if progress:
                        progress.report(done, pending)
                    for at, given in enumerate(pending, done - len(pending) + 1):
                        unsound = unsound + 1 if int(given["skipped"]) else 0
                        if unsound == UNSOUND:
                            raise _stopped(workdir, dataset, every.batch, at)
                    pending = []
                if done % every.checkpoint_every == 0 or done == steps:
                    # Without `force` Orbax leaves out a checkpoint while it still writes the one before.
                    saver.save_async(done, state, force=True)
                if progress and takes_samples and (done % every.sample_every == 0 or done == steps):
                    sampler = sampler or Sampler(config, state.params, codec, data)
                    progress.samples(done, sampler.run(state.params, workdir / "samples" / f"{done:06}"))
        finally:
            feed.close()
            if progress:
                progress.close()
            saver.close()
    return state


def _first_parameters(model: InteractionModel, data: Path, vocoder: Params | None, start_from: Path | None) -> Params:
    """Initial parameters, or those of a checkpoint, each process making the parts of its own devices."""
    held = storage.shapes(model)
    if start_from:
        params = storage.start_from(start_from, model, data)
    else:
        params = init_params(model.specs(), model.config.train.seed, jax.tree.map(lambda s: s.sharding, held))
        if vocoder is None:
            logging.warning("no vocoder is carried along: what the checkpoints say is noise until one is (--vocoder)")
    if vocoder is not None:
        params = {**params, "vocoder": vocoder}
    return jax.tree.map(lambda array, shape: _laid_out(array, shape.sharding).astype(shape.dtype), params, held)


def _laid_out(array: jax.Array, sharding: jax.sharding.Sharding) -> jax.Array:
    """The array on all devices of `sharding`, those of other processes included, where it is not there yet."""
    if array.sharding == sharding:
        return array
    host = np.asarray(array)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def _rows() -> NamedSharding:
    """How the rows of a batch lie on the mesh that is set."""
    return NamedSharding(jax.sharding.get_mesh(), PartitionSpec(BATCH_AXES))


def _host_rows(batch: int, mesh: MeshShape) -> HostRows:
    """The rows of the global batch that this process's devices hold; those of one `tensor` group hold the same."""
    if mesh.devices == 1:
        return HostRows()
    held: Any = _rows().addressable_devices_indices_map((batch,))
    return HostRows(tuple(sorted({row for index in held.values() for row in range(batch)[index[0]]})))


def _placed(local: Batch, host_rows: HostRows, batch: int, mesh: MeshShape) -> dict[str, Any]:
    """This process's rows as its part of the global batch."""
    if mesh.devices == 1:
        return local
    position = {row: i for i, row in enumerate(host_rows.positions or range(batch))}

    def placed(rows: np.ndarray) -> jax.Array:
        def part(index: Any) -> np.ndarray:
            wanted = range(batch)[index[0]]
            return rows[position[wanted[0]] : position[wanted[-1]] + 1]

        return jax.make_array_from_callback((batch, *rows.shape[1:]), _rows(), part)

    return {name: placed(rows) for name, rows in local.items()}


def _stopped(workdir: Path, dataset: Dataset, batch: int, last: int) -> InputError:
    """Keeps the batch of the first of the unsound steps that end with `last`, and says so."""
    first = last - UNSOUND + 1
    path = workdir / f"unsound_{first:06}.npz"
    if jax.process_index() == 0:
        feed = batches(dataset, batch, start=first - 1)
        np.savez(path, allow_pickle=False, **next(feed))
        feed.close()
    return InputError(
        f"steps {first} to {last} gave no sound gradient (see train.norm_limit), the first batch is in {path}: "
        "set a lower train.learning_rate and begin a new --workdir, from `jaxtml convert` of this one with --start-from"
    )

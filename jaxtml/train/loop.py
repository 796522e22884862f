"""The training loop: `jaxtml train CONFIG --workdir DIR --data DIR`. Read `train` from top to bottom.

A batch is a function of the dataset and the step, and a checkpoint holds parameters, moments and the step. A run that
was killed therefore resumes with the numbers that it would have had, on any mesh and with any number of processes.

In `workdir`:

- `checkpoints/<step>`: Orbax;
- `config.json`, `tokenizer.json`;
- `data.txt`: a digest of the data, so that a run never resumes on other data;
- `changes.jsonl`: settings that were changed on purpose, with the step;
- `log.jsonl`: a line for each report; `tensorboard/` has the same figures;
- `samples/<step>/`: conversations with voices that training never hears;
- `profile/`: a trace, if asked for;
- `unsound_<step>.npz`: if `MAX_SKIPPED` steps in a row were skipped, the batch of the first of them.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import jax
import numpy as np
from absl import logging

from jaxtml.checkpoint.files import TOKENIZER
from jaxtml.config import Config
from jaxtml.data.cache import CACHE_FOLDER, CachedRows
from jaxtml.data.dataset import ConversationDataset, Dataset, open_dataset
from jaxtml.errors import InputError
from jaxtml.model.interaction import InteractionModel
from jaxtml.model.placement import Placement
from jaxtml.model.spec import Params, count_parameters
from jaxtml.parallel.mesh import MeshShape, make_mesh
from jaxtml.stream.text import TextCodec
from jaxtml.train import storage
from jaxtml.train.feed import BatchFeed, read_batch
from jaxtml.train.gradients import check_batch
from jaxtml.train.parameters import first_parameters
from jaxtml.train.progress import TrainProgress
from jaxtml.train.samples import Sampler
from jaxtml.train.start import Start
from jaxtml.train.step import Metrics, TrainState, make_train_step

REPORT_EVERY = 20  # steps
MAX_SKIPPED = 3  # training stops after this many skipped steps in a row
PROFILE_AFTER = 5  # steps after the start of the process: by then everything is compiled


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
    change_run: bool = False,
) -> TrainState:
    """Trains or resumes in `workdir` up to `config.train.steps` updates.

    Args:
      config: the resolved config. A run resumes with the same config, except for the fields `storage.MAY_CHANGE`.
      workdir: made if it is not there; the same folder for all processes.
      data: from `jaxtml data`: the dataset, `tokenizer.json` and, if rows were written in advance, `cache/`.
      workers: processes that make batches in advance.
      vocoder: trained vocoder parameters to carry in the checkpoints.
      start_from: a checkpoint directory whose parameters, vocoder included, a new run begins with. Moments start at
        zero.
      mesh: the shape of the mesh, which contains all devices of all processes.
      profile: steps to trace into `workdir/profile`; 0 for none.
      change_run: whether the fields `storage.CHANGED_ON_PURPOSE` may differ from those of the run in `workdir`.

    Raises:
      InputError: `data` lacks something, `workdir` holds a run of another config, on other data or with more steps
        done, `start_from` does not fit or has NaN, the mesh does not fit, too few steps are left for a profile, or
        `MAX_SKIPPED` steps in a row were skipped. Errors before the first step leave `workdir` as it was.
    """
    codec = TextCodec.load(data / TOKENIZER)
    _check(config, codec, data, mesh)
    dataset = open_dataset(config, codec, data)
    takes_samples = mesh.devices == 1 and isinstance(dataset, ConversationDataset)
    if (data / CACHE_FOLDER).is_dir():
        dataset = CachedRows.open(config, data / CACHE_FOLDER, dataset)
    model = InteractionModel(config, Placement(mesh, config.train.transport, config.train.capacity))
    total, active = count_parameters(model.specs())
    logging.info("%s: %.2fM parameters, %.2fM active, on %s", config.name, total / 1e6, active / 1e6, mesh)
    if not takes_samples:
        one_device = mesh.devices == 1
        reason = f"dataset {config.data.dataset} has no conversations" if one_device else "they need a single device"
        logging.info("no sample conversations: %s", reason)

    with (
        jax.set_mesh(make_mesh(mesh)) if mesh.devices > 1 else nullcontext(),
        Start(workdir, storage.FOLDERS, storage.FILES) as start,
    ):
        _check_profile(profile, config.train.steps - (storage.newest_step(workdir) or 0))
        storage.claim(workdir, config, data, dataset.digest, change_run=change_run)
        init, step = make_train_step(model)
        compiled_step = jax.jit(step, donate_argnums=0)
        checkpointer = storage.open_checkpointer(workdir)
        if checkpointer.latest is not None:
            first = checkpointer.latest.step
            state = storage.load_state(checkpointer, workdir, first, model)
            logging.info("resumed at step %d", first)
            _warn_of_unused(workdir, first, start_from, vocoder)
        else:
            first = 0
            params = first_parameters(model, data, vocoder, start_from, _warn)
            state = jax.jit(init, donate_argnums=0)(params) if mesh.devices > 1 else init(params)

        steps, batch = config.train.steps, config.train.batch
        feed = BatchFeed(dataset, batch, mesh, first_step=first, workers=workers)
        progress = TrainProgress(workdir, config, first, mesh.devices) if jax.process_index() == 0 else None
        sampler: Sampler | None = None
        unreported: list[Metrics] = []
        skipped = 0  # in a row
        profiled = range(first + PROFILE_AFTER, min(first + PROFILE_AFTER + profile, steps + 1))
        try:
            for done in range(first + 1, steps + 1):
                last = done == steps
                if done in profiled[:1]:
                    jax.profiler.start_trace(str(workdir / "profile"))
                running = unreported[-1]["loss"] if unreported else None
                state, metrics = compiled_step(state, feed.next_batch(running))
                start.succeeded()
                unreported.append(metrics)
                if done in profiled[-1:]:
                    jax.block_until_ready(state)
                    jax.profiler.stop_trace()
                if done % REPORT_EVERY == 0 or last:
                    if progress:
                        progress.report(done, unreported, feed.take_waited_s())
                    for number, metrics in enumerate(unreported, done - len(unreported) + 1):
                        skipped = skipped + 1 if int(metrics["skipped"]) else 0
                        if skipped == MAX_SKIPPED:
                            raise _stop(workdir, dataset, batch, number)
                    unreported = []
                if done % config.train.checkpoint_every == 0 or last:
                    # Without `force` Orbax skips a checkpoint while it still writes the previous checkpoint.
                    checkpointer.save_async(done, state, force=True)
                if progress and takes_samples and (done % config.train.sample_every == 0 or last):
                    sampler = sampler or Sampler(config, state.params, codec, data)
                    progress.samples(done, sampler.run(state.params, workdir / "samples" / f"{done:06}"))
        finally:
            feed.close()
            if progress:
                progress.close()
            checkpointer.close()
    return state


def _check(config: Config, codec: TextCodec, data: Path, mesh: MeshShape) -> None:
    """Raises `InputError` where config, tokenizer, mesh and devices do not fit each other."""
    room = config.duplex.control_base
    if codec.size > room:
        raise InputError(
            f"{data / TOKENIZER} has {codec.size} entries, {config.name} has room for {room} (duplex.control_base): "
            "make the data with this config"
        )
    check_batch(config.train, mesh)
    if config.train.transport == "ragged" and mesh.expert > 1 and jax.default_backend() == "cpu":
        raise InputError("train.transport ragged: a CPU has no ragged_all_to_all; set train.transport=ring")
    if mesh.devices < jax.process_count():
        raise InputError(
            f"mesh {mesh} is smaller than the {jax.process_count()} processes: name a --mesh of all their devices"
        )


def _check_profile(profile: int, left: int) -> None:
    """Raises `InputError` if the run ends before a profile of `profile` steps does. `left` steps are left."""
    if profile and left < PROFILE_AFTER + profile - 1:
        raise InputError(
            f"--profile {profile} needs {PROFILE_AFTER + profile - 1} steps, because it begins with the "
            f"{PROFILE_AFTER}th, and the run has {max(left, 0)} left: give more --steps, or a shorter profile"
        )


def _warn(line: str) -> None:
    """Logs a warning about how the run begins.

    `jaxtml.train.parameters` warns with this function too. So all such warnings have the name of this file in the log.
    """
    logging.warning("%s", line)


def _warn_of_unused(workdir: Path, step: int, start_from: Path | None, vocoder: Params | None) -> None:
    """Says which arguments of a run that resumes have no effect. A job that is started again repeats them all."""
    unused = [name for name, value in (("--start-from", start_from), ("--vocoder", vocoder)) if value is not None]
    if unused:
        logging.warning(
            "%s: no effect, because %s resumed with its own parameters of step %d; to begin with others, name a new "
            "--workdir", " and ".join(unused), workdir, step,
        )  # fmt: skip


def _stop(workdir: Path, dataset: Dataset, batch: int, last: int) -> InputError:
    """Saves the batch of the first skipped step, and returns the error to raise.

    Steps `last - MAX_SKIPPED + 1` to `last` were skipped.
    """
    first = last - MAX_SKIPPED + 1
    path = workdir / f"unsound_{first:06}.npz"
    if jax.process_index() == 0:
        np.savez(path, allow_pickle=False, **read_batch(dataset, batch, first - 1))
    return InputError(
        f"steps {first} to {last} were skipped: their gradients are not finite or their norm is not below "
        f"train.norm_limit; the first batch is in {path}. Set a lower train.learning_rate and begin a new --workdir, "
        "with --start-from a checkpoint that `jaxtml convert` makes of this run"
    )

"""The command line: `jaxtml COMMAND ...`. Parses, calls, prints; the work is in the modules that each command names.

Bad input ends with one line on stderr and exit status 2. `--json` prints machine-readable output alone on stdout.
"""

from __future__ import annotations

import argparse
import atexit
import dataclasses
import gc
import itertools
import json
import logging as standard
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import app, logging
from absl.flags import argparse_flags

from jaxtml import config as configs
from jaxtml.checkpoint.files import SHIPPED
from jaxtml.commands.arguments import count
from jaxtml.errors import InputError

VOCODER_STEPS = 5000
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxtml" / "compiled"


def info(args: argparse.Namespace) -> None:
    from jaxtml.checkpoint.source import spec_table
    from jaxtml.convert import inspection as inspect
    from jaxtml.model.interaction import group_of
    from jaxtml.model.spec import count_parameters

    checkpoint = None
    if Path(args.config).is_dir():
        if args.set:
            raise InputError(f"{args.config} is a checkpoint: its config cannot be --set")
        config, specs, checkpoint = inspect.describe_checkpoint(args.config)
        if args.verify:
            checkpoint["verified"] = inspect.verify_manifest(args.config)
    elif args.verify:
        raise InputError(f"{args.config} is no checkpoint: there is nothing to --verify")
    else:
        config = configs.load(args.config, args.set)
        specs = spec_table(config)
    parts: dict[str, dict[str, object]] = {}
    for path, spec in specs.items():
        parts.setdefault(group_of(path, spec), {})[path] = spec
    groups = {
        name: count_parameters(table)
        for name, table in sorted(parts.items(), key=lambda part: -count_parameters(part[1])[0])
    }
    total, active = (sum(group[i] for group in groups.values()) for i in (0, 1))
    result = {
        "config": dataclasses.asdict(config),
        "params_total": total,
        "params_active": active,
        "groups": {name: {"total": t, "active": a} for name, (t, a) in groups.items()},
        **({"checkpoint": checkpoint} if checkpoint else {}),
    }
    if args.json:
        print(json.dumps(result))
        return
    print(configs.to_json(config), end="")
    width = max(map(len, groups))
    for name, (t, a) in groups.items():
        print(f"{name:{width}}  {t:>16,}  {a:>16,}")
    print(f"{'parameters':{width}}  {total:>16,}  {active:>16,} active per token")
    if checkpoint:
        held = ", ".join(f"{n:,} {dtype}" for dtype, n in checkpoint["dtypes"].items())
        step = f" at step {checkpoint['step']}" if checkpoint["step"] is not None else ""
        print(f"{checkpoint['kind']}{step}, {checkpoint['bytes'] / 1e9:.3f} GB: {held}")
        print(f"good for: {', '.join(checkpoint['uses'])}")
        if args.verify:
            print(f"verified: {checkpoint['verified']} tensors are as they were written")


def converse(args: argparse.Namespace) -> None:
    from jaxtml.session import recording
    from jaxtml.session.engine import Engine
    from jaxtml.session.timeline import print_turn

    wave = recording.read_recording(args.input)
    _writable(args.out, args.events, args.stereo, args.picture, spared=args.input)
    engine = Engine.load(args.checkpoint)
    show = (lambda record: None) if args.json else print_turn
    reply = recording.run(engine, wave, seed=args.seed, video=args.video, realtime=args.realtime, on_turn=show)
    recording.write_wav(args.out, reply.wave)
    if args.events:
        recording.write_events(args.events, reply)
    if args.stereo:
        recording.write_stereo(args.stereo, wave, reply)
    if args.picture:
        recording.draw(args.picture, wave, reply)
    summary = recording.summarise(wave, reply)
    print(json.dumps(dataclasses.asdict(summary)) if args.json else summary.sentence())


def serve(args: argparse.Namespace) -> None:
    from jaxtml.serve import serving as command
    from jaxtml.serve.sessions.manager import Limits

    command.serve(
        command.ServerOptions(
            checkpoint=Path(args.checkpoint),
            host=args.host,
            port=args.port,
            max_sessions=args.max_sessions,
            workers=args.workers,
            mesh=args.mesh,
            replica=args.replica,
            keys=args.keys,
            origins=args.allow_origin,
            certificate=args.tls_cert,
            private_key=args.tls_key,
            limits=Limits(session_s=60 * args.session_minutes, grace_s=args.resume_seconds),
            drain_s=args.drain_seconds,
            json=args.json,
            log_json=args.log_json,
        )
    )


def logits(args: argparse.Namespace) -> None:
    from jaxtml.convert.logits import token_logits

    _writable(args.out, spared=args.tokens)
    token_logits(args.checkpoint, args.tokens, args.out)


def train(args: argparse.Namespace) -> None:
    import jax

    from jaxtml.parallel.mesh import MeshShape
    from jaxtml.parallel.processes import join_processes
    from jaxtml.train.loop import train
    from jaxtml.train.vocoder.training import train_vocoder, trained

    join_processes()

    workdir = Path(args.workdir)
    data = Path(args.data) if args.data else workdir / "data"
    if args.config == "vocoder":
        train_vocoder(configs.load(args.base, args.set), [data / "bank"], workdir, args.steps or VOCODER_STEPS)
        return
    overrides = [*args.set, f"train.steps={args.steps}"] if args.steps else args.set
    config = configs.load(args.config, overrides)
    vocoder = None
    if args.vocoder:
        theirs, vocoder = trained(args.vocoder)
        if theirs.vocoder != config.vocoder:
            raise InputError(f"{args.vocoder} trained another vocoder than {config.name} has")
    start_from = Path(args.start_from) if args.start_from else None
    mesh = MeshShape.parse(args.mesh) if args.mesh else MeshShape(data=jax.device_count())
    train(
        config,
        workdir,
        data,
        workers=args.workers,
        vocoder=vocoder,
        start_from=start_from,
        mesh=mesh,
        profile=args.profile,
    )


def data(args: argparse.Namespace) -> None:
    from jaxtml.data import cache, examples
    from jaxtml.data.dataset import ConversationDataset, build_dataset, open_dataset
    from jaxtml.data.tasks import scenarios
    from jaxtml.stream.text import TextCodec

    config = configs.load(args.config, args.set)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = out / "tokenizer.json"
    if not tokenizer.exists():
        size = min(config.duplex.control_base, 640)
        TextCodec.train(scenarios.corpus(), size).save(tokenizer)
    if not args.no_build:
        build_dataset(config, out, args.workers)
    if not args.show and not args.rows:
        return
    dataset = open_dataset(config, TextCodec.load(tokenizer), out)
    if not isinstance(dataset, ConversationDataset):
        raise InputError(f"dataset {config.data.dataset} has no conversations: leave out --show and --rows")
    if args.rows:
        cache.build(dataset, out / cache.CACHE_FOLDER, args.rows, args.workers)
    if args.show:
        talks = map(dataset.conversation, itertools.count())
        for text in examples.write_examples(talks, out / "examples", args.show):
            print(text)


def plan(args: argparse.Namespace) -> None:
    from jaxtml.plan import planning as command
    from jaxtml.plan.report_text import format_report

    make = command.search_largest_plan if args.search else command.make_plan
    report = make(configs.load(args.config, args.set), args.topology, args.mesh, args.program)
    print(json.dumps(report) if args.json else format_report(report))


def convert(args: argparse.Namespace) -> None:
    gc.disable()  # half a second of loading modules and of Orbax, and nothing that a conversion lets go of has cycles
    from jaxtml.convert.conversion import convert

    print(convert(args.src, args.dst, to=args.to, dtype=args.dtype, begin_as=args.begin_as, verify=args.verify))


def _writable(*paths: str | None, spared: str) -> None:
    """Refuses before the long work what could not be written after it, or would overwrite the input `spared`."""
    taken = {Path(spared).resolve(): "it is the input"}
    for path in filter(None, paths):
        place = Path(path).resolve()
        if not place.parent.is_dir():
            raise InputError(f"cannot write {path}: there is no folder {place.parent}")
        if place.is_dir() or not os.access(place if place.exists() else place.parent, os.W_OK):
            raise InputError(f"cannot write {path}: it is a folder, or its permissions do not allow it")
        if place in taken:
            raise InputError(f"cannot write {path}: {taken[place]}")
        taken[place] = "it is named twice"


def parser() -> argparse.ArgumentParser:
    top = argparse_flags.ArgumentParser(prog="jaxtml", description="Full-duplex interaction models in JAX.")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(run, name: str, about: str, example: str) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name,
            help=about,
            description=about,
            epilog=f"example: jaxtml {example}",
        )
        command.set_defaults(run=run)
        return command

    def add_config(command: argparse.ArgumentParser, text: str = "a name in configs/, or a path") -> None:
        command.add_argument("config", metavar="CONFIG", help=text)
        command.add_argument("--set", action="append", default=[], metavar="A.B=C", help="override a field")

    def add_checkpoint(command: argparse.ArgumentParser) -> None:
        command.add_argument("--checkpoint", default=SHIPPED, metavar="DIR", help="default: the shipped tiny")

    command = add(
        info, "info", "a resolved config and its parameter count, or what a checkpoint is", "info tiny --json"
    )
    add_config(command, "a name in configs/, a path, or the directory of a checkpoint or a training run")
    command.add_argument(
        "--verify", action="store_true", help="read a converted checkpoint and hold it to its manifest's checksums"
    )
    command.add_argument(
        "--json", action="store_true", help="JSON on stdout: config, params_total, params_active, groups, checkpoint"
    )

    command = add(
        converse,
        "converse",
        "a full-duplex session over a recording",
        "converse --in user.wav --out reply.wav --stereo both.wav",
    )
    add_checkpoint(command)
    command.add_argument(
        "--in", dest="input", required=True, metavar="WAV", help="what the user says: wav, flac, ogg, mp3"
    )
    command.add_argument(
        "--out", required=True, metavar="WAV", help="the reply, on the clock and of the length of the input"
    )
    command.add_argument("--events", metavar="JSONL", help="one record per micro-turn")
    command.add_argument("--stereo", metavar="WAV", help="user left, model right")
    command.add_argument("--picture", metavar="PNG", help="the session as a timeline")
    command.add_argument("--video", metavar="FILE", help="what the camera saw meanwhile")
    command.add_argument("--seed", type=int, default=0, help="of the sampling")
    command.add_argument(
        "--realtime", action="store_true", help="hear the recording at the pace at which it was spoken"
    )
    command.add_argument("--json", action="store_true", help="the summary as JSON, nothing else, on stdout")

    command = add(serve, "serve", "the duplex server", "serve --port 8080 --max-sessions 24")
    add_checkpoint(command)
    command.add_argument("--host", default="127.0.0.1", metavar="H", help="another than loopback needs --keys")
    command.add_argument("--port", type=int, default=8080, metavar="P", help="0: any that is free")
    command.add_argument("--max-sessions", type=count, default=8, metavar="N", help="at a time; others are refused")
    command.add_argument(
        "--workers", type=int, default=0, metavar="N", help="processes with the model; default: one, on CPUs one a core"
    )
    command.add_argument(
        "--mesh", default="", metavar="AXES", help="devices that share the model, as data=2,expert=4; default: one"
    )
    command.add_argument(
        "--replica", default="", metavar="NAME", help="its name among several behind a router: see launch/nginx.conf"
    )
    command.add_argument("--keys", type=Path, metavar="FILE", help="who may use it: see jaxtml/serve/access.py")
    command.add_argument(
        "--allow-origin", action="append", default=[], metavar="URL", help="pages that may use it, beside its own"
    )
    command.add_argument("--tls-cert", type=Path, metavar="PEM", help="certificate chain: https and wss")
    command.add_argument("--tls-key", type=Path, metavar="PEM", help="its private key, if not in the same file")
    command.add_argument("--session-minutes", type=float, default=120, metavar="M", help="the longest a session may be")
    command.add_argument(
        "--resume-seconds", type=float, default=30, metavar="S", help="how long a client may be gone and come back"
    )
    command.add_argument(
        "--drain-seconds", type=float, default=30, metavar="S", help="for sessions to end, after SIGTERM"
    )
    command.add_argument("--json", action="store_true", help="where it is as JSON, nothing else, on stdout")
    command.add_argument("--log-json", action="store_true", help="the log as a line of JSON for each event")

    command = add(
        logits,
        "logits",
        "teacher-forced text logits [B, T, V] float32",
        "logits --checkpoint DIR --tokens ids.npy --out logits.npy",
    )
    add_checkpoint(command)
    command.add_argument("--tokens", required=True, metavar="NPY", help="int [B, T] or [T] token ids")
    command.add_argument("--out", required=True, metavar="NPY")

    command = add(train, "train", "train or resume a model, or the vocoder", "train tiny --workdir run --data data")
    add_config(command, "a name in configs/, a path, or `vocoder`")
    command.add_argument("--workdir", required=True, metavar="DIR")
    command.add_argument("--data", metavar="DIR", help="from `jaxtml data`; default: WORKDIR/data")
    command.add_argument(
        "--steps", type=count, help=f"default: train.steps of the config; {VOCODER_STEPS} for the vocoder"
    )
    command.add_argument(
        "--vocoder", metavar="DIR", help="run of `train vocoder`, or a checkpoint, whose vocoder is extra_files"
    )
    command.add_argument("--start-from", metavar="DIR", help="checkpoint whose parameters a new run begins with")
    command.add_argument("--base", default="tiny", metavar="CONFIG", help="whose vocoder `train vocoder` trains")
    command.add_argument("--workers", type=count, default=1, help="processes that make batches in advance")
    command.add_argument("--mesh", metavar="AXES", help="as data=16,expert=8; default: data over all devices")
    command.add_argument("--profile", type=count, default=0, metavar="N", help="trace N steps into WORKDIR/profile")

    command = add(data, "data", "build or inspect training data", "data tiny --out data --show 5")
    add_config(command)
    command.add_argument("--out", required=True, metavar="DIR", help="gets bank/, tokenizer.json, examples/")
    command.add_argument("--show", type=count, default=0, metavar="K", help="write K examples as WAV + picture")
    command.add_argument("--workers", type=count, default=2, help="processes that synthesise speech")
    command.add_argument("--rows", type=count, metavar="N", help="also write N encoded rows to OUT/cache for `train`")
    command.add_argument("--no-build", action="store_true", help="use the bank as far as it is built")

    command = add(
        plan,
        "plan",
        "compile a training step or a server's micro-turn for hardware that is not here",
        "plan tml_interaction_small --topology v5p:4x4x8 --mesh data=16,expert=8 --set train.batch=128",
    )
    add_config(command)
    command.add_argument("--topology", required=True, metavar="T", help="as v5p:4x4x8, v6e:16x16, tpu7x:4x4x8")
    command.add_argument("--program", choices=("train", "serve"), default="train")
    command.add_argument(
        "--mesh", metavar="AXES", help="as data=16,expert=8; default: data, or expert and tensor, over all"
    )
    command.add_argument("--search", action="store_true", help="find the largest batch, and remat, that fit")
    command.add_argument("--json", action="store_true", help="one JSON object on stdout")

    command = add(convert, "convert", "checkpoints in and out", "convert inkling_dir out --to orbax --verify")
    command.add_argument("src", metavar="SRC", help="a checkpoint directory (ours or released), or a training workdir")
    command.add_argument("dst", metavar="DST")
    command.add_argument("--to", choices=("orbax", "hf"), default="orbax")
    command.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="default: each parameter's own; Inkling's gate biases and scales stay float32",
    )
    command.add_argument(
        "--as",
        dest="begin_as",
        metavar="CONFIG",
        help="a config that begins with SRC's weights, its new layers neutral",
    )
    command.add_argument(
        "--verify",
        action="store_true",
        help="read the result back and compare every tensor, and logits where memory allows, before it is called DST; "
        "or verify a DST that the same conversion made",
    )
    return top


def main(args: argparse.Namespace) -> int:
    # As variables, so that the processes which a command starts have them too.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
    import jax

    logging.use_absl_handler()
    logging.set_verbosity(logging.INFO)
    # Orbax and JAX tell their lives at this level, through the same logger.
    ours = str(Path(__file__).resolve().parents[1])
    logging.get_absl_handler().addFilter(lambda r: r.levelno > standard.INFO or r.pathname.startswith(ours))
    jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
    minimum_s = float(os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", minimum_s)
    try:
        args.run(args)
    except (InputError, OSError) as error:  # OSError: a full disk, a folder where a file should be
        print(f"jaxtml {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def run(argv: Sequence[str] | None = None) -> None:
    """Entry point of the console script."""
    atexit.register(gc.freeze)  # else Python looks through all of JAX once more as it ends: a third of a second
    app.run(main, argv=list(argv or sys.argv), flags_parser=lambda a: parser().parse_args(a[1:]))


if __name__ == "__main__":
    run()

"""`jaxtml info`: prints a resolved config and its parameter counts, or what a checkpoint is and holds."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtml import config as configs
from jaxtml.commands.arguments import add_config
from jaxtml.errors import InputError
from jaxtml.strict_json import dumps

if TYPE_CHECKING:  # heavy to import
    from jaxtml.convert.inspection import Description
    from jaxtml.model.spec import ParamSpec

HELP = "print a resolved config and its parameter count, or what a checkpoint holds"
EXAMPLE = "info tiny --json"

Counts = tuple[int, int]
"""How many parameters there are, and how many of them one token uses."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser, "the name of a config in configs/, its path, or the directory of a checkpoint or training run")
    parser.add_argument(
        "--verify",
        action="store_true",
        help="read a converted checkpoint and compare every tensor and file with the checksums in its manifest",
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object with config, params_total, params_active, groups and session_bytes; if CONFIG is a "
        "directory, the object also has checkpoint",
    )


def run(args: argparse.Namespace) -> None:
    """Prints the report of `args.config`. Raises `InputError` if there is no such config or checkpoint."""
    is_directory = Path(args.config).is_dir()
    if is_directory and args.set:
        raise InputError(f"{args.config} is a checkpoint, and its config is fixed: leave out --set")
    if args.verify and not is_directory:
        raise InputError(f"{args.config} is not a checkpoint: --verify needs the directory of a converted checkpoint")
    if not is_directory:
        _check_config_name(args.config)
    if is_directory:
        _run_on_checkpoint(args)
    else:
        _run_on_config(args)


def _check_config_name(name: str) -> None:
    """Raises `InputError` for a name that looks like the path of a checkpoint, and is no directory."""
    path = Path(name)
    if path.suffix in (".py", ".json"):
        return
    if path.exists() and not path.is_dir():
        raise InputError(f"{name} is a file: name the directory of the checkpoint, or a config (.py or .json)")
    if len(path.parts) > 1:
        raise InputError(f"there is no directory {name}: name the directory of a checkpoint, or a config")
    if name not in configs.names():
        raise InputError(
            f"no config {name!r}, and no such directory: give one of {', '.join(configs.names())}, a path to a .py or "
            ".json file, or the directory of a checkpoint or training run"
        )


def _run_on_config(args: argparse.Namespace) -> None:
    from jaxtml.checkpoint.source import spec_table

    config = configs.load(args.config, args.set)
    groups = _count_groups(spec_table(config))
    if args.json:
        print(dumps(_config_report(config, groups)))
    else:
        _print_config(config, groups)


def _run_on_checkpoint(args: argparse.Namespace) -> None:
    from jaxtml.convert.inspection import describe_checkpoint, verify_manifest

    description = describe_checkpoint(args.config)
    verified = {"verified": verify_manifest(args.config)} if args.verify else {}
    groups = _count_groups(description.specs)
    if args.json:
        checkpoint = {
            "kind": description.kind,
            "step": description.step,
            "dtypes": description.dtypes,
            "bytes": description.nbytes,
            "uses": description.uses,
            "lacks": description.lacks,
            **verified,
        }
        print(dumps(_config_report(description.config, groups) | {"checkpoint": checkpoint}))
    else:
        _print_config(description.config, groups)
        _print_checkpoint(description)
        if verified:
            print(f"verified: {verified['verified']} tensors are as they were written")


def _count_groups(specs: dict[str, ParamSpec]) -> dict[str, Counts]:
    """Counts the parameters of each group of the model. The largest group comes first."""
    from jaxtml.model.interaction import group_of
    from jaxtml.model.spec import count_parameters

    tables: dict[str, dict[str, ParamSpec]] = {}
    for path, spec in specs.items():
        tables.setdefault(group_of(path, spec), {})[path] = spec
    groups = {name: count_parameters(table) for name, table in tables.items()}
    return dict(sorted(groups.items(), key=lambda group: -group[1][0]))


def _sum_groups(groups: dict[str, Counts]) -> Counts:
    return sum(total for total, _ in groups.values()), sum(active for _, active in groups.values())


def _session_bytes(config: configs.Config) -> int:
    from jaxtml.model.duplex.state import session_bytes
    from jaxtml.model.interaction import InteractionModel

    return session_bytes(InteractionModel(config))


def _config_report(config: configs.Config, groups: dict[str, Counts]) -> dict[str, Any]:
    total, active = _sum_groups(groups)
    return {
        "config": dataclasses.asdict(config),
        "params_total": total,
        "params_active": active,
        "groups": {name: {"total": counts[0], "active": counts[1]} for name, counts in groups.items()},
        "session_bytes": _session_bytes(config),
    }


def _print_config(config: configs.Config, groups: dict[str, Counts]) -> None:
    print(configs.to_json(config), end="")
    width = max(map(len, groups))
    for name, (total, active) in groups.items():
        print(f"{name:{width}}  {total:>16,}  {active:>16,}")
    total, active = _sum_groups(groups)
    print(f"{'parameters':{width}}  {total:>16,}  {active:>16,} active per token")
    b = config.backbone
    kind = b.global_ if b.global_layers else b.sliding
    retained = f", and before them {kind.retained:,} tokens of text" if kind.retained else ""
    print(f"a session takes {_session_bytes(config):,} bytes and sees its last {kind.window:,} tokens{retained}")


def _print_checkpoint(description: Description) -> None:
    numbers = ", ".join(f"{n:,} {dtype}" for dtype, n in description.dtypes.items())
    step = f" at step {description.step}" if description.step is not None else ""
    print(f"{description.kind}{step}, {description.nbytes / 1e9:.3f} GB: {numbers}")
    print(f"good for: {', '.join(description.uses)}")
    for line in description.lacks:
        print(line)

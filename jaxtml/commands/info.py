"""`jaxtml info`: prints a resolved config and its parameter counts, or what a checkpoint is and holds."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtml import config as configs
from jaxtml.commands.arguments import add_config
from jaxtml.errors import InputError

if TYPE_CHECKING:  # heavy to import
    from jaxtml.model.spec import ParamSpec

HELP = "print a resolved config and its parameter count, or what a checkpoint holds"
EXAMPLE = "info tiny --json"

Counts = dict[str, tuple[int, int]]  # group -> (all parameters, parameters active per token)


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
        help="print one JSON object: config, params_total, params_active, groups; of a directory, checkpoint too",
    )


def run(args: argparse.Namespace) -> None:
    """Prints the report of `args.config`. Raises `InputError` where there is no such config or checkpoint."""
    config, specs, checkpoint = _inspect(args)
    groups = _count_groups(specs)
    total, active = (sum(counts[i] for counts in groups.values()) for i in (0, 1))
    if args.json:
        report: dict[str, Any] = {
            "config": dataclasses.asdict(config),
            "params_total": total,
            "params_active": active,
            "groups": {name: {"total": all_, "active": active_} for name, (all_, active_) in groups.items()},
        }
        if checkpoint:
            report["checkpoint"] = checkpoint
        print(json.dumps(report))
        return
    print(configs.to_json(config), end="")
    width = max(map(len, groups))
    for name, (all_, active_) in groups.items():
        print(f"{name:{width}}  {all_:>16,}  {active_:>16,}")
    print(f"{'parameters':{width}}  {total:>16,}  {active:>16,} active per token")
    if checkpoint:
        _print_checkpoint(checkpoint)


def _inspect(args: argparse.Namespace) -> tuple[configs.Config, dict[str, ParamSpec], dict[str, Any] | None]:
    """Returns the config, the parameter specs, and the description of the checkpoint (None for a config by name)."""
    from jaxtml.checkpoint.source import spec_table
    from jaxtml.convert import inspection

    if Path(args.config).is_dir():
        if args.set:
            raise InputError(f"{args.config} is a checkpoint, and its config is fixed: leave out --set")
        config, specs, checkpoint = inspection.describe_checkpoint(args.config)
        if args.verify:
            checkpoint["verified"] = inspection.verify_manifest(args.config)
        return config, specs, checkpoint
    if args.verify:
        raise InputError(f"{args.config} is not a checkpoint: --verify needs the directory of a converted one")
    config = configs.load(args.config, args.set)
    return config, spec_table(config), None


def _count_groups(specs: dict[str, ParamSpec]) -> Counts:
    """Counts the parameters of each group of the model. The largest group comes first."""
    from jaxtml.model.interaction import group_of
    from jaxtml.model.spec import count_parameters

    tables: dict[str, dict[str, ParamSpec]] = {}
    for path, spec in specs.items():
        tables.setdefault(group_of(path, spec), {})[path] = spec
    counts = {name: count_parameters(table) for name, table in tables.items()}
    return dict(sorted(counts.items(), key=lambda group: -group[1][0]))


def _print_checkpoint(checkpoint: dict[str, Any]) -> None:
    numbers = ", ".join(f"{n:,} {dtype}" for dtype, n in checkpoint["dtypes"].items())
    step = f" at step {checkpoint['step']}" if checkpoint["step"] is not None else ""
    print(f"{checkpoint['kind']}{step}, {checkpoint['bytes'] / 1e9:.3f} GB: {numbers}")
    print(f"good for: {', '.join(checkpoint['uses'])}")
    if "verified" in checkpoint:
        print(f"verified: {checkpoint['verified']} tensors are as they were written")

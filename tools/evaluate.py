#!/usr/bin/env python3
"""Evaluates a model on the short-answer task: what it hears, when it speaks, what it answers, and how its voice sounds.

`tiny` is trained on the short-answer task (docs/evaluation.md): to repeat words, to add small numbers and to answer a
few set phrases.

The model holds sessions with voices that training never hears: the split "test" of the speech bank (synthetic voices
and recorded people), and a person's recorded prompts (apt-get install asterisk-core-sounds-en-g722
asterisk-core-sounds-en-wav). Whisper tiny.en judges whether the model's own voice can be understood (see
jaxtml/evals/judge.py). If recordings or Whisper are not installed, the tool leaves out the metrics that need them, and
the report says so.

`--out` gets the results as JSON, the sessions as WAVs, and a picture. An evaluation that was interrupted goes on when
the same command runs again.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from rich.console import Console

from jaxtml.commands.arguments import count, run_tool, tool_parser
from jaxtml.data.bank import Bank
from jaxtml.data.talks.recorded_prompts import Prompts
from jaxtml.errors import InputError
from jaxtml.evals import metrics, report, run
from jaxtml.evals.baseline import judge_baseline
from jaxtml.evals.judge import NAME, Judge
from jaxtml.evals.material import SEED, EvaluationTalk, human_talks, people_talks, synthetic_talks
from jaxtml.evals.outcomes import uninterrupted_stretches
from jaxtml.evals.scores import score
from jaxtml.session.engine import Engine
from jaxtml.strict_json import dumps


def choose_sessions(
    args: argparse.Namespace, bank: Bank | None, micro_turns: int
) -> tuple[list[EvaluationTalk], dict[str, object], list[str]]:
    """Returns the sessions to hold, a description of their material for the report, and what is left out and why."""
    talks, left_out = [], []
    material: dict[str, object] = {"seed": SEED, "listened": args.listened}
    if args.synthetic > 0:
        if bank is None:
            raise InputError("--synthetic needs --bank DIR (or give --synthetic 0)")
        talks += synthetic_talks(bank, args.synthetic, micro_turns)
        material |= {"synthetic": args.synthetic, "bank": bank.digest[:16], "bank_complete": bank.complete}
    if args.people > 0:
        try:
            if bank is None:
                raise InputError("--people needs --bank DIR")
            talks += people_talks(bank, args.people, micro_turns)
            material |= {"people": args.people}
        except InputError as error:
            left_out.append(f"recorded people: {error}")
    if args.human > 0:
        try:
            prompts = Prompts.read()
            talks += human_talks(prompts, args.human)
            material |= {"human": args.human, "prompts": prompts.source}
        except InputError as error:
            left_out.append(f"human speech: {error}")
    return talks, material, left_out


def evaluate(args: argparse.Namespace) -> None:
    console = Console(width=150)
    engine = Engine.load(args.workdir or args.checkpoint)
    bank = Bank.open(args.bank) if args.bank else None
    talks, material, left_out = choose_sessions(args, bank, engine.config.data.turns)
    try:
        judge = Judge.open(args.threads)
    except InputError as error:
        judge = None
        left_out.append(f"the model's own voice: {error}")
    for line in left_out:
        console.print(f"left out: {line}")
    if not talks:
        raise InputError("nothing to evaluate: give --synthetic N or --human N above 0")

    settings = run.EvaluationSettings(run.parameter_digest(engine), material, NAME if judge else "not installed")
    sessions = run.hold_sessions(engine, talks, args.out, settings, judge, args.listened)
    scores = score(sessions)
    if judge is not None and bank is not None:
        stretches = [s.stretches[n] for s in sessions for n in uninterrupted_stretches(s)]
        judged = [stretch.text for stretch in stretches if stretch.understood is not None]
        scores["rows"].append(metrics.to_json(judge_baseline(judge, bank, judged, args.out)))
    head = {
        "command": shlex.join(["tools/evaluate.py", *sys.argv[1:]]),
        "model": settings.model,
        "material": material,
        "listener": settings.listener,
        "left_out": left_out,
    }
    (args.out / run.RESULTS).write_text(dumps(head | scores, indent=1) + "\n")
    console.print(report.metrics_table(scores["rows"]))
    for name, groups in scores["sets"].items():
        for by in ("intents", "scenes", "voices"):
            console.print(report.breakdown_table(f"{name}, by {by.removesuffix('s')}", groups[by]))
    report.save_picture(args.out / "summary.png", sessions, scores, f"{engine.config.name} {settings.model}")
    console.print(f"{args.out}: {run.RESULTS}, {run.RECORDS}, wavs/, summary.png")


if __name__ == "__main__":
    parser = tool_parser(
        __doc__, "tools/evaluate.py --checkpoint jaxtml/assets/tiny --bank data/bank --out out/evaluation"
    )
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--checkpoint", type=Path, metavar="DIR", help="a checkpoint directory")
    model.add_argument("--workdir", type=Path, metavar="DIR", help="a training run, whose newest checkpoint is taken")
    parser.add_argument("--bank", type=Path, metavar="DIR", help="the speech bank, for --synthetic")
    parser.add_argument("--out", type=Path, metavar="DIR", required=True, help="folder for the results")
    parser.add_argument(
        "--synthetic", type=int, default=100, metavar="N", help="sessions with synthetic voices (default: 100)"
    )
    parser.add_argument(
        "--human", type=int, default=100, metavar="N", help="sessions with a person's voice (default: 100)"
    )
    parser.add_argument(
        "--people",
        type=int,
        default=80,
        metavar="N",
        help="sessions with recorded people of the bank, in a quarter of which they talk to each other (default: 80)",
    )
    parser.add_argument(
        "--listened",
        type=int,
        default=150,
        metavar="N",
        help="the most utterances of the model that Whisper judges, in the synthetic sessions and again in the human "
        "sessions (default: 150)",
    )
    parser.add_argument("--threads", type=count, default=1, help="CPU threads of Whisper (default: 1)")
    run_tool(parser, evaluate)

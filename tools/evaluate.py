#!/usr/bin/env python3
"""Holds a model to the bars of the first task: what it hears, when it speaks, what it answers, how it sounds.

    tools/evaluate.py --checkpoint DIR --bank DIR --out DIR [--synthetic 100] [--human 100]
    tools/evaluate.py --workdir RUN ...        the newest checkpoint of a training run

Sessions with voices that training never hears: the bank's split "test", and a person's recorded prompts
(apt-get install asterisk-core-sounds-en-g722 asterisk-core-sounds-en-wav). Whisper tiny.en judges the model's voice
(see jaxtml/evals/judge.py). What is not installed is left out, and named. Resumable: the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path

from rich.console import Console

from jaxtml.data.bank import Bank
from jaxtml.data.talks.recorded_prompts import Prompts
from jaxtml.errors import InputError
from jaxtml.evals import metrics, report, run
from jaxtml.evals.baseline import judge_baseline
from jaxtml.evals.judge import NAME, Judge
from jaxtml.evals.material import SEED, human_talks, synthetic_talks
from jaxtml.evals.outcomes import uninterrupted_stretches
from jaxtml.evals.scores import score
from jaxtml.session.engine import Engine


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--checkpoint", type=Path, help="a checkpoint directory")
    model.add_argument("--workdir", type=Path, help="a training run: its newest checkpoint")
    parser.add_argument("--bank", type=Path, help="the utterance bank, for --synthetic")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--synthetic", type=int, default=100, metavar="N", help="sessions with synthetic voices (100)")
    parser.add_argument("--human", type=int, default=100, metavar="N", help="sessions with a person's voice (100)")
    parser.add_argument("--listened", type=int, default=150, metavar="N",
                        help="stretches of the model's speech per set that are listened to (150)")  # fmt: skip
    parser.add_argument("--threads", type=int, default=1, help="of the independent listener (1)")
    return parser.parse_args()


def evaluate(args: argparse.Namespace, console: Console) -> None:
    engine = Engine.load(args.workdir or args.checkpoint)
    talks, skipped = [], []
    material: dict[str, object] = {"seed": SEED, "listened": args.listened}
    bank = Bank.open(args.bank) if args.bank else None
    if args.synthetic and bank is None:
        raise InputError("--synthetic needs --bank DIR (or give --synthetic 0)")
    if args.synthetic and bank is not None:
        talks += synthetic_talks(bank, args.synthetic, engine.config.data.turns)
        material |= {"synthetic": args.synthetic, "bank": bank.digest[:16], "bank_complete": bank.complete}
    if args.human:
        try:
            prompts = Prompts.read()
            talks += human_talks(prompts, args.human)
            material |= {"human": args.human, "prompts": prompts.source}
        except InputError as error:
            skipped.append(f"human speech: {error}")
    try:
        judge = Judge.open(args.threads)
    except InputError as error:
        judge = None
        skipped.append(f"the model's own voice: {error}")
    for line in skipped:
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
    head = {"command": shlex.join(["tools/evaluate.py", *sys.argv[1:]]), "model": settings.model, "material": material,
            "listener": settings.listener, "left_out": skipped}  # fmt: skip
    (args.out / run.RESULTS).write_text(json.dumps(head | scores, indent=1) + "\n")
    console.print(report.metrics_table(scores["rows"]))
    for name, groups in scores["sets"].items():
        console.print(report.breakdown_table(f"{name}, by intent", groups["intents"]))
        console.print(report.breakdown_table(f"{name}, by scene", groups["scenes"]))
        console.print(report.breakdown_table(f"{name}, by voice", groups["voices"]))
    report.save_picture(args.out / "summary.png", sessions, scores, f"{engine.config.name} {settings.model}")
    console.print(f"{args.out}: {run.RESULTS}, {run.RECORDS}, wavs/, summary.png")


if __name__ == "__main__":
    try:
        evaluate(arguments(), Console(width=150))
    except InputError as error:
        print(f"eval_bars: {error}", file=sys.stderr)
        sys.exit(2)

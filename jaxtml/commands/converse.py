"""`jaxtml converse`: runs a full-duplex session over a recording and writes the reply."""

from __future__ import annotations

import argparse
import dataclasses

from jaxtml.commands.arguments import add_checkpoint, check_outputs
from jaxtml.strict_json import dumps

HELP = "run a full-duplex session over a recording"
EXAMPLE = "converse --in user.wav --out reply.wav --stereo both.wav"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_checkpoint(parser)
    parser.add_argument(
        "--in", dest="input", required=True, metavar="WAV", help="the user's recording: WAV, FLAC, OGG or MP3"
    )
    parser.add_argument(
        "--out",
        required=True,
        metavar="WAV",
        help="the model's reply, as long as the input and aligned with it in time",
    )
    parser.add_argument("--events", metavar="JSONL", help="write one record per 200 ms (a micro-turn) to this file")
    parser.add_argument(
        "--stereo",
        metavar="WAV",
        help="write both sides to this file: the user in the left channel, the model in the right one",
    )
    parser.add_argument("--picture", metavar="PNG", help="draw the session as a timeline in this file")
    parser.add_argument("--video", metavar="FILE", help="an input: a video that the model sees during the recording")
    parser.add_argument("--seed", type=int, default=0, help="the seed of the model's random choices (default: 0)")
    parser.add_argument(
        "--realtime", action="store_true", help="give the model the recording at the speed at which it was spoken"
    )
    parser.add_argument("--json", action="store_true", help="print the summary as JSON, and nothing else, on stdout")


def run(args: argparse.Namespace) -> None:
    """Writes the reply and the other outputs that the arguments name.

    Raises:
      InputError: the recording, the video or the checkpoint cannot be used, or an output cannot be written.
    """
    from jaxtml.session import recording
    from jaxtml.session.library import load
    from jaxtml.session.picture import draw
    from jaxtml.session.summary import summarise
    from jaxtml.session.timeline import print_micro_turn

    wave = recording.read_recording(args.input)
    check_outputs(args.out, args.events, args.stereo, args.picture, source=args.input)
    model = load(args.checkpoint)
    show = (lambda turn: None) if args.json else print_micro_turn
    reply = recording.converse_with(
        model, wave, seed=args.seed, video=args.video, realtime=args.realtime, on_micro_turn=show
    )
    recording.write_reply(args.out, reply)
    if args.events:
        recording.write_events(args.events, reply)
    if args.stereo:
        recording.write_stereo(args.stereo, wave, reply)
    if args.picture:
        draw(args.picture, wave, reply)
    summary = summarise(wave, reply)
    print(dumps(dataclasses.asdict(summary)) if args.json else summary.sentence())

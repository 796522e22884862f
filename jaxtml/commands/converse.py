"""`jaxtml converse`: runs a full-duplex session over a recording and writes the reply."""

from __future__ import annotations

import argparse
import dataclasses

from jaxtml.commands.arguments import add_checkpoint, add_mesh, check_outputs, path_name, seed
from jaxtml.strict_json import dumps

HELP = "run a full-duplex session over a recording"
EXAMPLE = "converse --in user.wav --out reply.wav --stereo both.wav"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_checkpoint(parser)
    parser.add_argument(
        "--in",
        dest="input",
        required=True,
        type=path_name,
        metavar="FILE",
        help="the user's recording: WAV, FLAC, OGG, MP3, M4A, MP4, WebM and others; - reads standard input",
    )
    parser.add_argument(
        "--out",
        required=True,
        type=path_name,
        metavar="FILE",
        help="the model's reply, as long as the input and aligned with it in time: .wav, .flac, .ogg or .mp3",
    )
    parser.add_argument(
        "--events",
        type=path_name,
        metavar="FILE",
        help="write one record per 200 ms (a micro-turn) to this file: lines of JSON, or one array in a .json",
    )
    parser.add_argument(
        "--stereo",
        type=path_name,
        metavar="FILE",
        help="write both sides to this file: the user in the left channel, the model in the right one",
    )
    parser.add_argument(
        "--picture",
        type=path_name,
        metavar="FILE",
        help="draw the session as a timeline in this file: .png, .svg, .pdf or .jpg",
    )
    parser.add_argument(
        "--video",
        type=path_name,
        metavar="FILE",
        help="an input: a video that the model sees during the recording",
    )
    parser.add_argument(
        "--seed", type=seed, default=0, metavar="N", help="the seed of the model's random choices (default: 0)"
    )
    add_mesh(parser)
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
    from jaxtml.stream.video_file import check_video

    recording.check_formats(args.out, args.stereo, args.events, args.picture)
    check_outputs(args.out, args.events, args.stereo, args.picture, sources=(args.input, args.video))
    if args.video:
        check_video(args.video)
    wave = recording.read_recording(args.input)
    model = load(args.checkpoint, args.mesh)
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

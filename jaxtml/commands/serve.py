"""`jaxtml serve`: runs the duplex server and its web page until it is told to end."""

from __future__ import annotations

import argparse
from pathlib import Path

from jaxtml.commands.arguments import add_checkpoint, add_repeatable, number, path_name, whole_number

_MOST_SESSIONS = 10_000  # one process serves the network for all of them
_YEAR_MINUTES, _DAY_S = 525_600, 86_400
_SHORTEST_MINUTES = 0.01

HELP = "run the duplex server and its web page"
EXAMPLE = "serve --port 8080 --max-sessions 24"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_checkpoint(parser)
    _add_network(parser)
    _add_capacity(parser)
    parser.add_argument(
        "--json", action="store_true", help="print the server's address as JSON, and nothing else, on stdout"
    )
    parser.add_argument("--log-json", action="store_true", help="write every log entry as one line of JSON")


def _add_network(parser: argparse.ArgumentParser) -> None:
    """Adds the options that say where the server listens and who may use it."""
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="H",
        help="the address to listen on (default: 127.0.0.1); an address that other machines can reach needs --keys",
    )
    parser.add_argument(
        "--port",
        type=whole_number(0, 65_535),
        default=8080,
        metavar="P",
        help="the port to listen on (default: 8080); 0 takes a free port",
    )
    parser.add_argument(
        "--keys",
        type=path_name,
        metavar="FILE",
        help="a JSON file of API keys; its format and an example: docs/serving.md, Keys and quotas. SIGHUP makes the "
        "server read it again",
    )
    add_repeatable(
        parser,
        "--model-alias",
        "NAME",
        "a further name of the model, for clients that always ask for the same model name",
    )
    add_repeatable(
        parser,
        "--allow-origin",
        "URL",
        "the origin of a web page that may use the server besides the server's own page, for example "
        "https://app.example; * stands for all pages, null for pages from files",
    )
    add_repeatable(
        parser,
        "--trust-proxy",
        "IP",
        "the address or the network of a reverse proxy; the server believes its Forwarded or X-Forwarded-* headers, "
        "which say at what address the browser reaches the server",
    )
    parser.add_argument(
        "--path-prefix",
        default="",
        metavar="PATH",
        help="the path at which a proxy serves this server, if the proxy leaves the path in the requests that it "
        "passes on, for example /talk",
    )
    parser.add_argument(
        "--tls-cert",
        type=path_name,
        metavar="PEM",
        help="a certificate chain; the server then speaks https and wss; SIGHUP makes the server read it again",
    )
    parser.add_argument(
        "--tls-key", type=path_name, metavar="PEM", help="the private key, if it is not in the file of the certificate"
    )
    parser.add_argument(
        "--replica",
        default="",
        metavar="NAME",
        help="the name of this server among several behind one router (see launch/nginx.conf)",
    )


def _add_capacity(parser: argparse.ArgumentParser) -> None:
    """Adds the options that say how many sessions run, on what, and for how long."""
    parser.add_argument(
        "--max-sessions",
        type=whole_number(1, _MOST_SESSIONS),
        default=8,
        metavar="N",
        help="how many sessions may run at the same time (default: 8); the server refuses others",
    )
    parser.add_argument(
        "--workers",
        type=whole_number(0, _MOST_SESSIONS),
        default=0,
        metavar="N",
        help="how many processes run the model (default: 0, which is one, and on CPUs one for each core)",
    )
    parser.add_argument(
        "--mesh",
        default="",
        metavar="AXES",
        help="the devices that share the model, for example data=2,expert=4 (default: one device)",
    )
    parser.add_argument(
        "--session-minutes",
        type=number(_SHORTEST_MINUTES, _YEAR_MINUTES),
        default=120,
        metavar="M",
        help="how many minutes a session may last (default: 120)",
    )
    parser.add_argument(
        "--resume-seconds",
        type=number(0, _DAY_S),
        default=30,
        metavar="S",
        help="for how many seconds the server keeps the session of a client that lost its connection (default: 30)",
    )
    parser.add_argument(
        "--drain-seconds",
        type=number(0, _DAY_S),
        default=30,
        metavar="S",
        help="for how many seconds after SIGTERM or SIGINT the server lets sessions go on (default: 30)",
    )


def run(args: argparse.Namespace) -> None:
    """Serves until SIGTERM or SIGINT. Raises `InputError` if an option or the checkpoint cannot be used."""
    from jaxtml.serve import serving
    from jaxtml.serve.sessions.manager import Limits

    serving.serve(
        serving.ServerOptions(
            checkpoint=Path(args.checkpoint),
            host=args.host,
            port=args.port,
            max_sessions=args.max_sessions,
            workers=args.workers,
            mesh=args.mesh,
            replica=args.replica,
            aliases=args.model_alias,
            keys=_path(args.keys),
            origins=args.allow_origin,
            proxies=args.trust_proxy,
            path_prefix=args.path_prefix,
            certificate=_path(args.tls_cert),
            private_key=_path(args.tls_key),
            limits=Limits(session_s=60 * args.session_minutes, grace_s=args.resume_seconds),
            drain_s=args.drain_seconds,
            json=args.json,
            log_json=args.log_json,
        )
    )


def _path(name: str | None) -> Path | None:
    return None if name is None else Path(name)

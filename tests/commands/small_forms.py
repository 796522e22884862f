"""How a test runs each documented command: as it stands, or in a small form. `test_documented.py` reads the tables.

A command of a document that is in no table fails the tests, and so does an entry that no document has any more. The
tools are in no table: `tests/tools/test_tools.py` runs each in its smallest form, under a name that the tests check.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Small:
    """How a test runs a command.

    Attributes:
      needs: names of prepared inputs (see `prepare` in `test_documented.py`). What an earlier command of the block
        made stays as it is.
      makes: files and folders that the command has to write, in the folder in which it runs.
      instead: arguments to replace, with their replacements.
      also: arguments to add.
      why: the reason for `instead` and `also`.
      prints: what the output has to contain.
      slow: whether only the slow tests run the command.
      devices: how many devices the command gets.
    """

    needs: tuple[str, ...] = ()
    makes: tuple[str, ...] = ()
    instead: dict[str, str] = field(default_factory=dict)
    also: tuple[str, ...] = ()
    why: str = ""
    prints: str = ""
    slow: bool = False
    devices: int = 1


CHECKPOINT = ("--checkpoint", "small")
SERVED = "a small checkpoint, one session and a free port: the shipped model takes longer to compile"
ONE_SESSION = (*CHECKPOINT, "--max-sessions", "1")
SERVE = (*ONE_SESSION, "--port", "0")
BANK = "speech synthesis takes 40 minutes: the bank is prepared, and its voices are tones"
TRAINED = "a model of two layers and one step: the real training takes over an hour"
ONE_STEP = ("--steps", "1")
TINY = {"tiny": "small.json"}
PLANNED = "a model of two layers on four chips: the real one takes minutes to compile"
LARGE = {"tml_interaction_small": "plan.json"}

SMALL = {
    # reading and converting
    "jaxtml info tiny --json": Small(prints='"params_total"'),
    "jaxtml info DIR": Small(needs=("DIR",), prints="good for: "),
    "jaxtml info DIR --verify": Small(needs=("DIR",), prints="verified: "),
    "jaxtml convert inkling_dir out --to orbax --verify": Small(
        needs=("inkling_dir",), makes=("out/manifest.json",), prints="verified"
    ),
    "jaxtml convert out back --to hf": Small(makes=("back/config.json",)),
    "jaxtml convert inkling_dir large --as tml_interaction_small": Small(
        needs=("inkling_dir", "same.json"),
        makes=("large/config.json",),
        instead={"tml_interaction_small": "same.json"},
        why="the large model has 276B parameters",
    ),
    "jaxtml logits --checkpoint out --tokens ids.npy --out logits.npy": Small(
        needs=("ids.npy",), makes=("logits.npy",)
    ),
    "jaxtml logits --checkpoint DIR --tokens ids.npy --out logits.npy": Small(
        needs=("DIR", "ids.npy"), makes=("logits.npy",)
    ),
    # conversing
    "jaxtml converse --in user.wav --out reply.wav": Small(
        needs=("user.wav", "small"),
        makes=("reply.wav",),
        also=CHECKPOINT,
        why="a small checkpoint; tests/test_shipped.py runs the shipped model",
    ),
    "jaxtml converse --in user.wav --out reply.wav --stereo both.wav": Small(
        needs=("user.wav", "small"),
        makes=("reply.wav", "both.wav"),
        also=CHECKPOINT,
        why="a small checkpoint; tests/test_shipped.py runs the shipped model",
    ),
    "jaxtml converse --checkpoint run --in user.wav --out reply.wav": Small(
        needs=("user.wav",), makes=("reply.wav",), slow=True
    ),
    # serving
    "jaxtml serve": Small(needs=("small",), also=SERVE, why=SERVED, slow=True),
    "jaxtml serve --port 8080 --max-sessions 24": Small(
        needs=("small",), instead={"8080": "0", "24": "1"}, also=CHECKPOINT, why=SERVED, slow=True
    ),
    "jaxtml serve --max-sessions 24 --host 0.0.0.0 --keys keys.json --tls-cert cert.pem --log-json": Small(
        needs=("small", "keys.json", "cert.pem"),
        instead={"0.0.0.0": "127.0.0.1", "24": "1"},
        also=(*CHECKPOINT, "--port", "0"),
        why=f"{SERVED}; the machine's other addresses are none of a test's business",
        slow=True,
    ),
    "jaxtml serve --mesh data=2,expert=8 --max-sessions 64": Small(
        needs=("small",),
        instead={"data=2,expert=8": "data=2,expert=2", "64": "4"},
        also=(*CHECKPOINT, "--port", "0"),
        why=f"{SERVED}; four devices that XLA makes of the CPU",
        devices=4,
        slow=True,
    ),
    "jaxtml serve --tls-cert cert.pem --tls-key key.pem": Small(needs=("small",), also=SERVE, why=SERVED, slow=True),
    "curl --insecure https://127.0.0.1:8080/ready": Small(prints='"ready"', slow=True),
    "jaxtml serve --keys keys.json": Small(needs=("small", "keys.json"), also=SERVE, why=SERVED),
    "curl http://127.0.0.1:8080/v1/models -H 'Authorization: Bearer sk-second-example-key'": Small(
        prints='"small_test"'
    ),
    "jaxtml serve --replica a --port 8081 --keys keys.json": Small(
        needs=("small", "keys.json"), instead={"8081": "0"}, also=ONE_SESSION, why=SERVED, slow=True
    ),
    "jaxtml serve --replica b --port 8082 --keys keys.json": Small(
        needs=("small", "keys.json"), instead={"8082": "0"}, also=ONE_SESSION, why=SERVED, slow=True
    ),
    "openssl req -x509 -newkey rsa:2048 -nodes -days 30 -subj /CN=localhost -keyout key.pem -out cert.pem": Small(
        makes=("key.pem", "cert.pem")
    ),
    "python -c 'import secrets; print(secrets.token_urlsafe(32))'": Small(),
    """python -c 'import hashlib; print(hashlib.sha256(b'"'"'sk-second-example-key'"'"').hexdigest())'""": Small(
        prints="6afe8621d865fb569e44be2ba5d67418f35f601f81cf70ccbc07ccba604b3f78"
    ),
    # data and training
    "jaxtml data tiny --out data": Small(
        needs=("data", "small.json"), instead=TINY, also=("--no-build",), why=BANK, makes=("data/tokenizer.json",)
    ),
    "jaxtml data tiny --out data --show 5": Small(
        needs=("data", "small.json"),
        makes=("data/examples",),
        instead=TINY | {"5": "1"},
        also=("--no-build",),
        why=f"{BANK}; one example instead of five",
    ),
    "jaxtml train vocoder --workdir vocoder --data data": Small(
        makes=("vocoder/log.jsonl",), also=(*ONE_STEP, "--base", "small.json"), why=TRAINED, slow=True
    ),
    "jaxtml train tiny --workdir run --data data --vocoder vocoder": Small(
        makes=("run/log.jsonl", "run/tokenizer.json"), instead=TINY, also=ONE_STEP, why=TRAINED, slow=True
    ),
    "jaxtml train tiny --workdir run --data data": Small(
        needs=("data", "small.json"), makes=("run/log.jsonl",), instead=TINY, also=ONE_STEP, why=TRAINED, slow=True
    ),
    "jaxtml train tiny --workdir run --data data --mesh data=2": Small(
        needs=("data", "small.json"), makes=("run/log.jsonl",), instead=TINY, also=ONE_STEP, why=TRAINED, slow=True
    ),
    "jaxtml train tiny --workdir first --data data --steps 1100 --vocoder vocoder --set train.warmup=200 --set "
    "train.flow_weight=2 --set flow.history_dropout=0 --set data.text_lead_ms=200 --set data.misheard=0": Small(
        needs=("data", "small.json", "vocoder"),
        makes=("first/log.jsonl",),
        instead=TINY | {"1100": "1"},
        why=TRAINED,
        slow=True,
    ),
    "jaxtml train tiny --workdir second --data data --steps 800 --start-from one --set train.warmup=50 --set "
    "train.flow_weight=2 --set flow.history_dropout=0": Small(
        makes=("second/log.jsonl",), instead=TINY | {"800": "1"}, why=TRAINED, slow=True
    ),
    "jaxtml train tiny --workdir third --data data --steps 2300 --start-from two --set train.warmup=50": Small(
        makes=("third/log.jsonl",), instead=TINY | {"2300": "1"}, why=TRAINED, slow=True
    ),
    "python tools/make_checkpoint.py --workdir first --vocoder vocoder --out one": Small(
        makes=("one/training.jsonl",), slow=True
    ),
    "python tools/make_checkpoint.py --workdir second --started-from one --out two": Small(
        makes=("two/training.jsonl",), slow=True
    ),
    "python tools/make_checkpoint.py --workdir third --started-from two --out three": Small(
        makes=("three/training.jsonl",), slow=True
    ),
    # planning
    "jaxtml plan tml_interaction_small --topology v5p:4x4x8 --mesh data=16,expert=8 --set train.batch=128": Small(
        needs=("plan.json",),
        instead=LARGE
        | {"v5p:4x4x8": "v5p:2x2x1", "data=16,expert=8": "data=2,expert=2", "train.batch=128": "train.batch=8"},
        why=PLANNED,
        prints="v5p:2x2x1",
        slow=True,
    ),
    "jaxtml plan tml_interaction_small --topology v6e:4x8 --program serve": Small(
        needs=("plan.json",), instead=LARGE | {"v6e:4x8": "v6e:2x2"}, why=PLANNED, prints="v6e:2x2", slow=True
    ),
}

FOR_PEOPLE = {
    "tools/demo": "plays a recording at its own pace; tests/tools/test_scripts.py runs it on a short recording",
    "tools/test": "runs these tests",
    "tools/test -m 'not slow'": "runs these tests",
    "tools/test tests/stream/test_dmel.py": "lints and checks the types of the whole repository",
    "tools/install_voices": "installs Debian packages, packages and 200 MB of models",
    ". .venv/bin/activate": "the tests run in that environment; tools/demo activates it",
    "nginx -p . -c launch/nginx.conf": "needs nginx, and two servers on fixed ports",
    "opentelemetry-instrument jaxtml serve": "needs the extra `telemetry`",
    "jaxtml plan tml_interaction_small --topology v5p:4x4x8 --mesh data=16,expert=8 --search": "compiles for an hour",
}
"""Commands that only people run, and why. The tests still parse them."""

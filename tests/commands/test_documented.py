"""Every command that a document or a help text shows works: a test runs it, as it stands or in a small form.

`documented.py` collects the commands and `small_forms.py` says how a test runs each. The commands of a block run from
top to bottom in one folder, as a reader would run them. `jaxtml` runs inside the test's process where that is possible,
because importing JAX takes longer than the work.
"""

from __future__ import annotations

import os
import re
import runpy
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tones
from packaging.requirements import Requirement

from jaxtml import config as configs
from jaxtml.commands import arguments
from jaxtml.commands.main import COMMANDS, main, parser
from jaxtml.convert.conversion import convert
from jaxtml.parallel.mesh import MeshShape
from jaxtml.plan.topology import Topology
from tests.commands.documented import (
    PAGES,
    ROOT,
    TOOLS,
    Block,
    Command,
    code_spans,
    documented_blocks,
    examples,
)
from tests.commands.small_forms import FOR_PEOPLE, SMALL, Small
from tests.plan import compilers

BLOCKS = documented_blocks()
ALL = [command for block in BLOCKS for command in block.commands]
PLANNED = ("backbone.n_layers=2", "backbone.n_dense=1", "backbone.global_layers=[1]")  # changes to `tiny`
CERTIFICATE = "openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=localhost -keyout cert.pem -out cert.pem"
START_S = 120  # a server that is not ready by then has failed
JAXTML = [sys.executable, "-m", "jaxtml"]
Prepare = Callable[[str, Path], None]


def is_tool(command: Command) -> bool:
    return command.words[0] == "python" and command.words[1] in TOOLS


def form(command: Command) -> Small | None:
    """Returns how the tests run a command; None for one that they only parse."""
    return SMALL.get(str(command))


# --- the tables are complete


def test_every_command_is_run_by_a_test_or_has_a_reason_why_not():
    tables = {*SMALL, *FOR_PEOPLE}
    lacking = [str(c) for c in ALL if str(c) not in tables and c.words[0] != "pip" and not is_tool(c)]
    assert not lacking, "give these commands an entry in tests/commands/small_forms.py"


def test_no_entry_is_left_of_a_command_that_no_document_shows():
    shown = {str(command) for command in ALL} | {example for example in examples().values()}
    assert not [entry for entry in [*SMALL, *FOR_PEOPLE] if entry not in shown]
    assert not SMALL.keys() & FOR_PEOPLE.keys()


def test_every_change_to_a_command_has_a_reason():
    assert not [entry for entry, small in SMALL.items() if (small.instead or small.also) and not small.why]


def test_every_tool_that_a_document_shows_is_run_by_a_test_of_the_tools():
    tests = (ROOT / "tests" / "tools" / "test_tools.py").read_text()
    tools = {command.words[1] for command in ALL if is_tool(command)}
    assert tools == TOOLS.keys()
    assert not [tool for tool in tools if f"def test_{Path(tool).stem}_runs(" not in tests]


# --- every command is parsed


@pytest.mark.parametrize("command", [c for c in ALL if "jaxtml" in c.words[:2]], ids=str)
def test_jaxtml_accepts_the_documented_arguments(command, capsys):
    words = command.words[command.words.index("jaxtml") + 1 :]
    try:
        args = parser().parse_args(words)
    except SystemExit:
        pytest.fail(capsys.readouterr().err.splitlines()[-1])
    if getattr(args, "config", "vocoder") not in ("vocoder", "DIR"):
        configs.load(args.config, args.set)
    if getattr(args, "mesh", None):
        MeshShape.parse(args.mesh)
    if args.command == "plan":
        Topology.parse(args.topology)


@pytest.mark.parametrize("tool", TOOLS)
def test_the_tools_accept_their_documented_arguments(tool, monkeypatch, capsys):
    given = [command.words[2:] for command in ALL if is_tool(command) and command.words[1] == tool]

    def parse_only(parser, work):
        for words in given:
            parser.parse_args(words)

    monkeypatch.setattr(arguments, "run_tool", parse_only)
    monkeypatch.setattr(sys, "argv", [tool])
    try:
        runpy.run_path(str(TOOLS[tool]), run_name="__main__")
    except SystemExit:
        pytest.fail(f"{given}: {capsys.readouterr().err.splitlines()[-1]}")


# --- installing


def files_of_the_project() -> Iterator[Path]:
    """Yields the files that name packages to install: documents, sources, tools and tests."""
    yield from PAGES
    for folder in ("jaxtml", "configs", "launch", "tools", "tests", "examples"):
        yield from (
            path for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".sh", ".js", ".html", ".ipynb")
        )


def test_every_named_extra_exists_is_quoted_and_is_installed_from_the_clone(monkeypatch):
    """jaxtml is on no package index, and a shell such as zsh takes brackets without quotes for a pattern."""
    given = {}
    monkeypatch.setattr("setuptools.setup", lambda **options: given.update(options))
    runpy.run_path(str(ROOT / "setup.py"))
    from_an_index = re.compile("pip install.*jaxtml" + re.escape("["))
    for path in files_of_the_project():
        text = path.read_text()
        assert not from_an_index.search(text), f"{path}: jaxtml is on no package index"
        for quote, extra in re.findall(r"pip install (?:-e )?('?)\.\[([\w-]+)\]", text):
            assert extra in given["extras_require"], f"{path}: there is no extra {extra}"
            assert quote, f"{path}: write '.[{extra}]' in quotes"


def test_the_pages_install_what_the_tools_install():
    pinned = (ROOT / "tools" / "setup.sh").read_text()
    for command in ALL:
        if command.words[0] == "pip":
            assert command.words[1] == "install"
            for word in command.words[2:]:
                if not word.startswith(("-", ".[")):
                    assert Requirement(word).specifier and word in pinned, word


# --- options in the sentences


def options_of(command_parser) -> set[str]:
    return {option for action in command_parser._actions for option in action.option_strings}


def subparsers() -> dict[str, object]:
    (choices,) = (action.choices for action in parser()._actions if action.dest == "command")
    return choices


def test_every_option_that_a_sentence_names_exists(monkeypatch):
    known = set().union(*(options_of(subparser) for subparser in subparsers().values()))
    for tool in TOOLS.values():
        known |= set(re.findall(r"\"(--[a-z-]+)\"", tool.read_text()))
    for page in PAGES:
        if page.name in ("EXPERIMENTS.md", "CHANGELOG.md"):  # they tell of other days
            continue
        for span in code_spans(page):
            words = span.split()
            if words[0] == "jaxtml" and len(words) > 1 and words[1] in COMMANDS:
                assert set(re.findall(r"--[a-z-]+", span)) <= options_of(subparsers()[words[1]]), f"{page.name}: {span}"
            elif words[0].startswith("--"):
                assert words[0] in known, f"{page.name}: {span}"


# --- prepared inputs


@pytest.fixture(scope="session")
def two_layers(small) -> configs.Config:
    """The small model with two layers and without pictures, for training."""
    return replace(
        small,
        backbone=replace(small.backbone, n_layers=2, global_layers=(1,)),
        duplex=replace(small.duplex, max_patches=0),
        data=replace(small.data, turns=25, tokens=192),
    )


@pytest.fixture(scope="session")
def speech_bank(codec, tmp_path_factory) -> Path:
    """A data folder as `jaxtml data` makes it. Its voices are tones instead of speech."""
    folder = tmp_path_factory.mktemp("data")
    tones.write_data_folder(folder, codec)
    return folder


@pytest.fixture(scope="session")
def converted(release, tmp_path_factory) -> Path:
    """A checkpoint in our format, converted from a released one. It has a manifest."""
    folder = tmp_path_factory.mktemp("converted") / "out"
    convert(str(release), str(folder))
    return folder


@pytest.fixture
def prepare(request, two_layers, releasable) -> Prepare:
    """`prepare(name, folder)` puts an input of a documented command into a folder, unless it is there already."""

    def make(name: str, folder: Path) -> None:
        value = request.getfixturevalue
        path = folder / name
        if path.exists():
            return
        if name == "user.wav":
            path.symlink_to(value("recording"))
        elif name == "inkling_dir":
            path.symlink_to(value("release"))
        elif name == "DIR":
            path.symlink_to(value("converted"))
        elif name in ("small", "vocoder"):
            path.symlink_to(value("checkpoint"))
        elif name == "data":
            shutil.copytree(value("speech_bank"), path)
        elif name == "ids.npy":
            np.save(path, np.arange(6))
        elif name in ("small.json", "same.json", "plan.json"):
            config = {"small.json": two_layers, "same.json": releasable}.get(name) or configs.load("tiny", PLANNED)
            path.write_text(configs.to_json(config))
        elif name == "cert.pem":
            subprocess.run(shlex.split(CERTIFICATE), cwd=folder, check=True, capture_output=True)
        elif name == "keys.json":
            (text,) = re.findall(r"```json\n(.*?)```", (ROOT / "docs" / "serving.md").read_text(), re.DOTALL)
            path.write_text(text)

    return make


# --- the blocks


class Reader:
    """Runs the commands of a block as a reader would: in one folder, from top to bottom.

    A server that a command starts runs until the next server starts, or until the block ends.
    """

    def __init__(self, folder: Path, prepare: Prepare, output: Callable[[], str]):
        self.folder, self.prepare, self.output = folder, prepare, output
        self.url = ""
        self.server: subprocess.Popen[str] | None = None
        self.background: list[subprocess.Popen[str]] = []
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.coordinator = f"127.0.0.1:{probe.getsockname()[1]}"

    def run(self, command: Command, small: Small) -> None:
        for name in small.needs:
            self.prepare(name, self.folder)
        words = [small.instead.get(word, word) for word in command.words] + list(small.also)
        if words[0] == "curl":
            words = [word.replace("127.0.0.1:8080", self.url.partition("//")[2]) for word in words]
        if words[:2] == ["jaxtml", "serve"]:
            self.stop_server()
            self.start_server(words, small)
        elif words[0] == "jaxtml" and words[1] not in ("train", "plan") and not command.environment:
            status = main(parser().parse_args(words[1:]))
            output = self.output()
            assert status == 0 and small.prints in output, output
        else:
            self.start(words, command, small)
        for name in () if command.in_background else small.makes:
            assert (self.folder / name).exists(), f"{command} made no {name}"

    def start(self, words: list[str], command: Command, small: Small) -> None:
        """Runs a command in a process of its own. Waits for it, unless it runs in the background."""
        is_plan = words[:2] == ["jaxtml", "plan"]
        environment = (compilers.environment() if is_plan else self.environment(small)) | dict(command.environment)
        if "JAX_COORDINATOR_ADDRESS" in environment:
            environment["JAX_COORDINATOR_ADDRESS"] = self.coordinator
        process = self.popen(words, environment)
        self.background.append(process)
        if not command.in_background:
            output = self.finish()
            assert small.prints in output, output

    def finish(self) -> str:
        """Waits for the processes that run in the background, and returns what they printed."""
        printed = ""
        while self.background:
            out, err = self.background[0].communicate(timeout=500)
            assert self.background.pop(0).returncode == 0, err[-3000:]
            printed += out
        return printed

    def start_server(self, words: list[str], small: Small) -> None:
        """Starts a server and reads its address from its first line."""
        self.server = self.popen(words, self.environment(small))
        assert self.server.stdout is not None
        line = self.server.stdout.readline()
        found = re.search(r"https?://\S+", line)
        assert found, self.server.communicate(timeout=20)[1][-3000:]
        self.url = found[0]

    def stop_server(self) -> None:
        if self.server is not None:
            self.server.terminate()
            _, log = self.server.communicate(timeout=60)
            assert self.server.returncode == 0 and "Traceback" not in log, log[-3000:]
            self.server = None

    def kill(self) -> None:
        """Ends what is left after a failure."""
        for process in (*self.background, self.server):
            if process is not None:
                process.kill()
                process.communicate()

    def popen(self, words: list[str], environment: dict[str, str]) -> subprocess.Popen[str]:
        program = {"jaxtml": JAXTML, "python": [sys.executable]}.get(words[0], words[:1])
        arguments = [str(TOOLS[word]) if word in TOOLS else word for word in words[1:]]
        pipe = subprocess.PIPE
        return subprocess.Popen(
            [*program, *arguments], cwd=self.folder, env=environment, stdout=pipe, stderr=pipe, text=True
        )

    def environment(self, small: Small) -> dict[str, str]:
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={small.devices}"
        return {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": flags}


def read(block: Block, folder: Path, prepare: Prepare, output: Callable[[], str], slow: bool) -> None:
    """Runs the commands of a block. Without `slow`, leaves out the slow ones."""
    reader = Reader(folder, prepare, output)
    try:
        for command in block.commands:
            small = SMALL.get(str(command))
            if small is not None and (slow or not small.slow):
                if shutil.which(command.words[0]) is None and command.words[0] in ("curl", "openssl"):
                    pytest.skip(f"needs {command.words[0]}: apt-get install {command.words[0]}")
                reader.run(command, small)
        reader.finish()
        reader.stop_server()
    finally:
        reader.kill()


def blocks(slow: bool) -> list[Block]:
    """Returns the blocks that have a slow command, or, without `slow`, those that have a quick one."""
    return [b for b in BLOCKS if any((s := form(command)) is not None and s.slow == slow for command in b.commands)]


@pytest.mark.parametrize("block", blocks(slow=False), ids=lambda block: block.place)
def test_a_reader_can_run_the_commands(block, prepare, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    read(block, tmp_path, prepare, lambda: "".join(capsys.readouterr()), slow=False)


@pytest.mark.slow
@pytest.mark.parametrize("block", blocks(slow=True), ids=lambda block: block.place)
def test_a_reader_can_run_the_slow_commands_too(block, prepare, tmp_path, monkeypatch, capsys):
    if any(command.words[:2] == ("jaxtml", "plan") for command in block.commands) and not compilers.LIBTPU:
        pytest.skip("needs libtpu: pip install -e '.[plan]'")
    monkeypatch.chdir(tmp_path)
    read(block, tmp_path, prepare, lambda: "".join(capsys.readouterr()), slow=True)

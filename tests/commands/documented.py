"""The commands that pages, help texts, `launch/nginx.conf` and `configs/tiny.py` show, block by block, for tests.

A Markdown parser finds the code blocks of the pages. A block without a language holds commands, one a line, as a shell
reads them. The blocks in `NOT_COMMANDS` hold something else. A line that begins with an unknown program is an error, so
no command of a document is left out without notice.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt

from jaxtml.commands.main import COMMANDS

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
TOOLS = {str(path.relative_to(ROOT)): path for path in sorted((ROOT / "tools").rglob("*.py"))}
PROGRAMS = {
    *("jaxtml", "python", "pip", "tools/demo", "tools/test", "tools/install_voices"),
    *(".", "curl", "export", "nginx", "openssl", "opentelemetry-instrument"),
}
NOT_COMMANDS = ("errors", "monitoring -> runtime", "given: ", "duplex step(")
"""How the blocks begin that show layers, tokens or a function."""


@dataclass(frozen=True)
class Command:
    """A command line as a document shows it.

    Attributes:
      words: the program and its arguments.
      environment: the variables that the line sets, or that an `export` before it in the block sets.
      in_background: whether an `&` follows.
    """

    words: tuple[str, ...]
    environment: tuple[tuple[str, str], ...] = ()
    in_background: bool = False

    def __str__(self) -> str:
        return shlex.join(self.words)


@dataclass(frozen=True)
class Block:
    """The commands of one code block, or the example of one help text. A reader runs them from top to bottom.

    Attributes:
      place: the document and the block's number in it, or the command whose help shows the example.
    """

    place: str
    commands: tuple[Command, ...]


def documented_blocks() -> list[Block]:
    """Returns the blocks of all pages, `launch/nginx.conf` and `configs/tiny.py`, and examples that only help shows.

    Raises:
      ValueError: a line of a block begins with a program that is not in `PROGRAMS`.
    """
    blocks = [
        Block(f"{page.name}-{number}", tuple(commands_of(page.name, text)))
        for page in PAGES
        for number, text in enumerate(code_blocks(page), 1)
    ]
    router = (ROOT / "launch" / "nginx.conf").read_text()
    blocks.append(Block("nginx.conf", tuple(commands_of("nginx.conf", _indented(router, "#   ")))))
    docstring = (ROOT / "configs" / "tiny.py").read_text().split('"""')[1]
    blocks.append(Block("configs-tiny.py", tuple(commands_of("configs/tiny.py", _indented(docstring, "    ")))))
    known = {str(command) for block in blocks for command in block.commands}
    for place, example in examples().items():
        commands = tuple(commands_of(place, example))
        if not {str(command) for command in commands} <= known:
            blocks.append(Block(place, commands))
    return blocks


def examples() -> dict[str, str]:
    """Returns the example in the help text of each command and each tool."""
    found = {f"jaxtml {name} --help": f"jaxtml {command.EXAMPLE}" for name, command in COMMANDS.items()}
    for tool, path in TOOLS.items():
        (example,) = re.findall(r'tool_parser\(\s*__doc__,\s*"([^"]+)"', path.read_text())
        found[f"{tool} --help"] = f"python {example}"
    return found


def code_blocks(page: Path) -> Iterator[str]:
    """Yields the code blocks of a page that may hold commands: those without a language, and those of a shell."""
    for token in MarkdownIt().parse(page.read_text()):
        is_code = token.type == "code_block" or (token.type == "fence" and token.info in ("", "sh", "bash", "console"))
        if is_code and not token.content.startswith(NOT_COMMANDS):
            yield token.content


def code_spans(page: Path) -> Iterator[str]:
    """Yields the code spans in the sentences and tables of a page, each on one line."""
    for token in MarkdownIt().enable("table").parse(page.read_text()):
        for child in token.children or ():
            if child.type == "code_inline":
                yield " ".join(child.content.split())


def commands_of(place: str, block: str) -> Iterator[Command]:
    """Yields the commands of a block, with the variables that the block sets for them.

    Raises:
      ValueError: a line begins with a program that is not in `PROGRAMS`.
    """
    exported: dict[str, str] = {}
    for line in block.replace("\\\n", " ").splitlines():
        for words, separator in split_line(line):
            is_setting = [re.match(r"[A-Z_]+=", word) is not None for word in words]
            first = is_setting.index(False)
            if words[first] not in PROGRAMS:
                raise ValueError(f"{place}: {words[first]!r} of `{line.strip()}` is not in PROGRAMS")
            if words[first] == "export":
                exported |= dict(word.split("=", 1) for word in words[1:])
                continue
            variables = exported | dict(word.split("=", 1) for word in words[:first])
            yield Command(tuple(words[first:]), tuple(variables.items()), separator == "&")


def split_line(line: str) -> Iterator[tuple[list[str], str]]:
    """Yields the words of each command of a line, and the `&&`, `|`, `;` or `&` after it. Leaves comments out."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;")
    lexer.whitespace_split = True
    words: list[str] = []
    for word in lexer:
        if set(word) <= set("&|;"):
            yield words, word
            words = []
        else:
            words.append(word)
    if words:
        yield words, ""


def _indented(text: str, prefix: str) -> str:
    """Returns the lines of `text` that begin with `prefix` and no further space, without the prefix."""
    return "\n".join(re.findall(rf"^{prefix}(\S.*)$", text, re.MULTILINE))

"""How a release lies in its files, to the byte: the headers of its safetensors files, and its index.

A conversion to our format keeps the layout in `released/safetensors_layout.json`. A conversion back writes the same
headers, so that its files are those of the release byte for byte. Called by `convert.conversion` and by the sinks.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from jaxtml.checkpoint.files import RELEASE_FILES
from jaxtml.checkpoint.inkling.directory import INDEX, read_json
from jaxtml.checkpoint.inkling.safetensors_file import read_header_text
from jaxtml.errors import InputError
from jaxtml.strict_json import dumps

LAYOUT = "safetensors_layout.json"


@dataclass(frozen=True)
class ReleaseLayout:
    """The layout of a release.

    Attributes:
      headers: the header of each safetensors file by the file's name, as it stands in the file with its padding.
      index: the text of the index; None: the release has none.
    """

    headers: dict[str, str]
    index: str | None

    @classmethod
    def of_release(cls, directory: Path, files: list[str]) -> ReleaseLayout:
        """Returns the layout of a release with these safetensors files."""
        index = directory / INDEX
        headers = {name: read_header_text(directory / name) for name in files}
        return cls(headers, index.read_bytes().decode() if index.is_file() else None)

    @classmethod
    def kept_in(cls, directory: Path) -> ReleaseLayout | None:
        """Returns the layout that a jaxtml checkpoint keeps; None: it keeps none.

        Raises:
          InputError: the file is damaged.
        """
        file = directory / RELEASE_FILES / LAYOUT
        if not file.is_file():
            return None
        fields = read_json(file)
        headers, index = fields.get("headers"), fields.get("index")
        if (
            not isinstance(headers, dict)
            or not all(isinstance(text, str) and Path(name).name == name for name, text in headers.items())
            or not isinstance(index, str | None)
        ):
            raise InputError(f"{file} is damaged: copy the checkpoint again, or remove this file")
        return cls(headers, index)

    def to_json(self) -> str:
        """Returns the text of the file that `kept_in` reads."""
        return dumps(asdict(self)) + "\n"

    def tensors(self) -> dict[str, tuple[str, tuple[int, ...]]] | None:
        """Returns dtype and shape of each tensor by its name; None if a header is damaged or names a tensor twice."""
        found: dict[str, tuple[str, tuple[int, ...]]] = {}
        try:
            for text in self.headers.values():
                entries = {name: entry for name, entry in json.loads(text).items() if name != "__metadata__"}
                if entries.keys() & found.keys():
                    return None
                found |= {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in entries.items()}
        except (ValueError, KeyError, TypeError, AttributeError):
            return None
        return found

"""Files of a command: the picture it reads, and the form and place of its answer."""

from __future__ import annotations

import dataclasses
import io
import os
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path

from app.cli.errors import CommandError
from app.media_types import APNG, JSON, NPZ, PNG, WEBP, ZIP

STILL = {".png": PNG, ".zip": ZIP, ".json": JSON}
MOVING = {".png": APNG, ".apng": APNG, ".webp": WEBP, ".npz": NPZ}
NOISED = {".png": PNG, ".npz": NPZ, ".json": JSON}

STREAM = "-"  # stdin or stdout


def read(name: str) -> bytes:
    """A picture's file, or stdin. Raises CommandError."""
    if name == STREAM:
        return sys.stdin.buffer.read()
    try:
        return Path(name).read_bytes()
    except OSError as error:
        raise CommandError(f"{name} cannot be read: {error.strerror}") from None


@dataclasses.dataclass(frozen=True)
class Output:
    """Where an answer goes, found out before it is worked for."""

    name: str  # as -o has it
    media_type: str
    folder: bool = False  # a ZIP, unpacked there

    @classmethod
    def of(cls, name: str, forms: Mapping[str, str]) -> Output:
        """The form that a name asks for.

        Args:
            name: a file, a folder or STREAM.
            forms: media types by suffix.

        Raises:
            CommandError: there is no such form, or no such place.
        """
        path = Path(name)
        if not name:
            raise CommandError("-o has no name: give a file, a folder or -")
        if name == STREAM:
            if sys.stdout.isatty():
                raise CommandError("-o -: stdout is a terminal, and the answer no text: send it on with | or >")
            return cls(name, forms[".png"])
        if name.endswith("/") and path.exists() and not path.is_dir():
            raise CommandError(f"-o {name}: {path} is a file, and a folder is asked for")
        if name.endswith("/") or path.is_dir():
            if ZIP not in forms.values():
                raise CommandError(f"-o {name} is a folder: name one file, {_either(forms)}")
            return cls(name, ZIP, folder=True)
        if path.suffix.lower() not in forms:
            frames = " with --frames" if forms is MOVING else " without --frames" if forms is STILL else ""
            raise CommandError(f"-o {name} must end in {_either(forms)}{frames}{', or in /' if forms is STILL else ''}")
        if not path.parent.is_dir():
            raise CommandError(f"-o {name}: there is no folder {path.parent}")
        return cls(name, forms[path.suffix.lower()])

    def write(self, content: bytes) -> str:
        """Writes an answer, and says where it is. A file is replaced as a whole or not at all. Raises CommandError."""
        try:
            if self.name == STREAM:
                sys.stdout.buffer.write(content)
                sys.stdout.buffer.flush()
                return "stdout"
            if self.folder:
                return self._unpack(content)
            return f"{self.name}{' (replaced)' if _replace(Path(self.name), content) else ''}"
        except BrokenPipeError:
            raise
        except zipfile.BadZipFile as error:
            raise CommandError(f"what came for {self.name} is no whole ZIP ({error}): ask again") from None
        except OSError as error:
            raise CommandError(f"{self.name} cannot be written: {error.strerror}") from None

    def _unpack(self, content: bytes) -> str:
        folder = Path(self.name)
        folder.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            files = archive.namelist()
            for name in files:
                _replace(folder / Path(name).name, archive.read(name))  # its own folder, whatever a server calls it
        return f"{len(files)} in {self.name}"


def _either(forms: Mapping[str, str]) -> str:
    return ", ".join(forms)


def _replace(path: Path, content: bytes) -> bool:
    """Writes a file. Returns whether there was one."""
    path = path.resolve()  # a link stays one
    if path.exists() and not path.is_file():  # a pipe, a device
        path.write_bytes(content)
        return False
    there = path.exists()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return there

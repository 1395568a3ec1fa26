"""One way to write a text file: never half of it."""

from __future__ import annotations

import os
from pathlib import Path


def check_writable(path: Path | str, name: str) -> Path:
    """The path of a file to be written. Raises OSError, naming the option, where it can't be: before the work is done."""
    path = Path(path)
    if path.exists() and not path.is_file():
        raise OSError(f"{name} {str(path)!r} is no regular file")
    there = next(folder for folder in path.absolute().parents if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise OSError(f"{name} {str(path)!r}: can't write in {there}")
    return path


def write_text(path: Path | str, text: str) -> Path:
    """UTF-8, written under a temporary name and renamed; folders are made."""
    path = check_writable(path, "file")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path

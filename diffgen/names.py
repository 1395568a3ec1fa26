"""Nearest valid name, for every message about a name that doesn't exist."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, valid: Iterable[str]) -> str:
    """'did you mean ...? (valid: ...)' for a name that is not among the valid ones."""
    valid = sorted(map(str, valid))
    close = difflib.get_close_matches(str(name).lower(), valid, n=1, cutoff=0.5) or difflib.get_close_matches(
        str(name), valid, n=1, cutoff=0.5
    )
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}(valid: {', '.join(valid) or 'none'})"

"""What a check of the doctor found, and what all checks share."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ..refused import Refused, describe

OK, NOTE, BROKEN = "ok", "note", "broken"


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's report.

    Attributes:
        name: What was examined.
        state: ``'ok'``, ``'note'`` (something is missing, the rest works without it) or ``'broken'``.
        found: What was found, on one line.
        advice: What to do about it; may be empty.
    """

    name: str
    state: str
    found: str
    advice: str = ""

    def __str__(self) -> str:
        return f"{self.found}; {self.advice}" if self.advice else self.found


def examine(name: str, check: Callable[..., Iterator[Finding]], *args) -> Iterator[Finding]:
    """The findings of a check; an error that it raises is one too."""
    try:
        yield from check(*args)
    except Refused as error:
        yield refusal(name, error)
    except Exception as error:
        yield Finding(name, BROKEN, describe(error), "unexpected: please report it, with this line")


def refusal(name: str, error: Exception) -> Finding:
    """The finding that an error is which was written for users."""
    return Finding(name, BROKEN, getattr(error, "found", str(error)), getattr(error, "advice", "check the path"))


def quietly(function: Callable, *args):
    """Call ``function`` without the warnings and the output of the libraries."""
    out = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        warnings.simplefilter("ignore")
        return function(*args)

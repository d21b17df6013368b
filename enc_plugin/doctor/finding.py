"""The findings of the doctor's checks."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from ..refused import Refused, describe

OK, NOTE, BROKEN = "ok", "note", "broken"

# Fields of a finding without its name, as the checks yield them: ``(state, found)`` or ``(state, found, advice)``.
Result = tuple[str, ...]


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's report.

    Attributes:
        name: Name of the check.
        state: ``'ok'``, ``'note'`` (something is missing, the rest works without it) or ``'broken'``.
        found: The result of the check, on one line.
        advice: What to do about it; may be empty.
    """

    name: str
    state: str
    found: str
    advice: str = ""

    def __str__(self) -> str:
        return f"{self.found}; {self.advice}" if self.advice else self.found


def examine(name: str, check: Callable[..., Iterable[Result]], *args) -> Iterator[Finding]:
    """Run a check and yield its results as findings. An exception of the check becomes a finding too."""
    try:
        for result in check(*args):
            yield Finding(name, *result)
    except Refused as error:
        yield refusal(name, error)
    except Exception as error:
        yield Finding(name, BROKEN, describe(error), "unexpected: please report it, with this line")


def refusal(name: str, error: Exception) -> Finding:
    """The finding for an error whose message is written for users."""
    return Finding(name, BROKEN, getattr(error, "found", str(error)), getattr(error, "advice", "check the path"))


def quietly(function: Callable, *args):
    """Call ``function`` without the warnings and the output of the libraries."""
    out = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        warnings.simplefilter("ignore")
        return function(*args)

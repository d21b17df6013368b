"""What a check found, and the error that refuses it: the doctor prints findings, a run or a tool raises them."""

from __future__ import annotations

from dataclasses import dataclass

OK, NOTE, BROKEN = "ok", "note", "broken"


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's report: ``state`` is ``'ok'``, ``'note'`` (something is missing, the rest works without
    it) or ``'broken'``; ``advice`` says what to do."""

    name: str
    state: str
    found: str
    advice: str = ""

    def __str__(self) -> str:
        return f"{self.found}; {self.advice}" if self.advice else self.found


class Refused(ValueError):
    """A config, a checkpoint or data that cannot work.

    Attributes:
        found: What is wrong, on one line.
        advice: What to do about it; may be empty.
    """

    def __init__(self, found: str, advice: str = ""):
        super().__init__(f"{found}; {advice}" if advice else found)
        self.found = found
        self.advice = advice


def describe(error: Exception, length: int = 400) -> str:
    """Type and text of an error on one line, cut to ``length``; of an error in a data worker, what happened there."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    if "Original Traceback" in text:
        text = text.strip().splitlines()[-1]
        return text[:length]
    text = " ".join(text.split()).split(" Please check whether the value of")[0]  # mmengine's, of unknown types
    return f"{type(error).__name__}: {text[:length]}{' ...' if len(text) > length else ''}"

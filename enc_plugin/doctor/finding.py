"""What a check of the doctor found."""

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

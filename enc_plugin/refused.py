"""The error that refuses a config, a checkpoint or data, and errors on one line."""

from __future__ import annotations

from pathlib import Path


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


def require_file(name: str, path: str | Path, advice: str = "") -> None:
    """Raise ``FileNotFoundError`` that names the argument unless ``path`` is a file; addresses (``://``) pass."""
    if "://" not in str(path) and not Path(path).is_file():
        raise FileNotFoundError(f"{name}: there is no file {path}{f'; {advice}' if advice else ''}")

"""The error for configs, checkpoints and data that cannot work, and one-line descriptions of errors."""

from __future__ import annotations

from pathlib import Path


class Refused(ValueError):
    """Error for a config, a checkpoint or data that cannot work.

    Attributes:
        found: What is wrong, on one line.
        advice: What to do about it; may be empty.
    """

    def __init__(self, found: str, advice: str = ""):
        super().__init__(f"{found}; {advice}" if advice else found)
        self.found = found
        self.advice = advice


def describe(error: Exception, length: int = 400) -> str:
    """Type and text of an error on one line, cut to ``length``; for an error in a data worker, its original error."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    if "Original Traceback" in text:
        text = text.strip().splitlines()[-1]
        return text[:length]
    text = " ".join(text.split()).split(" Please check whether the value of")[0]  # mmengine appends this advice
    return f"{type(error).__name__}: {text[:length]}{' ...' if len(text) > length else ''}"


def require_file(name: str, path: str | Path, advice: str = "") -> None:
    """Raise ``FileNotFoundError`` for argument ``name`` unless ``path`` is a file or a URL."""
    if "://" not in str(path) and not Path(path).is_file():
        raise FileNotFoundError(f"{name}: there is no file {path}{f'; {advice}' if advice else ''}")

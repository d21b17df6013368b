"""Finds the steps of a pipeline that load a sample, by recording what each step reads and writes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, MutableMapping, Sequence


def without_loading(steps: Sequence[Callable], results: dict, picture: str) -> list[Callable]:
    """The ``steps`` that process an image, without the steps that load an image or a label.

    Each step runs on one loaded sample. A step loads if it writes an image or a label without having read the image. A
    step that fails before any step has read the image loads too, because it probably looks for a file.

    Args:
        steps: Transforms of a pipeline.
        results: A sample with the image.
        picture: Key of the image in ``results``.
    """
    kept: list[Callable] = []
    begun = False
    for step in steps:
        last = step is steps[-1]
        watched = _Watched(copy.deepcopy(dict(results)), picture, _Notes())
        before, notes = dict.get(watched, picture), watched.notes
        try:
            after = step(watched)
        except Exception:
            if begun or notes.read or last:
                raise
            continue
        if not notes.read and not last:
            other = after is None or (not isinstance(after, _Watched) and after.get(picture) is not before)
            if other or notes.loaded:
                continue
        begun = begun or notes.read
        kept.append(step)
        if not last:
            results = dict(after)
    return kept


class _Notes:
    """What a step did with a sample: it read the image, replaced the image, or wrote a label."""

    read = False
    made = False
    labelled = False

    @property
    def loaded(self) -> bool:
        return not self.read and (self.made or self.labelled)


class _Watched(dict):
    """A sample that records what a step reads and writes. Copies record to the same notes."""

    def __init__(self, values: dict, picture: str, notes: _Notes):
        super().__init__(values)
        self.picture, self.notes = picture, notes

    def _note(self, key: object) -> None:
        if key == self.picture and not self.notes.made:
            self.notes.read = True

    def __getitem__(self, key):
        self._note(key)
        return super().__getitem__(key)

    def __setitem__(self, key, value):
        self.notes.made = self.notes.made or key == self.picture
        self.notes.labelled = self.notes.labelled or str(key).startswith("gt_")
        super().__setitem__(key, value)

    def __copy__(self):
        return _Watched(dict(super().items()), self.picture, self.notes)

    def __deepcopy__(self, memo):
        return _Watched(copy.deepcopy(dict(super().items()), memo), self.picture, self.notes)

    # These call __getitem__ and __setitem__; the methods of dict do not.
    get, items, values = Mapping.get, Mapping.items, Mapping.values
    pop, update = MutableMapping.pop, MutableMapping.update

    def copy(self):
        """Shallow copy with the same notes."""
        return self.__copy__()

"""Which steps of a pipeline load a sample, found by watching them: the others do something to a picture."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, MutableMapping, Sequence


def without_loading(steps: Sequence[Callable], results: dict, picture: str) -> list[Callable]:
    """Those of ``steps`` that do something to a picture: all but those that load one, or a label.

    Each step runs on one loaded sample. A step loads if it makes a picture or a label without having read the picture,
    or if it fails before any step has read the picture, because it may look for a file that is not there.
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
    """What a step did to a watched sample: it read the picture that was there, it made another, it wrote a label."""

    read = False
    made = False
    labelled = False

    @property
    def loaded(self) -> bool:
        return not self.read and (self.made or self.labelled)


class _Watched(dict):
    """A sample that takes notes of what a step reads and writes, in its copies too."""

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

    # These go through __getitem__ and __setitem__; dict's own do not.
    get, items, values = Mapping.get, Mapping.items, Mapping.values
    pop, update = MutableMapping.pop, MutableMapping.update

    def copy(self):
        """As of a dict, with the same notes."""
        return self.__copy__()

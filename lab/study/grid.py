"""The declared grid of a study: arenas (data and schedule), cells (a config and changes to it) and seeds."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, dataclass, field, fields
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

from mmengine.config import Config

from enc_plugin.engine.efolds import config_efolds
from enc_plugin.refused import require_file
from lab import ROOT

from . import input_noise  # noqa: F401  (cells name it)

CELLS = Path(__file__).with_name("cells.py")  # the committed grid

# Networks with a batch norm behind every layer but perhaps the classifier train alike within a class (docs/gauge.md).
GAUGES = ("row means kept", "row means kept + classifier BN", "row means removed", "row means removed + classifier BN")


@dataclass(frozen=True)
class Arena:
    """Data and schedule that the cells of one part of the grid share.

    Attributes:
        title: What reports call it.
        config: Path of the config, relative to the root of the project.
        images: Training images an epoch.
        epochs: Epochs a run.
        overrides: Changes to the config, dotted keys as for ``--cfg-options``.
        pgd: Attack on all test images of a trained network, ``dict(eps=[...], steps=...)``, eps in 1/255; None: none.
        for_gpu: Whether its runs are too many for CPUs and meant for ``python -m lab.side_by_side`` on a GPU.
        instead_of: Arenas that ask the same with less; once this one is complete, it stands in their place.
        repeats: The arena whose cells these are, trained in another way to compare both; None: none.
        again: The arena whose questions this one asks again, with other seeds; None: none. The project's README has no
            column for it.
    """

    name: str
    title: str
    config: str
    images: int
    epochs: int
    overrides: dict = field(default_factory=dict)
    pgd: dict | None = None
    for_gpu: bool = False
    instead_of: tuple[str, ...] = ()
    repeats: str | None = None
    again: str | None = None


@dataclass(frozen=True)
class Cell:
    """One method in one arena: what it changes in the arena's config, and the seeds it runs with.

    Attributes:
        gauge: The class of :data:`GAUGES` whose members train alike, under the arena's own decay, learning rate and
            augmentation; None: none.
    """

    arena: Arena
    name: str
    title: str
    seeds: tuple[int, ...]
    overrides: dict = field(default_factory=dict)
    gauge: str | None = None

    @property
    def id(self) -> str:
        """``arena/cell``: the cell's name among those of all arenas."""
        return f"{self.arena.name}/{self.name}"


@dataclass(frozen=True)
class PlannedRun:
    """One run of the grid: a cell and a seed."""

    cell: Cell
    seed: int

    @property
    def id(self) -> str:
        """``arena/cell-seedN``: the run's name, and the path of its result below the results' folder."""
        return f"{self.cell.id}-seed{self.seed}"

    @property
    def overrides(self) -> dict:
        """The arena's changes to the config, then the cell's, then the seed."""
        return {**self.cell.arena.overrides, **self.cell.overrides, "randomness": {"seed": self.seed}}

    def config(self, root: str | Path = ".") -> Config:
        """The whole config; ``root`` is the folder that the arena's path starts from."""
        cfg = copy.deepcopy(_read(Path(root, self.cell.arena.config).resolve()))
        cfg.merge_from_dict(self.overrides)
        return cfg


@cache
def _read(path: Path) -> Config:
    """A config file, read once a process: mmengine reads all of mmpretrain's model index for each stock base."""
    return Config.fromfile(path)


def cell_efolds(cell: Cell) -> float:
    """E-folds of ||W||^2 by decay in the runs of a cell."""
    cfg = PlannedRun(cell, cell.seeds[0]).config(ROOT)
    return config_efolds(cfg, math.ceil(cell.arena.images / cfg.train_dataloader.batch_size)) or 0.0


@dataclass(frozen=True)
class Grid:
    """All cells of a study, by arena, in the order of the file."""

    arenas: dict[str, Arena]
    cells: dict[str, list[Cell]]

    def arenas_for(self, gpu: bool) -> list[str]:
        """Names of the arenas that are meant for a GPU, or of the others."""
        return [name for name, arena in self.arenas.items() if arena.for_gpu == gpu]

    def runs(self, only: Iterable[str] | None = None) -> list[PlannedRun]:
        """The runs in the order in which they are worth doing: arena by arena, the seeds of all cells in turn.

        Args:
            only: Patterns ``arena`` or ``arena/cell`` (shell-style); None: everything.

        Raises:
            ValueError: If a pattern matches no cell.
        """
        ids, chosen = [cell.id for cells in self.cells.values() for cell in cells], set()
        for pattern in ["*"] if only is None else only:
            matched = {name for name in ids if fnmatchcase(name, pattern) or fnmatchcase(name.split("/")[0], pattern)}
            if not matched:
                raise ValueError(f"only: {pattern!r} matches no cell; the cells are {', '.join(ids)}")
            chosen |= matched
        runs = []
        for cells in self.cells.values():
            for turn in range(max((len(cell.seeds) for cell in cells), default=0)):
                runs += [PlannedRun(x, x.seeds[turn]) for x in cells if x.id in chosen and turn < len(x.seeds)]
        return runs


def load_grid(path: str | Path) -> Grid:
    """Read a grid from a config file that sets ``arenas`` and ``cells``.

    Args:
        path: Python file: ``arenas = dict(name=dict(title, config, images, epochs, ...))``, see :class:`Arena`, and
            ``cells = dict(arena={name: dict(title, seeds, overrides, gauge)})``.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a part is missing, unknown or repeated; names the arena and cell.
    """
    require_file("grid", path)
    content = Config.fromfile(path).to_dict()
    for part in ("arenas", "cells"):
        if not content.get(part):
            raise ValueError(f"grid: {path} sets no {part}")
    arenas = {}
    for name, settings in content["arenas"].items():
        _check_keys(f"arena {name!r}", settings, Arena)
        arenas[name] = Arena(name, **settings)
    for arena in arenas.values():
        if unknown := {*arena.instead_of, arena.repeats or arena.name, arena.again or arena.name} - set(arenas):
            raise ValueError(f"grid: arena {arena.name!r} refers to {', '.join(sorted(unknown))}, which is no arena")
    cells: dict[str, list[Cell]] = {}
    for arena, members in content["cells"].items():
        if arena not in arenas:
            raise ValueError(f"grid: cells are given for the arena {arena!r}; the arenas are {', '.join(arenas)}")
        cells[arena] = [_cell(arenas[arena], name, settings) for name, settings in members.items()]
    return Grid(arenas, cells)


def _cell(arena: Arena, name: str, settings: dict) -> Cell:
    _check_keys(f"cell '{arena.name}/{name}'", settings, Cell)
    seeds: Sequence[int] = settings["seeds"]
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds: cell '{arena.name}/{name}' needs different seeds, at least one, got {seeds!r}")
    if "/" in name:
        raise ValueError(f"grid: cell names become file names, {name!r} holds a '/'")
    gauge = settings.get("gauge")
    if gauge is not None and gauge not in GAUGES:
        raise ValueError(f"gauge: cell '{arena.name}/{name}': expected one of {', '.join(GAUGES)}, got {gauge!r}")
    return Cell(arena, name, settings["title"], tuple(seeds), settings.get("overrides", {}), gauge)


def _check_keys(what: str, settings: dict, kind: type[Arena] | type[Cell]) -> None:
    """Raise ``ValueError`` for settings that ``kind`` does not have, or that it needs and lacks."""
    asked = [f for f in fields(kind) if f.name not in ("name", "arena")]  # these are the keys of the dicts
    known, needed = {f.name for f in asked}, {f.name for f in asked if f.default is f.default_factory is MISSING}
    if unknown := set(settings) - known:
        raise ValueError(f"grid: {what} sets {', '.join(sorted(unknown))}; known are {', '.join(sorted(known))}")
    if missing := needed - set(settings):
        raise ValueError(f"grid: {what} lacks {', '.join(sorted(missing))}")

"""Norms of the layers in the last checkpoint of each run, with batch norms folded in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..build import load_model
from ..checkpoint_files import latest_checkpoint
from ..convert import audit
from ..refused import describe
from ..surgery.folded import FoldedAudit
from . import page, plot
from .runs import Run
from .summary import filled


@dataclass(frozen=True)
class Norms:
    """The folded norms of a run's last checkpoint, or the reason why there are none."""

    checkpoint: str = ""
    table: FoldedAudit | None = None
    reason: str = ""


def read_norms(run: Run) -> Norms:
    """Norms of the layers of the last checkpoint. An error becomes the ``reason``."""
    files = [path for kind in ("epoch_*.pth", "iter_*.pth") for path in run.work_dir.glob(kind)]
    path, _ = latest_checkpoint(run.work_dir, files)
    if path is None:
        return Norms(reason="the work dir contains no complete checkpoint")
    if not run.config.get("model"):
        return Norms(reason="the work dir contains no config with a model")
    name = path.rpartition("/")[2]
    try:
        model, meta = load_model(run.load_config(), path)
        return Norms(f"{name} (averaged weights)" if meta["weights"] == "averaged" else name, audit(model, folded=True))
    except Exception as error:  # models and configs can raise anything
        return Norms(reason=f"{name}: {describe(error, 300)}")


def norms_section(runs: Sequence[Run], norms: Sequence[Norms]) -> list[page.Html]:
    """The section about the norms; empty if none were read."""
    if not norms:
        return []
    known = [(run, one) for run, one in zip(runs, norms, strict=True) if one.table]
    missing = [f"{run.name}: {one.reason}" for run, one in zip(runs, norms, strict=True) if one.table is None]
    if not known:
        return [page.section("Layers", page.details("No checkpoint could be read", page.items(*missing)))]
    series = [
        plot.Series(run.name, range(1, len(one.table) + 1), [row.sq_norm for row in one.table]) if one.table else None
        for run, one in zip(runs, norms, strict=True)
    ]
    title = "Squared norm of each layer, batch norms folded in"
    png = plot.curves(series, "layer, from the input", "squared Frobenius norm", title, logy=True, whole_x=True)
    head = ["run", "checkpoint", "layers", "AM-GM slack", "batch norms that do not fold into a layer"]
    rows = [
        [run.name, one.checkpoint, f"{len(one.table)}", f"{one.table.slack:.4g}", f"{len(one.table.unfolded) or ''}"]
        for run, one in known
    ]
    blocks = [
        page.grid(page.figure(png, title, "Last checkpoint; kernels diag(γ/σ) W.")),
        "AM-GM slack: logarithm of the ratio of the two bounds of eq. 17, the mean power and the product of the "
        "layers' squared norms. It is 0 if all layers have the same norm.",
        page.table(*filled(head, rows)),
        page.details("Squared norm of every layer", _layer_table(known)),
    ]
    if missing:
        blocks += ["Runs without norms:", page.items(*missing)]
    return [page.section("Layers", *blocks)]


def _layer_table(known: Sequence[tuple[Run, Norms]]) -> page.Html:
    shown = [(run.name, {row.name: row.sq_norm for row in one.table}) for run, one in known]
    names = list(dict.fromkeys(name for _, norms in shown for name in norms))
    rows = [[name, *(f"{norms[name]:.4g}" if name in norms else "" for _, norms in shown)] for name in names]
    return page.table(["layer", *(name for name, _ in shown)], rows)

"""Checks that an ENC variant can normalise a weight, for conversion, folding, loading and training."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase

from torch import Tensor

from .weights import imprecise_rows, is_centered, min_elements, num_rows


def check_whole(weight: Tensor) -> None:
    """Raise ``ValueError`` if ``weight`` is a part of a weight: sharded (FSDP, tensor parallelism) or flattened."""
    if hasattr(weight, "placements") or weight.ndim < 2:
        raise ValueError(
            f"params: a weight of shape {tuple(weight.shape)} is sharded or flattened (FSDP), but the shift of "
            "the decay and the projection need whole rows; train with DDP, or use ENC layers with shift_eps=0"
        )


def check_row_length(weight: Tensor, variant: str) -> None:
    """Raise ``ValueError`` if the rows of ``weight`` are too short for ``variant`` (see :func:`min_elements`)."""
    elements = weight.numel() // num_rows(weight, variant)
    if elements < min_elements(variant):
        raise ValueError(f"weight: {_short_rows(weight, variant)}; {_way_out(weight, variant)}leave it out of ENC")


def _short_rows(weight: Tensor, variant: str) -> str:
    elements = weight.numel() // num_rows(weight, variant)
    count = "one element" if elements == 1 else f"{elements} elements"
    becomes = "0 / 0" if is_centered(variant) and elements == 1 else "signs, which cannot be trained"
    return f"shape {tuple(weight.shape)} has rows of {count}, which {variant!r} turns into {becomes}"


def _way_out(weight: Tensor, variant: str) -> str:
    fitting = [v for v in ("wn", "fro") if weight.numel() // num_rows(weight, v) >= min_elements(v)]
    return f"convert it with variant={fitting[0]!r}, or " if fitting else "no variant can train it, so "


def check_normalizable(name: str, weight: Tensor, variant: str, kept: Tensor | None = None) -> None:
    """Raise ``ValueError``, naming the layer and the way out, if ``variant`` cannot normalise ``weight``.

    Synchronizes with the device.

    Args:
        name: Name of the layer.
        weight: Free weight, ``(out, in / groups, *kernel)``. On the meta device, only its shape is checked.
        variant: As in :func:`enc_plugin.functional.enc_weight`.
        kept: Pruning mask shaped like ``weight``, or None.
    """
    exclude = f"leave it plain with exclude=[{name!r}]"
    weight, rows = weight.detach(), num_rows(weight, variant)
    if weight.numel() // rows < min_elements(variant):
        raise ValueError(f"layer {name!r}: {_short_rows(weight, variant)}; {_way_out(weight, variant)}{exclude}")
    if weight.is_meta:
        return
    if not weight.isfinite().all():
        raise ValueError(
            f"layer {name!r}: its weight holds NaN or Inf; start from a finite checkpoint or initialisation"
        )
    if kept is not None:
        _check_kept(name, kept, variant)
    bad = imprecise_rows(weight, variant, kept)
    if bad.any():
        where = "its weight is" if rows == 1 else f"{int(bad.sum())} of its {rows} rows are"
        what = _why_imprecise(weight.reshape(rows, -1)[bad], variant)
        raise ValueError(
            f"layer {name!r}: {where} {what}, which {variant!r} cannot normalise; "
            f"initialise it with random values, or {exclude}"
        )


def check_all_normalizable(weights: Mapping[str, Tensor], variant: str) -> None:
    """:func:`check_normalizable` for several layers by name; one error names all that cannot be normalised."""
    refused = {}
    for name, weight in weights.items():
        try:
            check_normalizable(name, weight, variant)
        except ValueError as error:
            refused[name] = error
    if not refused:
        return
    first = next(iter(refused.values()))
    if len(refused) == 1:
        raise first
    raise ValueError(
        f"{len(refused)} layers cannot be ENC layers. The first: {first}. To leave all of them plain, use "
        f"exclude={_patterns(refused, weights)}"
    ) from first


def _patterns(chosen: Collection[str], names: Collection[str]) -> list[str]:
    """Wildcard patterns that match exactly the names ``chosen`` among ``names``: numbers become ``*`` if possible."""
    patterns = []
    for name in chosen:
        pattern = re.sub(r"\d+", "*", name)
        exact = all(other in chosen for other in names if fnmatchcase(other, pattern))
        patterns.append(pattern if exact else name)
    return list(dict.fromkeys(patterns))


def _why_imprecise(rows: Tensor, variant: str) -> str:
    if not rows.any():
        return "all zero (0 / 0)"
    if is_centered(variant) and (rows.amax(1) == rows.amin(1)).all():
        return "constant (0 / 0)"
    largest = rows.abs().amax(1)
    if ((largest > 1e-15) & (largest < 1e15)).all():
        return "constant up to rounding"
    return f"of a magnitude ({largest.min():.0e}) whose square {str(rows.dtype).removeprefix('torch.')} cannot hold"


def _check_kept(name: str, kept: Tensor, variant: str) -> None:
    """Raise if a pruning mask keeps nothing, or so little of a row that ``variant`` leaves only signs."""
    rows = num_rows(kept, variant)
    count = kept.reshape(rows, -1).bool().sum(1)
    short = ((count > 0) & (count < min_elements(variant))).sum().item()
    what = f"leaves {short} of {rows} rows fewer than {min_elements(variant)} elements"
    what = what if count.any() else "keeps nothing"
    if short or not count.any():
        raise ValueError(
            f"layer {name!r}: its pruning mask {what}, of which {variant!r} leaves only signs; prune less of this "
            "layer, prune whole rows (prune.ln_structured), or prune the network that enc_plugin.fold returns; to undo "
            "this mask: weight_mask.fill_(1)"
        )

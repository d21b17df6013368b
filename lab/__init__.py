"""Measurements of this project: the study, the benchmarks, the sizes of the networks, and all results.

The lab imports ``enc_plugin``, never the other way round. It runs only from a checkout: ``python -m lab.study``,
``python -m lab.bench``, ``python -m lab.zoo``.
"""

from pathlib import Path

from tools import _bootstrap  # noqa: F401  (threads and warnings, before torch is imported)

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "lab" / "results"

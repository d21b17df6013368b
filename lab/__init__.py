"""What measures this project: its study, its benchmarks, its model zoo, and their results.

It uses ``enc_plugin``, which knows nothing of it, and runs from a checkout: ``python -m lab.study``,
``python -m lab.bench``, ``python -m lab.zoo``.
"""

from pathlib import Path

from tools import _bootstrap  # noqa: F401  (threads and warnings, before torch is imported)

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "lab" / "results"

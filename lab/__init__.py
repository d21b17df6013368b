"""What measures this project: its study, its benchmarks, its model zoo, and their results.

It uses ``enc_plugin``, which knows nothing of it, and runs from a checkout: ``python -m lab.study``,
``python -m lab.bench``, ``python -m lab.zoo``.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "lab" / "results"

sys.path.insert(0, str(ROOT / "tools"))
import _bootstrap  # noqa: E402, F401  (threads and warnings, before torch is imported)

"""Fixtures of tests that carry out runs of a small grid."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module")
def grid(request, tmp_path_factory):
    """File of the grid that the test module declares as ``TINY``."""
    path = tmp_path_factory.mktemp("grid") / "grid.py"
    path.write_text(request.module.TINY)
    return path

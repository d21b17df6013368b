"""Training survives SIGKILL at any moment: nothing corrupt is picked up, and the end is that of the unbroken run."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from exactness import assert_same_run

sys.path.insert(0, str(Path(__file__).parent))

from killing import kill_and_resume, make_config, start  # noqa: E402

KILLS = int(os.environ.get("KILLS", 30))


def unbroken_and_killed(tmp_path: Path, kills: int, epochs: int, workers: int = 0, **options):
    whole = make_config(tmp_path / "unbroken", epochs, workers)
    process = start(whole)
    process.join()
    assert process.exitcode == 0, whole.with_name("output.txt").read_text()[-4000:]
    survived = kill_and_resume(make_config(tmp_path / "killed", epochs, workers), kills, **options)
    assert sum(survived.died_in.values()) == kills
    assert_same_run(tmp_path / "unbroken", tmp_path / "killed", f"epoch_{epochs}.pth")
    return survived


@pytest.mark.timeout(900)
def test_three_kills_in_a_step_while_writing_and_in_a_hook(tmp_path):
    survived = unbroken_and_killed(tmp_path, 3, epochs=9, seed=0, kinds=("step", "writing", "hook"))
    assert survived.resumed_from


@pytest.mark.crash
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("workers", [0, 2])
def test_many_kills(tmp_path, workers, capsys):
    """``make test-crash``; the environment's KILLS says how many, for each number of workers."""
    survived = unbroken_and_killed(tmp_path, KILLS, epochs=2 * KILLS + 3, workers=workers, seed=workers)
    with capsys.disabled():
        print(f"\n{workers} workers: {survived}")
    assert all(survived.hits(kind) >= KILLS // 10 for kind in ("step", "saving", "hook"))
    assert survived.torn_files >= 1

import sys

from helpers import ROOT, run_command


def test_every_benchmark_is_a_section_and_the_harness_is_not():
    done = run_command([sys.executable, "tools/benchmark.py", "--list"])
    assert done.returncode == 0, done.stderr
    names = done.stdout.split()
    assert "gbr" in names
    assert "harness" not in names
    assert all((ROOT / "bench" / f"{name}.py").is_file() for name in names)


def test_an_unknown_section_is_refused_with_the_known_ones():
    done = run_command([sys.executable, "tools/benchmark.py", "--only", "speed"])
    assert done.returncode == 2
    assert "gbr" in done.stderr

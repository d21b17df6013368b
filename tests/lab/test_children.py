"""Processes that work together: lines, deaths, and the end of their parent. Nothing here imports torch in them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from lab import ROOT
from lab.children import run_together


def many_lines(say, name):
    for _ in range(200):
        say(name * 500)


def die(say, how, others_died):
    say("begun")
    if how == "raise":
        raise ValueError("an error of the work")
    if how == "exit":
        sys.exit(3)
    if how == "signal":
        os.kill(os.getpid(), signal.SIGKILL)
    while not others_died.exists():
        time.sleep(0.01)
    say("still here")


def test_the_lines_of_all_processes_arrive_whole():
    lines = []
    assert run_together(many_lines, [("a",), ("b",)], lines.append) == []
    assert sorted(lines) == ["a" * 500] * 200 + ["b" * 500] * 200


def test_a_process_that_fails_is_reported_and_stops_no_other(tmp_path, capfd):
    lines, others_died = [], tmp_path / "others died"

    def say(line):
        lines.append(line)
        if sum("failed" in line for line in lines) == 3:
            others_died.touch()

    jobs = [(how, others_died) for how in ("raise", "exit", "signal", "not")]
    assert run_together(die, jobs, say) == [1, 2, 3]
    assert lines.count("begun") == 4
    assert lines[-1] == "still here"
    for number, status in enumerate((1, 3, -9), 1):
        assert f"process {number} of 4 failed with exit status {status}" in lines
    assert "ValueError: an error of the work" in capfd.readouterr().err


PARENT = """
import signal
import time
from lab.children import run_together

def work(say, name):
    say(name)
    time.sleep(600)

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells let what they run in the background ignore it
    run_together(work, [("a",), ("b",)], lambda text: print(text, flush=True))
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_process_outlives_its_parent(tmp_path, how):
    (tmp_path / "parent.py").write_text(PARENT)
    command, environment = [sys.executable, str(tmp_path / "parent.py")], {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    with subprocess.Popen(command, env=environment, **pipes) as parent:
        assert sorted(parent.stdout.readline().strip() for _ in range(2)) == ["a", "b"]
        parent.send_signal(how)
        # The pipe ends with the last process that holds it.
        assert parent.communicate(timeout=60)[0] == ""
    assert parent.returncode != 0

"""Jobs in processes of their own: their lines come through whole, a death is reported, and none outlives its parent."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from threading import Thread


def run_together(work: Callable, jobs: Sequence[tuple], say: Callable[[str], object]) -> list[int]:
    """Call ``work(say, *job)`` for all jobs at once, each in a new process, and wait until all have ended.

    The processes end with this one, however it ends.

    Args:
        work: A function of a module. Its first argument takes a line of text, which reaches this process.
        jobs: The other arguments of each call.
        say: Gets the lines of all jobs here, one after the other, and one for each process that fails.

    Returns:
        Numbers of the processes that failed, because ``work`` raised or a signal ended it; counted from 1.
    """
    context = get_context("spawn")  # a forked process can use neither CUDA nor autograd
    started, running, failed = [], {}, []
    try:
        for number, job in enumerate(jobs, 1):
            reader, writer = context.Pipe(duplex=False)
            started.append(context.Process(target=_carry_out, args=(work, writer, job)))
            started[-1].start()
            writer.close()  # only the new process holds it, so that the pipe ends with that process
            running[reader] = number
        while running:
            for reader in wait(list(running)):
                try:
                    say(reader.recv())
                except EOFError:
                    number = running.pop(reader)
                    process = started[number - 1]
                    process.join()
                    if process.exitcode:
                        failed.append(number)
                        say(f"process {number} of {len(jobs)} failed with exit status {process.exitcode}")
    finally:
        for process in started:
            process.terminate()
            process.join()
    return sorted(failed)


def _carry_out(work: Callable, writer: Connection, job: tuple) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent ends the others
    Thread(target=_end_with_parent, daemon=True).start()
    work(writer.send, *job)


def _end_with_parent() -> None:
    parent_process().join()
    os._exit(1)

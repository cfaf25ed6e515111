"""A driver and the Ray instance it started end together, whichever of them is killed.

A small process beside them ends what a driver leaves: Ray's own processes follow a killed driver, all but two agents,
which take a minute. A thread ends the driver when the instance dies: its client would wait for a minute, or for ever.
Invariant: only processes that hold a file open in the instance's own temporary directory are ended, so no other
instance is touched.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

SECONDS = 10.0  # after which it gives up
DIED = "Ray's {} has died; nothing finished is lost, go on with the same command"


@contextmanager
def guarded(folder: str) -> Iterator[None]:
    """When this context or this process ends, end every other process that uses the directory, and remove it."""
    command = [sys.executable, "-P", __file__, folder]  # whatever modules the working directory holds
    guard = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)  # signals to our group pass it by
    try:
        yield
    finally:
        assert guard.stdin is not None
        guard.stdin.close()
        guard.wait()


@contextmanager
def watched(*names: str) -> Iterator[None]:
    """Inside this context, exit with code 1 when a child process of one of these names ends."""
    from orchestrator.run.last_words import say_last  # here, for this file is a program of its own as well

    children = [(child, name) for child in psutil.Process().children() if (name := child.name()) in names]
    over = threading.Event()

    def watch() -> None:
        while not over.wait(1.0):
            dead = [name for child, name in children if not _alive(child)]
            if dead and not over.is_set():
                say_last(DIED.format(dead[0]))
                os._exit(1)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def users(folder: str, but: int) -> list[psutil.Process]:
    """Processes that hold a file open below a directory, `but` one."""
    found = []
    for process in psutil.process_iter():
        try:
            opened = process.pid != but and process.open_files()
        except psutil.Error:
            continue
        if opened and any(file.path.startswith(f"{folder}/") for file in opened):
            found.append(process)
    return found


def end(folder: str, but: int) -> None:
    """End every process that uses a directory, `but` one, then remove it."""
    left = users(folder, but)
    deadline = time.monotonic() + SECONDS  # from here: the look takes its time on a busy machine
    while left and time.monotonic() < deadline:
        for process in left:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(left, timeout=1)
        left = users(folder, but)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    driver = os.getppid()
    sys.stdin.read()  # until the driver closes it or dies
    end(sys.argv[1], driver)

"""The MLflow server that a scene's records can go to: it goes away, and comes back on its port with what it had."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

from orchestrator.record.home import Home
from orchestrator.record.tracking.server import server_command, server_environment

HERE = "127.0.0.1"
UP_SECONDS = 120.0  # it answers so soon after its start


class Server:
    """A server with a database and files of its own in a folder."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.home = Home(folder)
        self.database = folder / "mlflow.db"
        self.port = _free_port()
        self.uri = f"http://{HERE}:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until it answers; `RuntimeError` where it does not."""
        command = server_command(self.home, HERE, self.port, auth=False)
        environment = {**os.environ, **server_environment(self.home, HERE, self.port, auth=False)}
        with (self.home.root.parent / "server.log").open("ab") as out:
            self.process = subprocess.Popen(
                command, stdout=out, stderr=out, cwd=self.home.root, env=environment, start_new_session=True
            )
        deadline = time.monotonic() + UP_SECONDS
        while not self._answers():
            if time.monotonic() > deadline or self.process.poll() is not None:
                raise RuntimeError(f"no MLflow server on port {self.port}")
            time.sleep(0.2)

    def pause(self) -> None:
        """Let it take connections and answer none."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on, with all that it was asked meanwhile."""
        self._signal(signal.SIGCONT)

    def kill(self) -> None:
        """End it at once, if it runs."""
        self._signal(signal.SIGKILL)
        if self.process is not None:
            self.process.wait()

    def _signal(self, number: int) -> None:
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=5.0):
                return True
        except OSError:
            return False


def _free_port() -> int:
    with socket.socket() as taken:
        taken.bind((HERE, 0))
        return int(taken.getsockname()[1])

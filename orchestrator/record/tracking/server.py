"""MLflow's UI on the records of a home: the command that serves it, and who may reach it.

One process without MLflow's job execution: more of them, on a machine that a study keeps busy, do not answer each
other's health checks in time and are ended before they serve a page. Invariant: nothing beside this machine reaches it
unless the user says so.
"""

from __future__ import annotations

import contextlib
import importlib.util
import ipaddress
import os
import platform
import secrets
import socket
import sqlite3
import sys

import psutil

from orchestrator.files import write_text
from orchestrator.record.home import Home, sqlite_uri
from orchestrator.record.tracking.database import renew_places
from orchestrator.record.tracking.view import WORKFLOW

HERE = ("localhost", "127.0.0.1", "[::1]")
EVERYWHERE = ("0.0.0.0", "::")
AUTH_FILE, AUTH_DATABASE = "mlflow-auth.ini", "mlflow-auth.db"
PASSWORD = "MLFLOW_AUTH_ADMIN_PASSWORD"


def serve(home: Home, host: str, port: int, auth: bool) -> None:
    """Let the server take the place of this process.

    Raises:
        ValueError: the port is taken, the database is none, or an extra is not installed.
    """
    with contextlib.suppress(OSError), socket.create_connection((_reached_at(host), port), timeout=1.0):
        raise ValueError(f"--port {port} is taken by another program: give another one")
    try:
        renew_places(home)
    except sqlite3.Error as error:
        told = f"{home.database_file} cannot be read ({error})"
        raise ValueError(f"{told}: `layerswap doctor` says what to do about it") from None
    more, lines = prepare_auth(home) if auth else ({}, [])
    if not auth and not is_loopback(host):
        print(
            f"warning: --host {host}: whoever reaches port {port} may read, change and delete the records: --auth asks "
            "for a password, and through `ssh -L` no --host is needed",
            file=sys.stderr,
        )
    address = in_url(platform.node() if host in EVERYWHERE else host)
    page = f"http://{address}:{port}/#/experiments?{WORKFLOW}"
    print("\n".join([*lines, f"MLflow UI on {page} (Ctrl-C ends it)"]), flush=True)
    command = server_command(home, host, port, auth)
    os.environ |= {**server_environment(home, host, port, auth), **more}
    os.chdir(home.root)  # the server imports what lies in its working directory
    os.execv(sys.executable, command)


def server_command(home: Home, host: str, port: int, auth: bool) -> list[str]:
    """The words that serve the UI."""
    assert home.artefacts is not None
    where = ["--backend-store-uri", home.database, "--default-artifact-root", home.artefacts]
    reached = ["--host", host, "--port", str(port), "--workers", "1"]
    return [sys.executable, "-m", "mlflow", "server", *where, *reached, *(["--app-name", "basic-auth"] * auth)]


def server_environment(home: Home, host: str, port: int, auth: bool) -> dict[str, str]:
    """What the server is told by variables; what the user set of these beforehand stands."""
    told = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    if not is_loopback(host):  # MLflow answers nobody who calls it by a name that it does not know
        names = list(dict.fromkeys([*HERE, *names_of_this_machine(host)]))
        told["MLFLOW_SERVER_ALLOWED_HOSTS"] = ",".join(f"{name}:{port}" for name in names)
        told["MLFLOW_SERVER_CORS_ALLOWED_ORIGINS"] = ",".join(f"http://{name}:{port}" for name in names)
    if auth:
        told["MLFLOW_AUTH_CONFIG_PATH"] = str((home.root / AUTH_FILE).resolve())
        told["MLFLOW_FLASK_SERVER_SECRET_KEY"] = secrets.token_hex(32)
    return {**told, **{name: os.environ[name] for name in told if name in os.environ}}


def prepare_auth(home: Home) -> tuple[dict[str, str], list[str]]:
    """Make what MLflow's basic auth needs in a home; returns variables and lines for the user.

    The first time there is an administrator to make, with the password that the user set or a new one, told once.

    Raises:
        ValueError: MLflow's extra is not installed.
    """
    if importlib.util.find_spec("flask_wtf") is None:
        raise ValueError("--auth needs an extra of MLflow: pip install 'layerswap[auth]'")
    write_text(
        home.root / AUTH_FILE,
        "[mlflow]\ndefault_permission = READ\nadmin_username = admin\n"
        f"database_uri = {sqlite_uri(home.root / AUTH_DATABASE).replace('%', '%%')}\n"
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n",
    )
    if PASSWORD in os.environ or (home.root / AUTH_DATABASE).exists():
        return {}, []
    password = secrets.token_urlsafe(12)
    return {PASSWORD: password}, [f"user admin, password {password} (told this once; {PASSWORD} sets another one)"]


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server there."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def names_of_this_machine(host: str) -> list[str]:
    """What people may call this machine by, as it stands in a URL: the address that is served, or all where all are."""
    if host not in EVERYWHERE:
        return [in_url(host)]
    found = [host, platform.node(), socket.getfqdn()]
    for addresses in psutil.net_if_addrs().values():
        families = (socket.AF_INET, socket.AF_INET6)
        found += [address.address.partition("%")[0] for address in addresses if address.family in families]
    return [in_url(name) for name in found if name]


def in_url(host: str) -> str:
    """A name or an address as it stands in a URL."""
    return f"[{host}]" if ":" in host else host


def _reached_at(host: str) -> str:
    """Where this machine itself reaches a server on an address."""
    return "127.0.0.1" if host in EVERYWHERE else host

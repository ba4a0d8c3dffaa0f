"""The service as a process: where it listens, who is kept out, and how it ends."""

import asyncio
import ipaddress
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import uvicorn

from dpg.serve.app import make_app
from dpg.serve.service import Service

TOKEN = "DPG_REWARD_TOKEN"
"""The environment variable that holds the token where no file does."""
SHORTEST_TOKEN = 16
SPARE_FILES = 128
"""Open files besides connections: models, libraries, logs."""


def read_token(path: Path | None) -> str | None:
    """The token in a file, or in the environment, or None.

    Raises:
        ValueError: if it is short, or cannot be sent in a header.
    """
    given = os.environ.get(TOKEN) if path is None else path.read_text(encoding="utf-8")
    if given is None:
        return None
    token, source = given.strip(), TOKEN if path is None else path
    if len(token) < SHORTEST_TOKEN or not token.isascii() or not token.isprintable() or " " in token:
        raise ValueError(
            f"the token of {source} has {len(token)} characters. Give at least {SHORTEST_TOKEN} printable ASCII ones "
            "without a space, as `openssl rand -hex 32` writes."
        )
    return token


def refuse_strangers(host: str, token: str | None) -> None:
    """Raise a ValueError if other machines could reach the service and it wants no token."""
    if token is None and not _is_loopback(host):
        raise ValueError(
            f"--host {host} can be reached from other machines, and the service has no token. Give --token-file (or "
            f"{TOKEN}), or listen on 127.0.0.1."
        )


def make_room(connections: int) -> None:
    """Let this process have so many connections.

    Raises:
        ValueError: if the system does not.
    """
    if sys.platform == "win32":
        return  # It has no such limit.
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = connections + SPARE_FILES
    if soft != resource.RLIM_INFINITY and soft < needed:
        if hard != resource.RLIM_INFINITY and hard < needed:
            raise ValueError(
                f"{connections} connections need {needed} open files, and the system allows {hard}. Raise it "
                f"(`ulimit -Hn`), or pass --limit connections={max(hard - SPARE_FILES, 1)}."
            )
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 is any free one.

    Raises:
        ValueError: if it is taken, or not this machine's.
    """
    if not 0 <= port < 2**16:  # Asked of no socket, which would be left open.
        raise ValueError(f"cannot listen on {host}, port {port}: ports are 0 to 65535. Choose another --port.")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise ValueError(f"cannot listen on {host}, port {port}: {error}. Choose another --host or --port.") from error


def url_of(listening: socket.socket) -> str:
    """The address of a listening socket."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


async def serve(
    service: Service,
    listening: socket.socket,
    token: str | None,
    on_start: Callable[[uvicorn.Server], None] = lambda server: None,
) -> None:
    """Answer until a signal, or until `on_start` was given the server and set its `should_exit`."""
    server = uvicorn.Server(
        uvicorn.Config(
            make_app(service, token),
            loop="asyncio",
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,  # Warnings go to standard error, as any program's.
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            limit_concurrency=service.limits.connections,
            timeout_graceful_shutdown=10,
        )
    )
    on_start(server)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(service.run(lambda: server.should_exit))
        tasks.create_task(server.serve(sockets=[listening]))


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"

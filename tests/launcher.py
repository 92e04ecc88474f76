"""Starts `python listener.py …` as a fork of a process that has imported the program already.

Importing takes half a second of CPU, and the tests start the program a thousand times. Apart from
that the fork is like a new process: it has its own environment, directory and standard streams, and
runs the file as `__main__`. Other programs of tests are started in the same way.
"""

import atexit
import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
# Variables that only a new interpreter reads.
READ_AT_START = ("PYTHON", "LC_", "LANG", "LD_")


class Launched:
    """A running program, with what the tests use of subprocess.Popen."""

    def __init__(self, argv: list[str], environ: dict, directory: Path, streams: list[int]):
        request = json.dumps([argv, environ, str(directory)]).encode()
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            socket.send_fds(_launcher(), [request], [theirs.fileno(), *streams])
        self.pid = int(self._socket.recv(10))
        self.returncode: int | None = None

    def __del__(self):
        self._socket.close()  # only here, as several threads may be waiting on it

    def wait(self, timeout: float | None = None) -> int:
        """The exit code. It is peeked at, so that several threads can read it."""
        if self.returncode is None:
            if not select.select([self._socket], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("listener.py", timeout)
            self.returncode = int(self._socket.recv(10, socket.MSG_PEEK))
        return self.returncode

    def poll(self) -> int | None:
        with suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with suppress(ProcessLookupError):  # it has ended, and its exit code is on its way
                os.kill(self.pid, number)


def start(argv: list[str], environ: dict, directory: Path) -> Launched:
    """Start a program with standard error joined to standard output, to be read from `stdout`."""
    read, write = os.pipe()
    with open(os.devnull) as nothing:
        process = Launched(argv, environ, directory, [nothing.fileno(), write, write])
    os.close(write)
    process.stdout = open(read, encoding="utf-8")  # noqa: SIM115
    return process


def can_launch(environ: dict) -> bool:
    """False where `environ` changes a variable that Python reads only at its start."""
    changed = {name for name, _ in environ.items() ^ os.environ.items()} - {"PYTHONPATH"}
    read_at_start = [path / "sitecustomize.py" for path in added_paths(environ)]
    return not any(name.startswith(READ_AT_START) for name in changed) and not any(
        file.exists() for file in read_at_start
    )


def added_paths(environ: dict) -> list[Path]:
    """The directories of PYTHONPATH."""
    return [Path(name) for name in environ.get("PYTHONPATH", "").split(os.pathsep) if name]


@cache
def _launcher() -> socket.socket:
    """The socket on which this process's launcher takes requests. It ends with this process."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        streams = {"stdin": theirs, "stdout": subprocess.DEVNULL}
        subprocess.Popen([sys.executable, __file__], **streams)
    return ours


def serve(requests: socket.socket) -> None:
    """For every request, fork a process that forks the program and reports its exit code."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the processes in between are not waited for
    while True:
        request, descriptors, _, _ = socket.recv_fds(requests, 1 << 18, 4)
        if not request:
            return
        if os.fork() == 0:
            requests.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            return launch(*json.loads(request), *descriptors)
        close(descriptors)


def launch(argv: list, environ: dict, directory: str, answer: int, *streams: int) -> None:
    pid = os.fork()
    if pid == 0:
        os.close(answer)
        return become(argv, environ, directory, streams)
    close(streams)
    with socket.socket(fileno=answer) as caller:
        caller.send(str(pid).encode())
        _, status = os.waitpid(pid, 0)
        caller.send(str(os.waitstatus_to_exitcode(status)).encode())
    os._exit(0)


def become(argv: list, environ: dict, directory: str, streams: tuple) -> None:
    """Turn this fork into the program, as exec would."""
    for number, descriptor in enumerate(streams):
        os.dup2(descriptor, number)
    close(streams)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    errors = {"buffering": 1, "errors": "backslashreplace"}
    sys.stderr = open(2, "w", closefd=False, **errors)  # noqa: SIM115
    os.chdir(directory)
    os.environ.clear()
    os.environ.update(environ)
    time.tzset()
    sys.path[1:1] = map(str, added_paths(environ))
    sys.argv = argv
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    main.__file__ = argv[0]
    try:
        exec(compiled(argv[0]), vars(main))
    except SystemExit as ending:
        if ending.code is None or isinstance(ending.code, int):
            end(ending.code or 0)
        raise


@cache
def compiled(path: str) -> types.CodeType:
    return compile(Path(path).read_bytes(), path, "exec")


def end(code: int) -> None:
    """End as Python does, but without freeing all objects, which would take the most time."""
    threading._shutdown()
    atexit._run_exitfuncs()
    with suppress(OSError, ValueError):  # of which Python has something to say
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def close(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    import pytest  # noqa: F401  which the pipelines of the tests import

    import listener  # noqa: F401
    import ops

    for name in ops.COMMANDS.values():
        importlib.import_module(f"ops.{name}")
    compiled(str(ROOT / "listener.py"))
    gc.freeze()
    serve(socket.socket(fileno=os.dup(0)))

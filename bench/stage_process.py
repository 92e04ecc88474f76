"""Starts the stage API once and controls it before and after each run."""

import http.client
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


@dataclass
class Record:
    """What the stage API saw in a run; times are those of time.monotonic()."""

    arrived: list[tuple[float, str, int]]  # time, job, number of the stage
    done: list[tuple[float, str, int]]  # the same, when a stage had committed

    def lost(self, expected: int) -> int:
        return expected - len({(job, stage) for _, job, stage in self.arrived})

    @property
    def repeated(self) -> int:
        return len(self.arrived) - len({(job, stage) for _, job, stage in self.arrived})


class StageProcess:
    """`python -m bench.stage_api` as a context manager, at an address of this machine."""

    def __init__(self, host: str = "127.0.0.1"):
        self.host = host

    def __enter__(self) -> "StageProcess":
        self.process = subprocess.Popen(
            [sys.executable, "-m", "bench.stage_api", self.host],
            cwd=ROOT,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for the harness, which still talks to it
        )
        self.port = int(self.process.stdout.readline())
        self.connection = http.client.HTTPConnection(self.host, self.port)
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def ask(self, what: str, **body: Any) -> dict:
        try:
            self.connection.request("POST", f"/bench/{what}", json.dumps(body))
            return json.loads(self.connection.getresponse().read())
        except BaseException:
            self.connection.close()  # the next request opens another one
            raise

    def connect(self, dsn: str) -> None:
        """Work on this database, until `disconnect`."""
        self.ask("connect", dsn=dsn)

    def disconnect(self) -> None:
        self.ask("disconnect")

    def reset(self, mode: str = "answer", delay: float = 0.0) -> None:
        """Forget what was seen. mode: "answer", "work" or "accept", see bench/stage_api.py."""
        self.ask("reset", mode=mode, delay=delay)

    def wait(self, answered: int, seconds: float) -> int:
        """Block until so many calls are answered, or for `seconds`; how many are."""
        return self.ask("wait", answered=answered, seconds=seconds)["answered"]

    def record(self) -> Record:
        return Record(**self.ask("record"))

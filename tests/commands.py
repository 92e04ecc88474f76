"""Runs `python listener.py …` to its end, with standard output and standard error apart."""

import contextlib
import io
import logging
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import launcher
import pytest

import config
import listener
import ops
import pipeline

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Done:
    """A command that has ended. Fails the test where the command printed a traceback."""

    code: int
    out: str
    err: str

    def __post_init__(self):
        assert "Traceback" not in self.out + self.err, self.out + self.err

    @property
    def lines(self) -> list[str]:
        assert not self.err, self.err
        return self.out.rstrip("\n").split("\n")

    def refused(self, code: int) -> str:
        """The single line of a refusal, without "error: ". Requires the exit code `code`."""
        assert self.code == code, self
        assert self.err.startswith("error: ") and self.err.count("\n") == 1, self
        return self.err.removeprefix("error: ").rstrip("\n")


def run(
    environ: dict[str, str], directory: Path, *args: str, stdin: str = "", python: tuple = ()
) -> Done:
    """Run a command with no settings but those of `environ`.

    Args:
        python: the interpreter's own options, such as ("-m", "pdb").
    """
    ours = {k: v for k, v in os.environ.items() if k not in config.SETTINGS and k[:2] != "PG"}
    environ = ours | environ
    if not python and launcher.can_launch(environ):
        return Done(*run_by_launcher(environ, directory, args, stdin))
    done = subprocess.run(
        [sys.executable, *python, str(ROOT / "listener.py"), *args],
        env=environ,
        cwd=directory,
        input=stdin,
        capture_output=True,
        encoding="utf-8",
        timeout=60,
    )
    return Done(done.returncode, done.stdout, done.stderr)


def run_by_launcher(
    environ: dict[str, str], directory: Path, args: tuple[str, ...], stdin: str
) -> tuple[int, str, str]:
    """Exit code and outputs of a command. They are written to files, as a pipe could fill up."""
    argv = [str(ROOT / "listener.py"), *args]
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(3)]
        files[0].write(stdin.encode())
        files[0].seek(0)
        process = launcher.Launched(argv, environ, directory, [file.fileno() for file in files])
        try:
            code = process.wait(60)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            raise
        for file in files[1:]:
            file.seek(0)
        return code, *(file.read().decode() for file in files[1:])


def run_here(environ: dict[str, str], *args: str) -> Done:
    """Run a command within this process, which is much quicker. Not for `run`, which never ends."""
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace") for _ in "12")
    log = logging.getLogger("listener")
    before = vars(log).copy()
    pipeline.module()  # is kept by this process: not that of this command's settings
    with contextlib.ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        for name in config.SETTINGS:
            patch.setenv(name, environ.get(name, ""))
        patch.setattr(sys, "argv", ["listener.py", *args])
        config.settings.cache_clear()
        stack.callback(config.settings.cache_clear)
        stack.callback(vars(log).update, before)
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        with pytest.raises(SystemExit) as ended:
            ops.main(listener.cli)
    said = [(stream.flush(), stream.buffer.getvalue().decode())[1] for stream in (out, err)]
    return Done(ended.value.code, *said)

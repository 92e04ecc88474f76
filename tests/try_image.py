"""`make test-image`: build the container image and try it where there is no container engine.

Debian's buildah builds and runs it as root in a chroot. A Debian from debootstrap stands in for the
base image, which only a registry could give; it is kept in the user's cache directory.
"""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from queue import Empty, Queue

import psutil
import psycopg2

from demo.database import EmbeddedDatabase

ROOT = Path(__file__).parent.parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "job-state-listener"
IMAGE = "job-state-listener"
PATIENCE = 60  # seconds for any one line of output
os.environ["PATH"] += ":/usr/sbin:/sbin"  # where debootstrap is
os.environ |= {"STORAGE_DRIVER": "vfs", "BUILDAH_ISOLATION": "chroot"}


def why_not() -> str | None:
    if os.geteuid():
        return "only root can make a chroot"
    missing = [program for program in ("buildah", "debootstrap") if not shutil.which(program)]
    return f"not installed: {' '.join(missing)}" if missing else None


def main() -> None:
    if reason := why_not():
        print(f"test-image skipped: {reason}")
        return
    with ExitStack() as cleanup:
        buildah = Buildah(cleanup)
        base = re.search(r"^FROM (\S+)", (ROOT / "Dockerfile").read_text()).group(1)
        import_base(buildah, base)
        build(buildah)
        database = cleanup.enter_context(EmbeddedDatabase())
        try_image(buildah, database)
    print("test-image passed")


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def run(*command: str | Path) -> str:
    """The command's output; ends the test with its last lines where it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        tail = (done.stdout + done.stderr)[-3000:]
        sys.exit(f"{' '.join(map(str, command))}\nfailed ({done.returncode}):\n{tail}")
    return done.stdout.strip()


class Buildah:
    """buildah with a storage of its own in a temporary directory."""

    def __init__(self, cleanup: ExitStack) -> None:
        folder = tempfile.TemporaryDirectory(prefix="job-state-listener-image-")
        self.folder = Path(cleanup.enter_context(folder))
        self.command = ["buildah", "--root", self.folder / "root", "--runroot", self.folder / "run"]
        cleanup.callback(subprocess.run, [*self.command, "rm", "--all"], capture_output=True)

    def __call__(self, *arguments: str | Path) -> str:
        return run(*self.command, *arguments)


# --- the image -----------------------------------------------------------------------------


def import_base(buildah: Buildah, name: str) -> None:
    """Put a Debian with Python into the storage, under the name of the base image."""
    suite = name.rpartition("-")[2]
    archive = CACHE / f"{suite}.tar"
    if not archive.exists():
        say(f"making a Debian {suite} with debootstrap, kept as {archive}")
        make_base(suite, archive, buildah.folder / "debian")
    container = buildah("from", "scratch")
    buildah("add", container, archive, "/")
    buildah("commit", "--rm", container, name)


def make_base(suite: str, archive: Path, folder: Path) -> None:
    packages = "--include=python3,python3-pip,ca-certificates"
    # The mounts it makes end with it, also when it is interrupted.
    run("unshare", "--mount", "debootstrap", "--variant=minbase", packages, suite, folder)
    # What the official image does its own way: a `python`, and a pip that may install.
    (folder / "usr/local/bin/python").symlink_to("/usr/bin/python3")
    for marker in folder.glob("usr/lib/python3*/EXTERNALLY-MANAGED"):
        marker.unlink()
    for bulk in ("usr/share/doc", "usr/share/locale", "var/cache/apt", "var/lib/apt/lists"):
        shutil.rmtree(folder / bulk)
    archive.parent.mkdir(parents=True, exist_ok=True)
    part = archive.with_suffix(".part")
    run("tar", "-C", folder, "-cf", part, ".")
    part.rename(archive)
    shutil.rmtree(folder)


def build(buildah: Buildah) -> None:
    say("building the image of files that only their owner may read, as with umask 077")
    context = buildah.folder / "context"
    unwanted = shutil.ignore_patterns(".git", ".venv", "node_modules")
    shutil.copytree(ROOT, context, ignore=unwanted)
    run("chmod", "--recursive", "go=", context)
    configuration = buildah.folder / "pip.conf"
    mounts = {"/etc/pip.conf": configuration} | pip_configuration(configuration)
    volumes = [f"--volume={source}:{target}:ro" for target, source in mounts.items()]
    buildah("bud", "--pull-never", "--format=docker", *volumes, f"--tag={IMAGE}", context)


def pip_configuration(file: Path) -> dict[str, Path]:
    """Write how this machine's pip reaches its index to a file; return the local paths it names."""
    known = ("index-url", "extra-index-url", "find-links", "cert", "trusted-host", "proxy")
    listing = run(sys.executable, "-m", "pip", "config", "list")
    found = re.findall(r"^(.+)\.([a-z-]+)=('.*'|\".*\")$", listing, re.MULTILINE)
    found.sort(key=lambda entry: entry[0] == ":env:")  # the environment has the last word
    settings = {name: ast.literal_eval(value) for _, name, value in found if name in known}
    for variable in ("REQUESTS_CA_BUNDLE", "SSL_CERT_FILE"):
        if variable in os.environ:
            settings.setdefault("cert", os.environ[variable])
    lines = [f"{name} = {' '.join(value.split())}\n" for name, value in settings.items()]
    file.write_text("[global]\n" + "".join(lines))
    words = " ".join(settings.values()).split()
    # The pages of an index in a folder point to files beside that folder.
    paths = [Path(w.removeprefix("file://")).parent for w in words if w.startswith("file:///")]
    paths += [Path(word) for word in words if word.startswith("/")]
    return {str(path): path for path in paths if path.exists()}


# --- in the image --------------------------------------------------------------------------


class Running:
    """A process of a container, its output and its exit code."""

    def __init__(self, command: list[str | Path]) -> None:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        self.buildah = subprocess.Popen(command, **pipes)
        self.output, self.lines = [], Queue()
        threading.Thread(target=self.read, daemon=True).start()

    def read(self) -> None:
        for line in self.buildah.stdout:
            self.output.append(line)
            self.lines.put(line)

    def wait_for(self, text: str) -> str:
        """The next line with that text."""
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                line = self.lines.get(timeout=max(0, deadline - time.monotonic()))
            except Empty:
                sys.exit(f"no line with {text!r} within {PATIENCE} s:\n{''.join(self.output)}")
            if text in line:
                say(f"  {line.strip()}")
                return line

    @property
    def process(self) -> psutil.Process:
        """The container's first process: the first below buildah's own helpers."""
        family = psutil.Process(self.buildah.pid).children(recursive=True)
        return next(p for p in family if not p.cmdline()[0].startswith("buildah"))

    def stop(self) -> int:
        """What `docker stop` does."""
        with suppress(StopIteration, psutil.NoSuchProcess):  # ended by itself
            self.process.terminate()
        try:
            return self.buildah.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            for process in psutil.Process(self.buildah.pid).children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            sys.exit(f"not stopped by SIGTERM within {PATIENCE} s:\n{''.join(self.output)}")


def try_image(buildah: Buildah, database: EmbeddedDatabase) -> None:
    image = json.loads(buildah("inspect", "--type=image", IMAGE))["Docker"]["config"]
    assert image["StopSignal"] == "SIGTERM"
    user = int(image["User"])
    assert user >= 1000, "the image runs as root"
    container = buildah("from", "--pull-never", IMAGE)
    settings = database.settings() | {"LISTENER_WORKERS": "2"}

    def command(*arguments: str) -> list[str | Path]:
        given = [f"--env={name}={value}" for name, value in settings.items()]
        return [*buildah.command, "run", *given, container, "--", *arguments]

    with ExitStack() as cleanup:

        def start(*arguments: str) -> Running:
            running = Running(command(*arguments))
            cleanup.callback(running.stop)
            return running

        files = run(*command("ls", "-A", "/app")).split()
        say(f"the image has {' '.join(files)}")
        assert ".env" not in files, "a password went into the image"
        say("the chat example as ALERT_COMMAND")
        settings["ALERT_COMMAND"] = "python demo/monitoring/chat_webhook.py"
        alert = command(*image["Entrypoint"], "alert-test")
        told = subprocess.run(alert, capture_output=True, text=True).stderr.strip()
        assert "exit code 1: CHAT_WEBHOOK_URL is not set" in told, told
        del settings["ALERT_COMMAND"]
        say("docker run IMAGE install")
        print(run(*command(*image["Entrypoint"], "install")))
        say("the stage API of compose.yaml")
        api = start("python", "-m", "demo.stage_api", "--port=0", "--delay-scale=0.1")
        settings["STAGE_API_URL"] = api.wait_for("http://").split()[-1]

        say("docker run IMAGE")
        listener = start(*image["Entrypoint"], *image["Cmd"])
        listener.wait_for("Job State Listener 시작")
        listener.wait_for("PostgreSQL 연결 성공")
        assert listener.process.uids() == (user, user, user)
        say("HEALTHCHECK")
        kind, *healthcheck = image["Healthcheck"]["Test"]
        assert kind == "CMD"
        print(run(*command(*healthcheck)))
        say("one job through all stages")
        insert_job(database)
        for _ in range(5):
            listener.wait_for("파이프라인 단계 실행 성공")
        say("docker stop")
        status = listener.stop()
        listener.wait_for("Job State Listener 중지됨")
        assert status == 0, f"exit code {status}"
        stopped = subprocess.run(command(*healthcheck), capture_output=True, text=True)
        assert stopped.returncode == 1, "HEALTHCHECK says that a stopped listener is alive"
        say(f"HEALTHCHECK after that: {stopped.stdout.strip()}")


def insert_job(database: EmbeddedDatabase) -> None:
    connection = psycopg2.connect(database.dsn())
    connection.autocommit = True
    connection.cursor().execute(
        "INSERT INTO jobs (job_id, tenant_id, current_step, status)"
        " VALUES (gen_random_uuid(), 'image', 'img_gen', 'done')"
    )
    connection.close()


if __name__ == "__main__":
    main()

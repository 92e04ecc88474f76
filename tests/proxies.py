"""Real reverse proxies and application servers, where this machine has them.

Each proxy has a minimal configuration that passes requests on and waits `wait` seconds for the
stage. It has no route for paths that begin with /nowhere/.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from waiting import PATIENCE, until

from demo.database import free_port

SBIN = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"])

NGINX = """
daemon off; master_process on; worker_processes 1; pid {dir}/pid; error_log stderr;
events {{ }}
http {{
    access_log off;
    client_body_temp_path {dir}; proxy_temp_path {dir}; fastcgi_temp_path {dir};
    uwsgi_temp_path {dir}; scgi_temp_path {dir};
    server {{
        listen 127.0.0.1:{port};
        client_max_body_size 1k;
        location / {{ proxy_pass http://127.0.0.1:{backend}; proxy_read_timeout {wait}s; }}
        location /nowhere/ {{ return 404; }}
    }}
}}
"""
HAPROXY = """
defaults
    mode http
    timeout connect 1s
    timeout client 60s
    timeout server {wait}s
    retries 0
frontend f
    bind 127.0.0.1:{port}
    use_backend b unless {{ path_beg /nowhere/ }}
backend b
    server s 127.0.0.1:{backend}
"""
ROUTED = "use_backend b unless {{ path_beg /nowhere/ }}"
HAPROXY_TCP = HAPROXY.replace("mode http", "mode tcp").replace(ROUTED, "default_backend b")
APACHE = """
ServerRoot {dir}
ServerName localhost
PidFile {dir}/pid
Listen 127.0.0.1:{port}
LoadModule mpm_event_module {modules}/mod_mpm_event.so
LoadModule authz_core_module {modules}/mod_authz_core.so
LoadModule proxy_module {modules}/mod_proxy.so
LoadModule proxy_http_module {modules}/mod_proxy_http.so
ErrorLog {dir}/error.log
ProxyTimeout {wait}
ProxyPass /nowhere/ !
ProxyPass / http://127.0.0.1:{backend}/
"""
VARNISH = """
vcl 4.1;
backend b {{ .host = "127.0.0.1"; .port = "{backend}"; .first_byte_timeout = {wait}s; }}
sub vcl_recv {{ if (req.url ~ "^/nowhere/") {{ return (synth(404)); }} }}
"""

CONFIGURATIONS = {
    "nginx": NGINX,
    "haproxy": HAPROXY,
    "haproxy-tcp": HAPROXY_TCP,
    "apache2": APACHE,
    "varnishd": VARNISH,
}
COMMANDS = {
    "nginx": "nginx -p {dir} -c {file}",
    "haproxy": "haproxy -W -db -f {file}",
    "apache2": "apache2 -D FOREGROUND -f {file}",
    "varnishd": "varnishd -j none -F -n {dir}/varnish -a 127.0.0.1:{port} -f {file} -s malloc,10m",
}
RELOAD = {"nginx": signal.SIGHUP, "haproxy": signal.SIGUSR2, "apache2": signal.SIGUSR1}
MODULES = ("/usr/lib/apache2/modules", "/usr/lib64/httpd/modules")


def accepts(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


class Server:
    """A program that listens on a port; a context manager. It leads a process group."""

    def __init__(self, command: list[str], port: int, directory: Path):
        self.command, self.port, self.directory = command, port, directory
        self.url = f"http://127.0.0.1:{port}"
        self.log = directory / f"{port}.log"

    def __enter__(self) -> "Server":
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, cwd=self.directory, stdout=log, stderr=log, start_new_session=True
            )
        try:
            until(lambda: self.has_ended or accepts(self.port), f"{self.command[0]} listens")
            assert not self.has_ended, self.log.read_text()
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def has_ended(self) -> bool:
        return self.process.poll() is not None

    @property
    def children(self) -> set[str]:
        """The pids of the processes that do its work."""
        pid = self.process.pid
        return set(Path(f"/proc/{pid}/task/{pid}/children").read_text().split())

    def reload(self) -> None:
        """Have it reload its configuration, and wait until new processes do its work.

        haproxy's master executes itself once more after its worker has begun to answer, and a
        signal that arrives just then is lost: so it is sent again until it has had an effect.
        """
        before, end = self.children, time.monotonic() + PATIENCE
        while not self.children - before:
            assert time.monotonic() < end, f"{self.command[0]} does not reload"
            self.process.send_signal(RELOAD[Path(self.command[0]).name])
            with suppress(AssertionError):
                until(lambda: self.children - before, "it reloads", timeout=5)

    def kill(self) -> None:
        """End it at once, and all that it started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(PATIENCE)


def proxy(kind: str, backend: str, directory: Path, wait: int = 60) -> Server:
    """The proxy of this kind before the stage at the URL `backend`; skips where there is none."""
    program = kind.partition("-")[0]
    path = shutil.which(program, path=SBIN)
    if path is None:
        pytest.skip(f"{program} is not installed")
    port, file = free_port(), directory / f"{kind}.conf"
    modules = next((path for path in MODULES if Path(path).is_dir()), None)
    values = {"dir": directory, "port": port, "backend": backend.rpartition(":")[2], "file": file}
    file.write_text(CONFIGURATIONS[kind].format(modules=modules, wait=wait, **values))
    command = COMMANDS[program].format(**values).split()
    return Server([path, *command[1:]], port, directory)


def python_server(module: str, app: str, directory: Path, *args: str) -> Server:
    """gunicorn or uvicorn with the module `app`."""
    (directory / "app.py").write_text(app)
    port = free_port()
    where = ["--port", str(port)] if module == "uvicorn" else ["--bind", f"127.0.0.1:{port}"]
    return Server([sys.executable, "-m", module, *where, *args, "app:app"], port, directory)

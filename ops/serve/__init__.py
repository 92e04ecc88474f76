"""`serve`: a live page, in a process of its own, on the standard library's web server."""

import logging
import sys

import click

import config
import logs
import ops
import pipeline
from ops.serve.access import is_loopback, name_in
from ops.serve.app import App
from ops.serve.web import Server
from ops.text import Text
from signals import Signals

log = logging.getLogger("listener.serve")


class Name(Text):
    """A name as it is typed to reach a page, perhaps with a port."""

    def convert(self, value: str, param, context) -> str:
        name = name_in(super().convert(value, param, context))
        if name is None:
            self.fail(f"{value!r} is not a name such as pipeline.example.com.", param, context)
        return name


@click.command(short_help="Serve a live page, metrics and probes over HTTP.")
@click.option("--host", type=Text(), default="127.0.0.1", show_default=True, metavar="ADDRESS",
              help="Where to listen; 0.0.0.0 is every address of this machine.")  # fmt: skip
@click.option("--port", default=8080, show_default=True, type=click.IntRange(0, 65535),
              metavar="PORT", help="Where to listen; 0 takes a free one.")  # fmt: skip
@click.option("--allow-host", "names", type=Name(), multiple=True, metavar="NAME",
              help="A name that people type to reach it, by a proxy; may be repeated.")  # fmt: skip
def serve(host: str, port: int, names: tuple[str, ...]) -> None:
    """Serve a live page until SIGTERM or Ctrl-C: stages, rows, search, /metrics, /healthz, /readyz.

    Without OPS_TOKEN it only reads. With it, a person who has entered the token may retry, call
    again, pause, resume and cancel. See docs/SERVE.md.
    """
    settings = config.settings()
    config.require_database(settings)
    pipeline.module()  # one that cannot be used is said now, not on each page
    logs.set_up(settings)
    host = host.strip("[]")  # as an IPv6 address is written in a URL
    app = App(settings, known_hosts(host, names))
    try:
        server = Server(host, port, app)
    except (OSError, UnicodeError) as error:  # UnicodeError: no name of a host
        reason = getattr(error, "strerror", None) or str(error)
        click.echo(f"error: {host}:{port} cannot be listened on: {reason}: give another --port, or "
                   "--host", err=True)  # fmt: skip
        sys.exit(ops.EXIT_CANNOT_START)
    shown = f"[{host}]" if ":" in host else host
    log.info("상태 페이지 시작: http://%s:%d/ (%s)", shown, server.server_port,
             "OPS_TOKEN으로 조작 가능" if settings.OPS_TOKEN else "읽기 전용")  # fmt: skip
    if not is_loopback(host):
        log.warning("TLS 없이 %s에서 열림: 누구나 읽을 수 있고, 토큰이 암호화되지 않음"
                    " → TLS 프록시 뒤에 둘 것", host)  # fmt: skip
    server.serve_until(Signals())
    log.info("상태 페이지 중지됨")


def known_hosts(host: str, names: tuple[str, ...]) -> set[str] | None:
    """The names that a Host header may have; None: any. Where only this machine can connect, other
    names are refused, as a website could use a browser on it (see access.is_known_host).
    """
    if not names and not is_loopback(host):
        return None
    return {host.lower(), *names}

"""`python listener.py serve` as a process, and people who use its pages."""

import html
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import requests
from conftest import PROGRAM, Listener
from pages import Page

TOKEN = "correct-horse-battery"
STARTED = "상태 페이지 시작: "
FIELD = re.compile(r'<input type="hidden" name="(\w+)" value="([^"]*)"')


class Site:
    """A running `serve`."""

    def __init__(self, process: Listener):
        self.process = process
        self.url = re.search(r"http://\S+(?=/ )", process.wait_for_line(STARTED))[0]

    @property
    def address(self) -> tuple[str, int]:
        return "127.0.0.1", int(self.url.rpartition(":")[2])

    def request(self, method: str, path: str, **headers: str) -> requests.Response:
        url = f"http://127.0.0.1:{self.address[1]}{path}"
        return requests.request(method, url, headers=headers, allow_redirects=False, timeout=60)

    def get(self, path: str, **headers: str) -> requests.Response:
        return self.request("GET", path, **headers)

    def head(self, path: str) -> requests.Response:
        return self.request("HEAD", path)

    def raw(self, sent: bytes, ends: bool = False) -> bytes:
        """The answer to these bytes, which need not be a request; `ends`: nothing can follow."""
        with socket.create_connection(self.address) as connection:
            connection.sendall(sent)
            if ends:
                connection.shutdown(socket.SHUT_WR)
            return b"".join(iter(lambda: connection.recv(4096), b""))

    def page(self, path: str, status: int = 200) -> Page:
        found = self.get(path)
        assert found.status_code == status, found.text
        return Page(found.text)


class Person(requests.Session):
    """A browser without JavaScript: keeps cookies, fills in forms."""

    def __init__(self, site: Site, name: str = "kim"):
        super().__init__()
        self.site, self.name = site, name

    def at(self, path: str, status: int = 200) -> requests.Response:
        found = self.get(self.site.url + path, timeout=60)
        assert found.status_code == status, found.text
        return found

    def form(self, path: str) -> dict[str, str]:
        """The hidden fields of the form at `path`."""
        return {name: html.unescape(value) for name, value in FIELD.findall(self.at(path).text)}

    def submit(self, path: str, fields: dict[str, str], **headers: str) -> requests.Response:
        given = {"Origin": self.site.url, "Sec-Fetch-Site": "same-origin"} | headers
        url = self.site.url + path.partition("?")[0]
        return self.post(url, data=fields, headers=given, allow_redirects=False, timeout=60)

    def enter(self, token: str = TOKEN, after: str = "/", **headers: str) -> requests.Response:
        fields = self.form(f"/login?next={after}")
        return self.submit("/login", fields | {"name": self.name, "token": token}, **headers)

    def does(self, path: str, **fields: str) -> requests.Response:
        """Open the form of an action and send it."""
        return self.submit(path, self.form(path) | fields)


def said(response: requests.Response) -> str:
    """The text of the page's single message (role alert or status)."""
    [told] = [e for e in Page(response.text).root.all() if "role" in e.attributes
              and e.attributes["role"] in ("alert", "status")]  # fmt: skip
    return told.text


@contextmanager
def serving(
    database, directory: Path, *args: str, program: Path = PROGRAM, **settings: str
) -> Iterator[Site]:
    """`serve` on a free port, until the `with` ends."""
    (directory / ".env").touch()
    environ = database.environ | {"HEARTBEAT_DIR": str(directory / "heartbeats")} | settings
    process = Listener(environ, directory, "serve", "--port", "0", *args, program=program)
    try:
        yield Site(process)
    finally:
        process.kill()

"""Parses pages of HTML strictly, and lays them out in a browser."""

import html
import json
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

VOID = {"meta", "br", "link", "img", "input", "hr"}
# SVG elements that may be written as <rect/>; HTML elements may not.
CLOSED = {"rect", "line", "path", "circle"}


@dataclass
class Element:
    tag: str
    attributes: dict[str, str | None]
    children: list["Element | str"] = field(default_factory=list)

    @property
    def text(self) -> str:
        """The text within the element, with a space between child elements."""
        parts = [c if isinstance(c, str) else c.text for c in self.children if not is_code(c)]
        return " ".join(" ".join(parts).split())

    def all(self, tag: str | None = None, kind: str | None = None) -> list["Element"]:
        """All descendants with this tag and this class."""
        found = []
        for child in self.children:
            if isinstance(child, Element):
                classes = (child.attributes.get("class") or "").split()
                if tag in (None, child.tag) and (kind is None or kind in classes):
                    found.append(child)
                found += child.all(tag, kind)
        return found

    def one(self, tag: str | None = None, kind: str | None = None) -> "Element":
        found = self.all(tag, kind)
        assert len(found) == 1, f"{len(found)} {tag} {kind}"
        return found[0]


def is_code(child: Element | str) -> bool:
    return isinstance(child, Element) and child.tag in ("style", "script")


class Page(HTMLParser):
    """A page. Fails the test where an element is not closed properly or an id is not unique."""

    def __init__(self, source: str):
        super().__init__(convert_charrefs=True)
        self.source = source
        self.root = Element("", {})
        self.open = [self.root]
        self.feed(source.replace("<wbr>", ""))  # <wbr> would split names in two
        self.close()
        assert self.open == [self.root], f"not closed: {[e.tag for e in self.open]}"
        ids = [e.attributes["id"] for e in self.root.all() if "id" in e.attributes]
        assert len(ids) == len(set(ids))

    def handle_starttag(self, tag, attrs):
        assert len(attrs) == len(dict(attrs)), f"an attribute twice in {tag}: {attrs}"
        element = Element(tag, dict(attrs))
        self.open[-1].children.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag, attrs):
        assert tag in CLOSED, f"<{tag}/> does not close in HTML"
        self.open[-1].children.append(Element(tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop().tag == tag, f"</{tag}> closes nothing: {self.getpos()}"

    def handle_data(self, data):
        self.open[-1].children.append(data)

    def section(self, name: str) -> Element | None:
        found = [e for e in self.root.all("section") if e.attributes["id"] == name]
        return found[0] if found else None

    def table(self, name: str) -> list[list[str]]:
        """The rows of the one table of a section, without its headings."""
        body = self.section(name).one("tbody")
        cells = ("th", "td")
        return [[c.text for c in row.children if c.tag in cells] for row in body.all("tr")]

    @property
    def figures(self) -> dict[str, str]:
        """The headline figures by name, without their notes."""
        tiles = self.root.one("dl", "figures").all("div")
        said = {tile.one("dt").text: tile.one("dd") for tile in tiles}
        return {name: dd.text.removesuffix(f" {dd.one('small').text}") for name, dd in said.items()}


# --- in a browser --------------------------------------------------------------------------

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
OPTIONS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
           "--disable-background-networking", "--disable-component-update",
           "--disable-sync", "--hide-scrollbars"]  # fmt: skip

# Shows each page in a frame of each width, and measures all once the last one has loaded.
FRAME = '<iframe style="width: {width}px; height: 900px; border: 0" srcdoc="{page}"></iframe>'
MEASURE = """<output></output><script>
addEventListener("load", () => {
  const found = [...document.querySelectorAll("iframe")].map((frame) => {
    const page = frame.contentDocument, root = page.documentElement;
    const right = (e) => e.getBoundingClientRect().right;
    const styled = frame.contentWindow.getComputedStyle;
    const written = [...page.querySelectorAll("svg text")].filter(
      (e) => styled(e).display !== "none");
    return {
      width: root.clientWidth, wide: root.scrollWidth, title: page.title,
      beyond: written.map(right).filter((x) => x > root.clientWidth).length,
      overlaps: [...page.querySelectorAll("svg")].flatMap((chart) => {
        const boxes = [...chart.querySelectorAll("text")].filter(
          (e) => styled(e).display !== "none").map((e) => [e, e.getBoundingClientRect()]);
        return boxes.flatMap(([a, x], i) => boxes.slice(i + 1).filter(([b, y]) =>
          x.left < y.right && y.left < x.right && x.top < y.bottom && y.top < x.bottom
        ).map(([b]) => `${a.textContent} / ${b.textContent}`));
      }),
      unseen: written.filter((e) => e.textContent && !e.getComputedTextLength()).length,
      ground: styled(page.body).backgroundColor,
      charts: page.querySelectorAll("svg[role=img]").length,
      scripts: page.scripts.length,
    };
  });
  document.querySelector("output").textContent = JSON.stringify(found);
});
</script>"""


def laid_out(pages: list[str], widths: list[int], directory: Path, dark: bool = False):
    """Measures of each page at each width, as laid out by Chromium: all pages of the first width,
    then those of the next.
    """
    frames = [FRAME.format(width=w, page=html.escape(p)) for w in widths for p in pages]
    wrapper = directory / "wrapper.html"
    wrapper.write_text("<!DOCTYPE html>" + "".join(frames) + MEASURE, encoding="utf-8")
    profile = f"--user-data-dir={directory / 'profile'}"
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    command = [CHROMIUM, *OPTIONS, profile, scheme, "--dump-dom", wrapper.as_uri()]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=120)
    said = re.search(r"<output>(.+?)</output>", done.stdout, re.DOTALL)
    assert said, done.stderr[-2000:]
    return json.loads(html.unescape(said[1]))

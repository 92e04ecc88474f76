"""What the READMEs, docs/ and .env.example say is what the program does."""

import ast
import inspect
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import click
import dotenv
import pytest
from claims import connected
from test_schema_security import GRANTS as PRIVILEGES
from test_schema_security import one_of_everything

import config
import db
import listener as program
import ops
from demo import five_stages
from ops.problem import GRANTS
from pipeline import limits

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
DEFAULTS = {name: default for name, (default, _) in config.SETTINGS.items()}
DEFAULTS["HEARTBEAT_DIR"] = "/tmp/job-state-listener"
PAGES = [
    *ROOT.glob("*.md"), *ROOT.glob("docs/*.md"),
    *(page for page in ROOT.glob("*/**/README.md") if "node_modules" not in page.parts),
]  # fmt: skip
PAGES = sorted({str(page.relative_to(ROOT)) for page in PAGES if ".venv" not in page.parts})
ENGLISH = [page for page in PAGES if not page.endswith(".ko.md") and page != "CHANGELOG.md"]


class Readme:
    """A README's headings, tables and code blocks."""

    def __init__(self, name: str):
        self.text = (ROOT / name).read_text(encoding="utf-8")
        self.blocks = BLOCK.findall(self.text)
        prose = BLOCK.sub("", self.text)
        self.headings = re.findall(r"^(#+) (.+)$", prose, re.MULTILINE)
        # Without its header and the line below it.
        self.tables = [
            [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
            for lines in (t.splitlines() for t in re.findall(r"(?:^\|.*\n)+", prose, re.MULTILINE))
        ]

    def table(self, key: str) -> list[list[str]]:
        """The one table with a row that begins with `key`."""
        found = [table for table in self.tables if any(row[0] == key for row in table)]
        assert len(found) == 1, f"{len(found)} tables have a row {key}"
        return found[0]

    def block(self, language: str, start: str) -> str:
        found = [body for lang, body in self.blocks if lang == language and body.startswith(start)]
        assert len(found) == 1, f"{len(found)} {language} blocks begin with {start!r}"
        return found[0]

    def mentions(self, words: str) -> bool:
        return re.search(rf"(?<![\w-]){re.escape(words)}(?![\w-])", self.text) is not None


@pytest.fixture(params=["README.md", "README.ko.md"])
def readme(request) -> Readme:
    return Readme(request.param)


# --- the pages -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", [
    "README", "docs/HOW_IT_WORKS", "docs/INSTALLING", "docs/SETTINGS", "docs/STAGES",
    "docs/ADOPTING", "docs/DEPLOYING", "docs/OPERATING", "docs/LIMITS",
    "docs/RELIABILITY", "docs/RECEIVER", "docs/SERVE", "docs/SIGNING",
])  # fmt: skip
def test_both_languages_have_the_same_structure(name):
    english, korean = Readme(f"{name}.md"), Readme(f"{name}.ko.md")
    assert [len(marks) for marks, _ in korean.headings] == [len(m) for m, _ in english.headings]
    shapes = [[[len(row) for row in table] for table in r.tables] for r in (english, korean)]
    assert shapes[0] == shapes[1]
    # README's first block is the sketch, whose words are translated.
    first = 1 if name == "README" else 0
    assert korean.blocks[first:] == english.blocks[first:]


def test_first_screen_says_what_it_is_and_how_to_try_it(readme):
    screen = readme.text.splitlines()[:30]
    assert screen[0] == "# Job State Listener"
    assert any("POST /api/" in line for line in screen)
    for start in ("make demo ", "make test ", "[LISTENER] Job 상태 변화 감지: job="):
        assert any(line.startswith(start) for line in screen), start


@pytest.mark.parametrize("name, lines", [
    ("README.md", 200), ("README.ko.md", 200), ("CONTRIBUTING.md", 60),
])  # fmt: skip
def test_page_is_short(name, lines):
    assert len(Readme(name).text.splitlines()) <= lines


def anchors(page: Path) -> set[str]:
    """What GitHub calls the headings of a page."""
    headings = Readme(str(page.relative_to(ROOT))).headings
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for _, heading in headings)
    return {heading.replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    for link in re.findall(r"\]\(([^)]+)\)", BLOCK.sub("", Readme(name).text)):
        file, _, anchor = link.partition("#")
        if file.startswith("https:"):
            continue
        page = (ROOT / name).parent / file if file else ROOT / name
        assert page.exists(), link
        assert not anchor or anchor in anchors(page.resolve()), link


def test_section_that_error_messages_name_is_there():
    title, page = re.fullmatch(r"see '(.+)' in (.+)", GRANTS).groups()
    assert title in [heading for _, heading in Readme(page).headings]


def test_every_page_is_in_the_index():
    linked = re.findall(r"\]\((\S+?\.md)\)", Readme("docs/README.md").text)
    assert {page.name for page in ROOT.glob("docs/*.md")} - {"README.md"} <= set(linked)


# --- settings ------------------------------------------------------------------------------


def settings_of(page: str) -> dict[str, str]:
    table = Readme(page).table("`STAGE_TIMEOUT`")
    return {name.strip("`"): default for name, default, _ in table}


@pytest.mark.parametrize("language", [".md", ".ko.md"])
def test_settings_are_documented_with_their_defaults(language):
    documented = settings_of(f"docs/SETTINGS{language}")
    assert documented == {n: f"`{value}`" if value else "–" for n, value in DEFAULTS.items()}
    assert settings_of(f"README{language}").items() <= documented.items()


def test_env_example_has_every_setting_in_order_with_its_default():
    text = (ROOT / ".env.example").read_text(encoding="utf-8")
    given = re.findall(r"^#?([A-Z_]+)=(.*)$", text, re.MULTILINE)
    given = [(name, value) for name, value in given if not name.startswith(config.STAGE_URL)]
    assert [name for name, _ in given] == list(config.SETTINGS)
    assert {n: v for n, v in given if DEFAULTS[n]} == {n: v for n, v in DEFAULTS.items() if v}
    config.read(dict(given))


def test_env_example_as_it_is_changes_no_default():
    values = dotenv.dotenv_values(ROOT / ".env.example", interpolate=False)
    assert len(values) > 5
    assert config.read(values) == config.read({})


# --- commands ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", program.cli.list_commands(None))
def test_every_command_and_option_is_documented_and_has_help(name):
    pages = [Readme(page) for page in ENGLISH]
    command = program.cli.get_command(None, name)
    assert any(page.mentions(f"jsl {name}") for page in pages)
    assert command.get_short_help_str()
    for option in command.params:
        if isinstance(option, click.Option):
            longest = max(option.opts, key=len)
            assert option.help and any(page.mentions(longest) for page in pages), longest


def typed(page: Readme) -> list[list[str]]:
    """What follows jsl wherever the page has something to type."""
    lines = [line for lang, body in page.blocks if lang == "bash" for line in body.splitlines()]
    lines += re.findall(r"`((?:\./)?jsl [^`…]+)`", BLOCK.sub("", page.text))
    commands = [line.split(" | ")[0].split(" >")[0] for line in lines]
    words = [shlex.split(command, comments=True) for command in commands]
    return [w[w.index(jsl) + 1 :] for w in words for jsl in ("./jsl", "jsl", "listener.py")
            if jsl in w]  # fmt: skip


@pytest.mark.parametrize("page", ENGLISH)
def test_every_command_line_can_be_parsed(page):
    for name, *args in (words or ["run"] for words in typed(Readme(page))):
        if "--help" not in (name, *args):
            command = program.cli.get_command(None, name)
            command.make_context(name, args)  # raises on what it does not know


def test_commands_are_written_in_one_way():
    explained = ["README.md", "README.ko.md", "docs/INSTALLING.md", "docs/INSTALLING.ko.md"]
    others = set(PAGES) - {*explained, "CHANGELOG.md"}
    assert [page for page in others if Readme(page).mentions("python listener.py")] == []


def test_every_make_target_exists():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    for page in PAGES:
        text = Readme(page).text
        assert set(re.findall(r"(?:^|`)make ([a-z-]+)", text, re.MULTILINE)) <= targets, page


def test_exit_codes_are_listed(readme):
    listed = re.search(r"(?:Exit codes|종료 코드): (.+?)\n\n", readme.text, re.DOTALL)[1]
    codes = [int(part.split()[0]) for part in listed.split(";")]
    assert codes == [0, ops.EXIT_PROBLEM, ops.EXIT_BAD_INPUT, ops.EXIT_DATABASE_AWAY]


# --- files, stages, log lines --------------------------------------------------------------


@pytest.fixture(params=["docs/HOW_IT_WORKS.md", "docs/HOW_IT_WORKS.ko.md"])
def how_it_works(request) -> Readme:
    return Readme(request.param)


def test_file_table_names_what_is_there(how_it_works):
    named = {name.strip("`") for name, _ in how_it_works.table("`listener.py`")}
    assert {path.name for pattern in ("*.py", "*.sql") for path in ROOT.glob(pattern)} <= named
    for name in named:
        assert (ROOT / name).is_dir() if name.endswith("/") else (ROOT / name).is_file(), name


def test_stage_table_is_the_pipeline(how_it_works):
    rows = how_it_works.table("img_gen, done")
    states = {tuple(state.split(", ")): stage.split()[0] for state, stage, _ in rows}
    assert states == {state: function.__name__ for state, function in five_stages.PIPELINE.items()}
    for state, _, path in rows:
        function = five_stages.PIPELINE[(*state.split(", "),)]
        assert f'call.post("{path}")' in inspect.getsource(function)


def test_log_lines_of_the_table_are_logged(readme):
    logged = []
    for path in ROOT.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("log."):
                logged += [a.value for a in node.args if isinstance(a, ast.Constant)]
    logged = [str(text).replace("LISTEN '%s'", f"LISTEN '{db.CHANNEL}'") for text in logged]
    for keyword, _ in readme.table("`재연결 시도`"):
        assert any(text.startswith(keyword.strip("`")) for text in logged), keyword


# --- SQL and Python ------------------------------------------------------------------------


def test_grants_are_what_a_listener_needs(database, make_role, api, listener):
    page, role = Readme("docs/INSTALLING.md"), make_role(database)
    sql = page.block("sql", "GRANT SELECT ON jobs")
    given = re.findall(r"GRANT (.+) ON (.+) TO listener;", sql)
    assert {
        table: privileges.split(", ")
        for privileges, tables in given
        for table in tables.split(", ")
    } == PRIVILEGES
    database.rows(re.sub(r"\blistener;", f"{role};", sql))
    with connected(database, DB_USER=role, DB_PASSWORD=role) as conn:
        one_of_everything(database, conn)
    job = database.add_job()
    process = listener(database, "run", "--once", api=api, DB_USER=role, DB_PASSWORD=role)
    assert process.wait() == 0, process.output
    assert [a.outcome for a in database.attempts(job)][:1] == ["succeeded"]


def test_job_set_back_is_called_again(database):
    sql = Readme("docs/OPERATING.md").block("sql", "UPDATE jobs")
    job = database.add_job("planner", "running")
    database.rows(sql.replace("JOB_ID", job))
    assert database.owed(job).stage == "planner"


@pytest.mark.skipif(not shutil.which("bash"), reason="bash is not installed")
def test_completion_completes_commands_options_and_stages(tmp_path):
    script = Readme("docs/INSTALLING.md").block("bash", "ln -s").replace("/srv/listener", str(ROOT))
    typed = """
        for line in 'jsl pau' 'jsl pause pl' 'jsl status --w'; do
            COMP_WORDS=($line) COMP_CWORD=$(($(wc -w <<< "$line") - 1)) COMPREPLY=()
            _jsl_completion jsl && echo "${COMPREPLY[*]}"
        done
        complete -p jsl"""
    (tmp_path / "bin").mkdir()
    python = Path(sys.executable).parent  # where jsl finds no .venv
    path = f"{tmp_path / 'bin'}:{python}:{os.environ['PATH']}"
    home = {"HOME": str(tmp_path), "PATH": path}
    command = ["bash", "--norc", "-c", script + typed]
    done = subprocess.run(command, env=home, capture_output=True, encoding="utf-8")
    assert done.stdout.splitlines() == [
        "pause", "planner", "--watch", "complete -o nosort -F _jsl_completion jsl",
    ], done.stderr  # fmt: skip


def test_example_of_a_stage_function_works(database, accepting, caller, add_stage):
    example: dict = {}
    exec(Readme("README.md").block("python", "def overlay(call)"), example)
    add_stage(example["overlay"], "planner")
    database.rows("CREATE TABLE overlay_inputs (job_id uuid, text text, proposal_id bigint)")
    job, worker = database.add_job("planner"), caller(accepting.url)
    attempt = worker.call()
    assert attempt.outcome == "retry" and "no row" in attempt.error
    database.rows("INSERT INTO overlay_inputs VALUES (%s, '안녕')", job)
    attempt = worker.call_again()
    assert attempt.outcome == "retry" and "proposal_id is NULL" in attempt.error
    assert accepting.connections == 0
    database.rows("UPDATE overlay_inputs SET proposal_id = 7")
    assert worker.call_again().outcome == "succeeded"
    body = json.loads(accepting.requests[0].body)
    assert body == {"job_id": job, "tenant_id": "tenant", "text": "안녕", "proposal_id": 7}


def test_each_limit_of_a_stage_has_an_example_that_works():
    shown = set()
    for _, body in Readme("docs/STAGES.md").blocks:
        if "@limits(" in body:
            exec(body, {"limits": limits})
            calls = (node for node in ast.walk(ast.parse(body)) if isinstance(node, ast.Call))
            shown |= {k.arg for c in calls if ast.unparse(c.func) == "limits" for k in c.keywords}
    assert shown == set(inspect.signature(limits).parameters)

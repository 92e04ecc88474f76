"""docs/DEPLOYING.md: compose.yaml, deploy/ and the dashboard fit the program as it is."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import pytest
import yaml
from test_readme import Readme
from waiting import AWAY, until

import config
import listener as program
from ops.metrics import FAMILIES, OUTCOMES

ROOT = Path(__file__).parent.parent
COMPOSE = ROOT / "compose.yaml"
UNITS = sorted((ROOT / "deploy" / "systemd").iterdir())
MANIFESTS = sorted((ROOT / "deploy" / "kubernetes").iterdir())
DASHBOARD = ROOT / "demo" / "monitoring" / "dashboard.json"
PAGES = ["docs/DEPLOYING.md", "docs/DEPLOYING.ko.md"]
DEFAULTS = config.read({})
PATIENCE = 60


def documents(file: Path) -> list[dict]:
    return list(yaml.safe_load_all(file.read_text(encoding="utf-8")))


def manifest(kind: str) -> dict:
    found = [each for file in MANIFESTS for each in documents(file) if each["kind"] == kind]
    assert len(found) == 1
    return found[0]


def seconds(text: str) -> int:
    return int(text.removesuffix("m")) * 60


def longest_call(settings) -> float:
    """The longest time that a listener may have to wait for a call before it stops."""
    return settings.STAGE_TIMEOUT + settings.LEASE_MARGIN


# --- all of them ---------------------------------------------------------------------------


NAME_NO_COMMAND = ("job-state-listener-check.timer", "keda.yaml", "settings.yaml")


@pytest.mark.parametrize(
    "file",
    [file for file in (COMPOSE, *UNITS, *MANIFESTS) if file.name not in NAME_NO_COMMAND],
    ids=lambda file: file.name,
)
def test_every_command_exists(file):
    text = file.read_text(encoding="utf-8")
    named = re.findall(r"python listener\.py ([a-z][a-z-]*)", text)
    named += re.findall(r"\[python, listener\.py, ([a-z-]+)\]", text)
    named += re.findall(r"args: \[([a-z-]+)\]", text)
    assert named and set(named) <= set(program.cli.list_commands(None))


@pytest.mark.parametrize("page", PAGES)
def test_every_file_is_on_the_page(page):
    folders = {str(file.parent.relative_to(ROOT)) for file in (*UNITS, *MANIFESTS)}
    page = Readme(page)
    assert all(page.mentions(folder) for folder in folders)
    assert all(page.mentions(file.name) for file in MANIFESTS)


@pytest.mark.parametrize("way", ["Compose", "systemd", "Kubernetes"])
def test_each_way_is_started_with_five_lines(way):
    section = Readme(PAGES[0]).text.split(f"\n## {way}\n")[1].split("\n## ")[0]
    [first, *_] = re.findall(r"^```bash\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    assert len(first.splitlines()) == 5


def test_the_chat_example_is_in_the_image():
    named = re.findall(r"(?<=ALERT_COMMAND=python )\S+(?=`)", Readme(PAGES[0]).text)
    taken = (ROOT / ".dockerignore").read_text().splitlines()
    assert named and all((ROOT / file).is_file() and f"!{file}" in taken for file in named)


# --- Compose -------------------------------------------------------------------------------


@pytest.fixture
def services() -> dict:
    return documents(COMPOSE)[0]["services"]


@pytest.fixture
def shell(tmp_path):
    """shell(script, **settings): run it as the image would, with a `sleep` that does not.

    `sleep` leaves a file, which tells that it was run.
    """
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "python").write_text(f'#!/bin/sh\n. ./before\nexec {sys.executable} "$@"\n')
    (programs / "sleep").write_text(f"#!/bin/sh\ntouch {tmp_path / 'slept'}\n")
    for file in programs.iterdir():
        file.chmod(0o755)
    (tmp_path / "listener.py").symlink_to(ROOT / "listener.py")
    (tmp_path / "before").touch()
    (tmp_path / ".env").touch()

    def run(script: str, within=(), **settings: object) -> subprocess.CompletedProcess:
        environ = {"PATH": f"{programs}:/usr/bin:/bin"} | {k: str(v) for k, v in settings.items()}
        return subprocess.run(
            [*within, "sh", "-c", script.replace("$$", "$")],
            env=environ, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE,
        )  # fmt: skip

    return run


@pytest.mark.skipif(not shutil.which("docker-compose"), reason="docker-compose is not installed")
@pytest.mark.parametrize("profile", [None, "postgres", "demo", "serve"])
def test_docker_compose_takes_the_file(tmp_path, profile):
    shutil.copy(COMPOSE, tmp_path)
    shutil.copy(ROOT / ".env.example", tmp_path / ".env")
    command = ["docker-compose", *(["--profile", profile] if profile else []), "config"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_compose_uses_nothing_that_docker_compose_1_does_not_know(services):
    for service in services.values():
        assert isinstance(service.get("env_file", ""), str)
        for needed in service.get("depends_on", {}):
            assert "profiles" not in services[needed]  # an error where the profile is not given


def test_compose_names_only_settings(services):
    given = set(re.findall(r"\$\{(\w+)", COMPOSE.read_text()))
    ours = [service for service in services.values() if "build" in service]
    given |= {name for service in ours for name in service["environment"]}
    assert len(ours) == 4 and given and given <= set(config.SETTINGS)


def test_compose_gives_our_containers_no_rights_and_rotates_logs(services):
    for service in services.values():
        assert set(service["logging"]["options"]) == {"max-size", "max-file"}
        if "build" in service:
            assert service["read_only"] and service["init"] and service["cap_drop"] == ["ALL"]
            assert service["security_opt"] == ["no-new-privileges:true"]


def test_compose_grace_period_is_longer_than_a_call(services):
    assert seconds(services["listener"]["stop_grace_period"]) > longest_call(DEFAULTS)


def test_compose_install_waits_for_a_database_that_starts(
    services, shell, empty_database, tmp_path
):
    away = "; ".join(f"export {name}={value}" for name, value in AWAY.items())
    (tmp_path / "before").write_text(f"[ -e slept ] || {{ {away}; }}\n")
    done = shell(services["install"]["command"][0], **empty_database.environ)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("cannot be reached") == 1
    assert empty_database.rows("SELECT count(*) FROM pipeline_stages")[0][0] == 5


def test_compose_install_ends_at_once_where_waiting_does_not_help(services, shell, tmp_path):
    done = shell(services["install"]["command"][0], DB_HOST="a b")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert not (tmp_path / "slept").exists()


# `init: true`: process 1 is the parent of the listener, and ends as it does.
INIT = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc",
        "sh", "-c", '"$@" & wait $!; exit $?', "sh"]  # fmt: skip


def child(pid: int | str) -> str:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0]


@pytest.mark.parametrize("hangs", [False, True], ids=["alive", "hangs"])
def test_compose_health_check_ends_a_container_whose_listener_hangs(
    services, shell, database, listener, tmp_path, hangs
):
    if subprocess.run([*INIT, "true"], capture_output=True).returncode:
        pytest.skip("a pid namespace needs root")
    process = listener(database, within=INIT)
    process.wait_for_line("PostgreSQL 연결 성공")
    inside = ["nsenter", "--target", child(process.pid), "--pid"]
    workers = until(lambda: worker_pids(process.pid), "workers")
    heartbeats = tmp_path / ("nothing" if hangs else "heartbeats")
    done = shell(services["listener"]["healthcheck"]["test"], inside, HEARTBEAT_DIR=heartbeats)
    assert (tmp_path / "slept").exists() == hangs, done.stdout + done.stderr
    if hangs:
        assert process.wait() == 128 + 9
        until(lambda: not any(Path("/proc", pid).exists() for pid in workers), "no worker")
    else:
        assert done.returncode == 0 and done.stdout.startswith("ok: ")


def worker_pids(pid: int) -> list[str]:
    program = child(child(pid))
    return Path(f"/proc/{program}/task/{program}/children").read_text().split()


# --- systemd -------------------------------------------------------------------------------


def unit(name: str) -> list[tuple[str, str]]:
    text = (ROOT / "deploy" / "systemd" / name).read_text()
    return re.findall(r"^(\w+)=(.*)$", text, re.MULTILINE)


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd is not installed")
def test_systemd_takes_the_units(tmp_path):
    for file in UNITS:
        text = file.read_text().replace("/srv/listener/.venv/bin/python", sys.executable)
        (tmp_path / file.name).write_text(re.sub("^User=.*\n", "", text, flags=re.MULTILINE))
    command = ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no"]
    done = subprocess.run(
        [*command, *(tmp_path / file.name for file in UNITS)], capture_output=True, text=True
    )
    ours = [line for line in done.stderr.splitlines() if "job-state-listener" in line]
    assert done.returncode == 0 and not ours, done.stderr


def test_systemd_units_name_only_settings_and_each_other():
    for file in UNITS:
        given = [value for name, value in unit(file.name) if name == "Environment"]
        names = {word.split("=")[0] for value in given for word in value.split()}
        assert names <= {*config.SETTINGS, "PYTHONUNBUFFERED"}
        named = re.findall(r"\bjob-state-listener[a-z-]*\.(?:service|timer)", file.read_text())
        assert set(named) <= {file.name for file in UNITS}


def test_systemd_lets_workers_finish_and_calls_end():
    listener_unit = dict(unit("job-state-listener.service"))
    assert listener_unit["KillMode"] == "process" and listener_unit["Restart"] == "always"
    assert listener_unit["OOMPolicy"] == "continue"
    assert int(listener_unit["TimeoutStopSec"]) > longest_call(DEFAULTS)


def test_systemd_check_reads_the_heartbeats_of_the_listener():
    heartbeats = [
        re.search(r"HEARTBEAT_DIR=(\S+)", dict(unit(name))["Environment"])[1]
        for name in ("job-state-listener.service", "job-state-listener-check.service")
    ]
    runtime = dict(unit("job-state-listener.service"))["RuntimeDirectory"]
    assert heartbeats == [f"/run/{runtime}"] * 2


@pytest.fixture
def systemctl(tmp_path):
    """A PATH whose systemctl prints what it was given."""
    (tmp_path / "systemctl").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "systemctl").chmod(0o755)
    return f"{tmp_path}:/usr/bin:/bin"


KILL = "kill --kill-who=main --signal=KILL job-state-listener"


@pytest.mark.parametrize("status", ["0", "1", "2", "TERM"])
def test_systemd_check_kills_a_listener_that_hangs_and_no_other(status, systemctl):
    kill = dict(unit("job-state-listener-check.service"))["ExecStopPost"]
    command = shlex.split(kill.removeprefix("+").replace("$$", "$"))
    environ = {"PATH": systemctl, "EXIT_STATUS": status}
    said = subprocess.run(command, env=environ, capture_output=True, text=True, check=True).stdout
    assert said == (f"{KILL}.service\n" if status == "1" else "")


@pytest.mark.parametrize("page", ["OPERATING.md", "OPERATING.ko.md"])
@pytest.mark.parametrize("code", [0, 1, 2, None])
def test_cron_kills_a_listener_that_hangs_and_no_other(page, code, systemctl, tmp_path):
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    [line] = re.findall(r"^\* \* \* \* \* (cd .*systemctl kill.*)$", text, re.MULTILINE)
    (tmp_path / "jsl").write_text(f"#!/bin/sh\nexit {code}\n")
    (tmp_path / "jsl").chmod(0o755)
    there = tmp_path / "nowhere" if code is None else tmp_path
    command = line.replace("/srv/listener", str(there))
    done = subprocess.run(["sh", "-c", command], env={"PATH": systemctl}, capture_output=True)
    assert done.stdout.decode() == (f"{KILL}\n" if code == 1 else "")


# --- Kubernetes ----------------------------------------------------------------------------


@pytest.mark.parametrize("file", MANIFESTS, ids=lambda file: file.name)
def test_kubernetes_takes_the_manifests(file):
    validator = pytest.importorskip("kubernetes_validate")
    for each in documents(file):
        if not each["apiVersion"].startswith("keda.sh/"):
            validator.validate(each, validator.latest_version(), strict=True)


def kubernetes_settings() -> dict[str, str]:
    return manifest("ConfigMap")["data"] | manifest("Secret")["stringData"]


def test_kubernetes_names_only_settings_with_values_that_are_allowed():
    given = kubernetes_settings()
    assert set(given) <= set(config.SETTINGS)
    assert not config.read(given).WARNINGS


def pods() -> list[dict]:
    return [manifest(kind)["spec"]["template"]["spec"] for kind in ("Job", "Deployment")]


def test_kubernetes_pods_have_no_rights_and_the_user_of_the_image():
    user = int(re.search(r"^USER (\d+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)[1])
    for pod in pods():
        [container] = pod["containers"]
        rights = container["securityContext"]
        assert rights["readOnlyRootFilesystem"] and not rights["allowPrivilegeEscalation"]
        assert rights["capabilities"] == {"drop": ["ALL"]}
        assert pod["securityContext"]["runAsUser"] == user
        assert not pod["automountServiceAccountToken"] and not pod["enableServiceLinks"]


def test_kubernetes_pods_read_all_settings():
    for pod in pods():
        named = [
            source[key]["name"] for source in pod["containers"][0]["envFrom"] for key in source
        ]
        assert named == [manifest(kind)["metadata"]["name"] for kind in ("ConfigMap", "Secret")]


def test_kubernetes_grace_period_is_longer_than_a_call():
    pod = manifest("Deployment")["spec"]["template"]["spec"]
    longest = longest_call(config.read(kubernetes_settings()))
    assert pod["terminationGracePeriodSeconds"] > longest
    assert pod["containers"][0]["livenessProbe"]["terminationGracePeriodSeconds"] < 60


def test_kubernetes_probes_are_check():
    [container] = manifest("Deployment")["spec"]["template"]["spec"]["containers"]
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert container[probe]["exec"]["command"] == ["python", "listener.py", "check"]


def test_kubernetes_selectors_find_the_listener_and_not_the_install():
    labels = manifest("Deployment")["spec"]["template"]["metadata"]["labels"]
    for kind in ("Deployment", "PodDisruptionBudget"):
        assert manifest(kind)["spec"]["selector"]["matchLabels"] == labels
    assert manifest("Job")["spec"]["template"]["metadata"]["labels"] != labels


def test_keda_scales_the_listener_with_what_the_secret_has():
    scaled, authentication = manifest("ScaledObject")["spec"], manifest("TriggerAuthentication")
    [trigger] = scaled["triggers"]
    assert scaled["scaleTargetRef"]["name"] == manifest("Deployment")["metadata"]["name"]
    assert trigger["authenticationRef"]["name"] == authentication["metadata"]["name"]
    assert trigger["metadata"]["targetQueryValue"] == kubernetes_settings()["LISTENER_WORKERS"]
    secret = manifest("Secret")
    for reference in authentication["spec"]["secretTargetRef"]:
        assert reference["name"] == secret["metadata"]["name"]
        assert reference["key"] in secret["stringData"]


def test_keda_counts_the_calls_that_a_listener_could_make(database):
    query = manifest("ScaledObject")["spec"]["triggers"][0]["metadata"]["query"]

    def wanted() -> float:
        return database.rows(query)[0][0]

    assert wanted() == 0
    for state in ("img_gen", "img_gen", "yolo_detect", "yolo_detect", "planner"):
        database.add_job(state)
    assert wanted() == 5
    database.rows("UPDATE pipeline_stages SET held_until = 'infinity' WHERE stage = 'overlay'")
    assert wanted() == 4
    database.rows("UPDATE pipeline_stages SET max_running = 1 WHERE stage = 'planner'")
    assert wanted() == 3
    database.rows("UPDATE stage_calls SET due_at = 'infinity' WHERE stage = 'planner'")
    assert wanted() == 2
    leased = ("INSERT INTO stage_leases (job_id, call_id, attempt, stage, worker, started_at,"
              " leased_until, working) SELECT job_id, %s, 1, %s, 'w', now(),"
              " now() + interval '1 h', %s FROM jobs LIMIT 1")  # fmt: skip
    database.rows(leased, -1, "overlay", True), database.rows(leased, -2, "planner", True)
    assert wanted() == 2
    database.rows(leased, -3, "vlm_analyze", False)
    assert wanted() == 3
    database.rows("UPDATE pipeline_stages SET max_running = 2 WHERE stage = 'vlm_analyze'")
    database.rows(leased, -4, "vlm_analyze", True)
    assert wanted() == 1


# --- Grafana -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dashboard() -> dict:
    return json.loads(DASHBOARD.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def expressions(dashboard) -> list[str]:
    return [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]


def test_dashboard_shows_every_metric_and_no_other(expressions):
    named = set(re.findall(r"\bjob_state_listener_\w+", " ".join(expressions)))
    parts = [name for name, (kind, _) in FAMILIES.items() if kind == "histogram"]
    named = {re.sub(rf"^({'|'.join(parts)})_(bucket|sum|count)$", r"\1", name) for name in named}
    assert named == set(FAMILIES)


def test_dashboard_names_only_outcomes_that_there_are(expressions):
    matched = re.findall(r'outcome[=!]~?"([^"]+)"', " ".join(expressions))
    assert {outcome for words in matched for outcome in words.split("|")} <= set(OUTCOMES)


def test_dashboard_names_only_variables_that_it_has(dashboard):
    has = {variable["name"] for variable in dashboard["templating"]["list"]}
    named = set(re.findall(r"\$\{?(\w+)", json.dumps(dashboard)))
    assert named - {"__rate_interval", "__all"} == has


def test_dashboard_panels_have_a_place_of_their_own(dashboard):
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for one, other in combinations((panel["gridPos"] for panel in panels), 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        below = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or below, (one, other)


@pytest.mark.skipif(not shutil.which("promtool"), reason="promtool is not installed")
def test_prometheus_takes_every_expression(expressions, tmp_path):
    rules = [
        {"record": f"panel_{number}", "expr": expr.replace("$__rate_interval", "5m")}
        for number, expr in enumerate(expressions)
    ]
    file = tmp_path / "rules.yml"  # JSON is YAML
    file.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))
    command = ["promtool", "check", "rules", "--lint=none", file]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr

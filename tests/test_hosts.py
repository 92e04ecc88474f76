"""Connections that are left, and two of several hosts that are primary at once."""

import subprocess
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing

import commands
import pytest
from claims import connected
from conftest import Database, Server, embedded_server
from tcp_proxy import TcpProxy
from waiting import until

import db
import hosts
from demo.standby import Standby


@pytest.fixture
def limited(each_database, make_role):
    """An ordinary role that may look at everything of ours."""
    name = make_role(each_database)
    each_database.rows(f"GRANT SELECT ON ALL TABLES IN SCHEMA public TO {name}")
    each_database.role = {"DB_USER": name, "DB_PASSWORD": name}
    return each_database


def left(database) -> int:
    with connected(database, **database.role) as conn:
        return hosts.connections_left(conn)


def test_each_session_is_one_connection_less_for_an_ordinary_role(limited):
    limited.rows(f"ALTER DATABASE {limited.name} CONNECTION LIMIT 20")
    before = left(limited)
    with ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(closing(limited.connect()))
        # A session counts until its server process has ended, also that of left() before.
        until(lambda: left(limited) == before - 3, "three connections less")


@pytest.mark.parametrize("target", ["role", "database"])
def test_limit_of_a_role_or_a_database_counts(limited, target):
    name = {"role": f"ROLE {limited.role['DB_USER']}", "database": f"DATABASE {limited.name}"}
    limited.rows(f"ALTER {name[target]} CONNECTION LIMIT 4")
    assert left(limited) in (2, 3)


def test_verify_says_that_connections_run_out(limited):
    limited.rows(f"ALTER ROLE {limited.role['DB_USER']} CONNECTION LIMIT 2")
    done = commands.run_here(limited.environ | limited.role, "verify")
    assert "PROBLEM  1 more connection to the database left → end sessions" in done.out


# --- several hosts -------------------------------------------------------------------------


@pytest.fixture
def proxied(database):
    """A proxy, and settings with it as the first host and the server itself as the second."""
    with TcpProxy(database.environ) as proxy:
        addresses = f"127.0.0.1,{database.environ['DB_HOST']}"
        ports = f"{proxy.settings['DB_PORT']},{database.environ['DB_PORT']}"
        url = f"{database.dsn} host={addresses} port={ports}"
        yield proxy, database.settings(DATABASE_URL=url)


def test_host_that_takes_connections_and_drops_them_keeps_nobody_from_the_next(proxied, database):
    proxy, settings = proxied
    dropped, beats = proxy.hold_answer(db.BACKEND_PID), []
    with ThreadPoolExecutor(1) as pool:
        pool.submit(lambda: (dropped.wait(), dropped.cut()))
        with closing(db.connect(settings, trying=lambda: beats.append("a host"))) as conn:
            assert conn.info.port == int(database.environ["DB_PORT"])
    assert len(beats) == 2  # each may take as long as a heartbeat allows for one


def test_host_of_a_lost_connection_is_tried_last(proxied):
    _, settings = proxied
    ports = [int(target["port"]) for target in db.targets(settings)]
    for last, found in ((None, 0), (0, 1), (1, 0)):
        with closing(db.connect(settings, last=last)) as conn:
            assert conn.target == found and conn.info.port == ports[found]


def test_workers_ask_the_host_that_the_listener_works_on(proxied, database):
    proxy, settings = proxied
    assert db.query(settings, "SELECT 1 AS one", first=1) == [(1,)]
    assert proxy.links == []
    with closing(db.connect(settings, last=0)) as conn:
        assert conn.target == 1


def test_url_changes_neither_the_encoding_nor_how_long_a_host_is_tried(database):
    for given, seconds in {"40": 5, "0": 5, "2": 2, "soon": 5}.items():
        url = f"{database.dsn} client_encoding=latin1 connect_timeout={given} keepalives_idle=9"
        [target] = db.targets(database.settings(DATABASE_URL=url))
        options = db.options(target)
        assert (options["connect_timeout"], options["keepalives_idle"]) == (seconds, "9")
    with closing(db.connect_to(options)) as conn:
        assert conn.encoding == "UTF8"


def test_standby_is_refused_whatever_the_url_says(database):
    url = f"{database.dsn} target_session_attrs=any options='-c default_transaction_read_only=on'"
    settings = database.settings(DATABASE_URL=url)
    with pytest.raises(db.ConnectionLost, match="session is read-only"):
        db.connect(settings)
    assert hosts.timelines(settings) == {}


# --- two primaries -------------------------------------------------------------------------


@pytest.fixture
def pair():
    """A primary and its standby, and an environ that has both hosts."""
    with embedded_server() as embedded:
        server = Server(embedded.settings(), embedded)
        with closing(Database(server, server.create_installed())) as primary, \
             Standby(embedded) as following:  # fmt: skip
            standby = Database(Server(following.settings(), following), primary.name)
            both = f"{primary.environ['DB_HOST']},{standby.environ['DB_HOST']}"
            primary.both = primary.environ | {"DB_HOST": both}
            yield primary, standby
            standby.conn.close()
            following.stop("immediate")


def test_old_primary_that_still_answers_is_named(pair, monkeypatch, tmp_path):
    primary, standby = pair
    settings = primary.settings(DB_HOST=primary.both["DB_HOST"])
    assert hosts.split_brain(hosts.timelines(settings)) is None
    assert "two primaries" not in commands.run_here(primary.both, "verify").out

    standby.rows("SELECT pg_promote()")
    said = (f"two primaries: {standby.environ['DB_HOST']}:{standby.environ['DB_PORT']} is on"
            f" timeline 2, but {primary.environ['DB_HOST']}:{primary.environ['DB_PORT']} on 1"
            " takes writes as well")  # fmt: skip
    assert hosts.split_brain(hosts.timelines(settings)) == said
    assert f"PROBLEM  {said} → stop the old one" in commands.run_here(primary.both, "verify").out

    for name, value in primary.both.items():
        monkeypatch.setenv(name, value)
    # The look is a process, in which no module of the working directory may take the place of ours.
    (tmp_path / "config.py").write_text("raise SystemExit(1)")
    (tmp_path / ".env").touch()
    monkeypatch.chdir(tmp_path)
    watch = hosts.Watch(settings)
    assert watch.look() is None and watch.process is None  # it is too early
    with closing(db.connect(primary.settings())) as conn:
        watch.latest = {hosts.place(conn).system: 1}  # it was there before the other one was
        watch.check_new_connection(conn, str)
    watch.look_at = 0.0
    assert until(watch.look, "what it finds") == said
    with pytest.raises(hosts.OldPrimary, match="is an old primary: it is on timeline 1"):
        watch.require_latest()
    watch.look_at = 0.0
    until(lambda: (watch.look(), watch.process)[1] is None, "another look")
    assert watch.look() is None  # the same is said once
    watch.close()


def test_one_host_is_never_looked_at(database):
    watch = hosts.Watch(database.settings())
    assert watch.look() is None and watch.process is None
    assert not hosts.is_several(database.settings())


def test_host_that_is_away_is_no_primary(database):
    settings = database.settings(DB_HOST=f"{database.environ['DB_HOST']},127.0.0.3")
    found = hosts.timelines(settings)
    assert len(found) == 1 and hosts.split_brain(found) is None


def test_look_that_fails_or_hangs_says_nothing(database, monkeypatch):
    watch = hosts.Watch(database.settings())
    for program in ("/bin/false", "/no/such/program"):
        monkeypatch.setattr(hosts.sys, "executable", program)
        watch.look_at = 0.0
        until(lambda: (watch.look(), watch.process)[1] is None, "its end")
    monkeypatch.setattr(hosts, "TIME_LIMIT", -1.0)
    watch.process = subprocess.Popen(["sleep", "600"], stdout=subprocess.PIPE, text=True)
    until(lambda: (watch.look(), watch.process)[1] is None, "its end")
    assert watch.said == ""


@pytest.mark.slow
def test_idle_listener_leaves_a_server_that_is_frozen_for_another(database, api, listener):
    with ExitStack() as stack:
        proxy = stack.enter_context(TcpProxy(database.environ))
        frozen = proxy.hold_answer(hosts.PING)
        ports = proxy.settings["DB_PORT"], database.environ["DB_PORT"]
        both = ",".join(f"127.0.0.1:{port}" for port in ports)
        url = f"postgresql://{database.environ['DB_USER']}@{both}/{database.name}"
        process = listener(database, api=api, DATABASE_URL=url)
        frozen.wait()
        process.wait_for_line("the database did not answer within 4 s")
        # Until then, and for two hosts that do not take a connection.
        assert hosts.PING_EVERY + hosts.PING_DEADLINE + 2 * db.CONNECTION["connect_timeout"] <= 20
        stack.close()  # nor does it take new connections
        job = database.add_job("overlay", "done")
        database.wait_for("SELECT status = 'done' FROM jobs WHERE job_id = %s", job)

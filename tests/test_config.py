"""Settings: allowed values, the line about a bad one, and that no secret is in that line."""

from urllib.parse import unquote

import certifi
import pytest

import config
from config import SettingsError

DEFAULTS = {
    "ENABLE_JOB_STATE_LISTENER": True,
    "LISTENER_ENABLED": True,
    "PIPELINE_MODULE": "stages",
    "WARNINGS": [],
    "READ_FROM": {},
    "JOB_STATE_LISTENER_RECONNECT_DELAY": 5.0,
    "DB_HOST": None,
    "DB_PORT": 5432,
    "DB_NAME": None,
    "DB_USER": None,
    "DB_PASSWORD": None,
    "DATABASE_URL": None,
    "STAGE_API_URL": "http://localhost:8011",
    "STAGE_API_CA_BUNDLE": None,
    "STAGE_TIMEOUT": 600.0,
    "LEASE_MARGIN": 30.0,
    "MAX_ATTEMPTS": 5,
    "RETRY_DELAY": 5.0,
    "LISTENER_WORKERS": 4,
    "SWEEP_INTERVAL": 30.0,
    "HISTORY_DAYS": 30.0,
    "LOG_LEVEL": "INFO",
    "LOG_FORMAT": "text",
    "POLL_INTERVAL": 1.0,
    "STAGE_API_TOKEN": None,
    "STAGE_API_SECRET": None,
    "STAGE_API_URLS": {},
    "ALERT_COMMAND": None,
    "ALERT_AFTER": 600.0,
    "OPS_TOKEN": None,
}
URL = "postgresql://app:secret@db.example:6432/feedlyai"


def refusal(name: str, value: str) -> str:
    with pytest.raises(SettingsError) as refused:
        config.read({name: value})
    return str(refused.value)


def test_defaults_are_those_of_the_guide_and_the_readme():
    values = vars(config.read({}))
    assert values.pop("HEARTBEAT_DIR").endswith("/job-state-listener")
    assert values == DEFAULTS


@pytest.mark.parametrize("name", config.SETTINGS)
@pytest.mark.parametrize("value", ["", "  ", "\t"])
def test_empty_means_default(name, value):
    assert vars(config.read({name: value})) == vars(config.read({}))


GOOD = {
    "ENABLE_JOB_STATE_LISTENER": [
        ("true", True), ("TRUE", True), ("1", True), ("yes", True), ("on", True),
        ("false", False), ("False", False), ("0", False), ("no", False), ("off", False),
    ],
    "JOB_STATE_LISTENER_RECONNECT_DELAY": [("5", 5), ("0.5", 0.5), (" 7 ", 7), ("3600", 3600)],
    "DB_HOST": [("host.docker.internal", "host.docker.internal"), ("::1", "::1"),
                ("/var/run/postgresql", "/var/run/postgresql"), ("a,b", "a,b")],
    "DB_PORT": [("1", 1), ("65535", 65535)],
    "LISTENER_ENABLED": [("true", True), ("off", False)],
    "PIPELINE_MODULE": [("stages", "stages"), ("a.b_2.c", "a.b_2.c"), ("단계", "단계")],
    "DB_PASSWORD": [("p@ss #'\"%40 💥", "p@ss #'\"%40 💥"), (" x ", " x "), ("x\r\n", "x")],
    "DATABASE_URL": [(URL, URL), ("host=db dbname=x", "host=db dbname=x"),
                     ("postgres://db/x", "postgres://db/x")],
    "STAGE_API_URL": [("http://api:8011/", "http://api:8011"), ("https://api", "https://api"),
                      ("http://u:p%40ss@[::1]:80/base", "http://u:p%40ss@[::1]:80/base")],
    "STAGE_API_CA_BUNDLE": [(certifi.where(), certifi.where())],
    "STAGE_TIMEOUT": [("0.1", 0.1), ("86400", 86400)],
    "MAX_ATTEMPTS": [("1", 1), ("1000000", 1_000_000)],
    "LISTENER_WORKERS": [("256", 256)],
    "HISTORY_DAYS": [("0.5", 0.5)],
    "LOG_LEVEL": [("debug", "DEBUG"), ("Warning", "WARNING")],
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "given", "value"),
    [(name, given, value) for name, pairs in GOOD.items() for given, value in pairs],
)
def test_good_value_is_taken(name, given, value):
    assert getattr(config.read({name: given}), name) == value


SECONDS = ["0", "-1", "soon", "5s", "nan", "inf", "1e9", "5  # 초", "5 5", "0,5"]
WHOLE = ["0", "-1", "1.5", "1e3", "many", "nan", "9" * 5000, "0x10", "5 # five"]
BAD = {
    "ENABLE_JOB_STATE_LISTENER": ["maybe", "2", "true  # 활성화", "참", "tru"],
    "LISTENER_ENABLED": ["maybe", "tru"],
    "PIPELINE_MODULE": ["stages.py", "a/b", "a-b", ".a", "a..b", "a.", "1a",
                        "a b", "import", "a,b"],
    "JOB_STATE_LISTENER_RECONNECT_DELAY": SECONDS,
    "STAGE_TIMEOUT": SECONDS,
    "LEASE_MARGIN": SECONDS,
    "RETRY_DELAY": SECONDS,
    "SWEEP_INTERVAL": SECONDS,
    "HISTORY_DAYS": ["0", "-1", "ever", "inf"],
    "DB_PORT": [*WHOLE, "65536", "5432,5433x"],
    "MAX_ATTEMPTS": [*WHOLE, "1000001"],
    "LISTENER_WORKERS": [*WHOLE, "257"],
    "DB_HOST": ["host.docker.internal  # 또는 실제 DB 호스트", "a b", "db/x", "db#1", "a\nb",
                "a\0b", "db\udcff"],
    "DB_NAME": ["a\0b", "\udcff"],
    "DB_USER": ["a\0b", "\udcff"],
    "HEARTBEAT_DIR": ["/tmp/a\0b", "/tmp/\udcff"],
    "STAGE_API_URL": [
        "localhost:8011", "ftp://api", "http://", "http:///x", "http://api:99999", "http://a b",
        "http://api:x", "http://api?x=1", "http://api#x", "http://[::1", "http://api  # 주석",
        "http://api\nHost: x", "http://*", "http://.", "http://a\x01b", "http://é", "http://a%zz",
        "http://api:0", "http://api/\0",
    ],
    "STAGE_API_CA_BUNDLE": ["/no/such/file", "/", "/dev/zero", __file__, "ca.pem  # 인증서"],
    "DATABASE_URL": ["db.example", "mysql://db/x", "postgresql://db:5432/x?nonsense=1", "x=y"],
    "LOG_LEVEL": ["LOUD", "20", "INFO DEBUG", "INFO # 기본"],
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in BAD.items() for value in values]
)
def test_bad_value_is_one_line_with_name_value_and_what_is_allowed(name, value):
    message = refusal(name, value)
    shown = repr(value)[:80]
    if name == "DATABASE_URL" or value in ("http://api:x", "http://[::1"):  # may be a password
        shown = "***"
    assert message.startswith(f"{name}={shown} cannot be used: allowed is ")
    assert len(message.splitlines()) == 1 and len(message) < 300


NASTY = [
    "\n", "a\r\nb", "\x1b[2J", "\x00", "💥", "\u202eabc", "\u2028", "' OR 1=1 --", "$(reboot)",
    "%s%n%(x)s", "{0.__class__}", "../../etc", "-", "--", "=", "#", "//", "http://", "@", ":", "[",
    "a" * 100_000, "１２", "٣", "1_0", "1e309", "-0", "+5", "0b1", "NaN", "None", "\\", '"',
    "\udcff",
]  # fmt: skip


@pytest.mark.parametrize("name", config.SETTINGS)
def test_any_value_is_taken_or_refused_under_its_name(name):
    for value in NASTY:
        try:
            config.read({name: value})
        except SettingsError as refused:
            assert str(refused).startswith(f"{name}=")
            assert len(str(refused).splitlines()) == 1 and len(str(refused)) < 300
            assert str(refused).isprintable()


QUOTED = ["DB_HOST", "DB_PORT", "DB_NAME", "STAGE_API_URL", "STAGE_API_TOKEN", "DATABASE_URL",
          "LOG_LEVEL", "HEARTBEAT_DIR", "PIPELINE_MODULE"]  # fmt: skip


@pytest.mark.parametrize("quote", ['"', "'"])
@pytest.mark.parametrize("name", QUOTED)
def test_quotes_that_docker_keeps_are_named(name, quote):
    assert "without its quotes, which `docker --env-file` keeps" in refusal(
        name, f"{quote}x{quote}"
    )


def test_quotes_may_be_part_of_a_password_and_of_a_command():
    values = config.read({"DB_PASSWORD": "'x'", "ALERT_COMMAND": '"/a b/c"'})
    assert (values.DB_PASSWORD, values.ALERT_COMMAND) == ("'x'", ["/a b/c"])


# --- what another setting decides ----------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("DB_PORT", "tcp://10.0.0.1:5432"),
        ("DB_PORT", "x"),
        ("DB_HOST", "db  # 또는"),
        ("DB_USER", "\0"),
    ],
)
def test_what_database_url_decides_is_not_refused(name, value):
    values = config.read({"DATABASE_URL": URL, name: value})
    assert (values.DATABASE_URL, values.WARNINGS) == (URL, [])
    assert refusal(name, value) if "://" not in value else True


@pytest.mark.parametrize(
    "value", ["tcp://10.0.0.1:5432", "udp://[::1]:5432", "tcp://u:hunter2@h:1"]
)
def test_port_that_kubernetes_sets_is_passed_over_with_a_line(value):
    values = config.read({"DB_HOST": "db", "DB_PORT": value})
    [said] = values.WARNINGS
    assert values.DB_PORT == 5432
    assert said.startswith("DB_PORT='") and "Kubernetes" in said and "hunter2" not in said


@pytest.mark.parametrize(
    ("ours", "shared", "enabled"),
    [("true", "false", True), ("false", "true", False), ("", "false", False), ("", "true", True),
     ("", "", True), ("true", "nonsense", True)],
)  # fmt: skip
def test_listener_enabled_alone_counts_where_it_is_set(ours, shared, enabled):
    given = {"LISTENER_ENABLED": ours, "ENABLE_JOB_STATE_LISTENER": shared}
    assert config.read(given).LISTENER_ENABLED is enabled


# --- the database --------------------------------------------------------------------------


@pytest.mark.parametrize("driver", ["+asyncpg", "+psycopg2", "+psycopg", ""])
@pytest.mark.parametrize("scheme", ["postgresql", "postgres"])
def test_spelling_of_sqlalchemy_is_understood(scheme, driver):
    read = config.read({"DATABASE_URL": f"{scheme}{driver}://app:secret@db:6432/x"}).DATABASE_URL
    assert read == f"{scheme}://app:secret@db:6432/x"


@pytest.mark.parametrize("environ", [{"DB_HOST": "db"}, {"DATABASE_URL": URL}])
def test_either_of_two_settings_names_the_database(environ):
    config.require_database(config.read(environ))


def test_no_database_is_one_line_that_names_the_ways_out():
    with pytest.raises(SettingsError) as refused:
        config.require_database(config.read({"DB_NAME": "x", "DB_USER": "y"}))
    message = str(refused.value)
    assert len(message.splitlines()) == 1
    for word in ("DB_HOST", "DATABASE_URL", ".env.example", "make demo"):
        assert word in message


# --- secrets -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("DATABASE_URL", "postgresql://app:hunter2%zz@db/x"),
        ("DATABASE_URL", "postgresql://app:hunter2@db/x?nonsense=1"),
        ("DATABASE_URL", "mysql://app:hunter2@db/x"),
        ("DATABASE_URL", "postgresql://app:hunter2"),
        ("DATABASE_URL", "hunter2"),
        ("STAGE_API_URL", "http://user:hunter2@api:99999"),
        ("STAGE_API_URL", "http://user:hunter2 x@api"),
        ("STAGE_API_URL", "http://user:hunter2#x@api"),
        ("STAGE_API_URL", "http://user:hunter2/x@api"),
        ("STAGE_API_URL", "user:hunter2@api"),
        ("STAGE_API_URL", "http://user:hunter2\\@api"),
        ("STAGE_API_URL", "http://user:hunter2"),
        ("STAGE_API_URL", "http://user:2hunter2/x"),
        ("DB_PASSWORD", "hunter2\0"),
        ("DB_PASSWORD", "hunter2\udcff"),
        ("DB_HOST", "postgresql://app:hunter2@db/x"),
        ("DB_HOST", "app:hunter2@db"),
    ],
)
def test_value_that_holds_a_password_is_refused_without_it(name, value):
    message = refusal(name, value)
    assert message.startswith(f"{name}=") and "hunter2" not in message


@pytest.mark.parametrize("password", ["hun@ter2", "hun/ter2", "hun@ter/2", "hun/ter@2", "9/ter2"])
def test_password_that_is_not_percent_encoded_is_refused_without_it(password):
    # It would end up in the host or the name of the database, and so in every error.
    message = refusal("DATABASE_URL", f"postgresql://app:{password}@db.example/x")
    assert "%40" in message and "hun" not in message and "ter" not in message


REDACTED = {
    "hunter22": "hunter22",
    "percent": "p%40ss%2Fword%25",
    "korean": "%EB%B9%84%EB%B0%80%EB%B2%88%ED%98%B8",
    "punctuation": "a.b*c+d$e(f^",
    "colon": "with:colon",
}


@pytest.mark.parametrize("written", REDACTED.values(), ids=REDACTED)
@pytest.mark.parametrize("name", ["DATABASE_URL", "STAGE_API_URL", "DB_PASSWORD"])
def test_secret_is_replaced_however_it_is_written(name, written):
    plain = unquote(written)
    scheme = "postgresql" if name == "DATABASE_URL" else "http"
    url = f"{scheme}://user:{written}@host/x"
    redact = config.redactor(config.read({name: plain if name == "DB_PASSWORD" else url}))
    quoted = plain if name == "DB_PASSWORD" else written  # as libpq's and our own errors quote it
    said = redact(f"no {plain}, not in {url}, not as password={plain} nor '{quoted}' here")
    assert plain not in said and quoted not in said
    assert said.startswith("no ***, not in ") and said.endswith(" nor '***' here")


def test_password_of_another_url_is_replaced_too():
    redact = config.redactor(config.read({}))
    assert redact("at redis://:other@cache/0 too") == "at redis://:***@cache/0 too"
    assert redact("host=x password=other user=y") == "host=x password=*** user=y"
    assert redact("sslpassword = other PGPASSWORD=other") == "sslpassword = *** PGPASSWORD=***"


def test_short_password_does_not_eat_other_words():
    redact = config.redactor(config.read({"DB_PASSWORD": "job"}))
    assert redact("job=1 password=job") == "job=1 password=***"


def test_text_without_secrets_is_left_as_it_is():
    redact = config.redactor(config.read({"DATABASE_URL": URL}))
    text = "job=1 stage=x http://api:8011/path a@b.example 12:34:56"
    assert redact(text) == text

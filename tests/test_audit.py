"""`audit`: real runs break no promise; each broken one, forged into the history, is found."""

import json


def found(done) -> dict[str, int]:
    """The findings of `audit --json`, by kind; its exit code says the same."""
    said = json.loads(done.out)
    kinds = {kind: count for kind, count in said["broken"].items() if count}
    assert done.code == bool(kinds), done
    return kinds


def test_run_of_the_demo_breaks_no_promise(database, api, listener, run_command):
    database.add_job()
    listener(database, "run", "--once", api=api).wait()
    done = run_command(database, "audit")
    print(done.out)
    assert found(run_command(database, "audit", "--json")) == {}

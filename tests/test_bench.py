"""The benchmark's arithmetic and its report; measuring itself is left to `make bench`."""

import runpy

import pytest

from bench import pipeline
from bench.failover import longest_gap
from bench.peers.base import Queue
from bench.peers.ours import Ours
from bench.peers.references import Floor
from bench.report import Table, details, grid, markdown, spread, summary_rows
from bench.stage_process import Record
from bench.stats import Metric, percentile
from bench.workloads.asynchronous import most_at_once
from bench.workloads.throughput import Slow
from demo.stage_api import STAGES
from pipeline import check

RATE = Metric("calls/s", "", better="higher", digits=0)
HOP = Metric("p50", "ms")


def table(metric: Metric, **values: list[float]) -> Table:
    """Of peers by name; `lost_…` is a peer that lost a call."""
    made = Table("burst", "a title", "1 worker", (metric,))
    kinds = {"ours": "ours", "floor": "floor"}
    for name, numbers in values.items():
        for number in numbers:
            lost = {"lost": 1.0} if name.startswith("lost") else {}
            made.add(name, kinds.get(name, "peer"), {metric.name: number} | lost)
    return made


def test_peers_are_measured_on_the_pipeline_of_the_demo():
    paths = {path: (stage, step) for path, (stage, step) in STAGES.items()}
    ours = zip(pipeline.ROUTES.items(), pipeline.STAGES, strict=True)
    assert {path: (stage, state[0]) for (state, path), stage in ours} == paths


def test_percentile_is_the_nearest_rank():
    values = [float(n) for n in range(100, 0, -1)]
    assert [percentile(values, p) for p in (0, 1, 50, 95, 99, 100)] == [1, 1, 50, 95, 99, 100]
    assert percentile([3.0], 99) == 3


def test_pause_is_the_longest_gap_that_ends_after_the_fault():
    times = [9.0, 0.0, 5.0, 6.0, 8.0]
    assert longest_gap(times, since=5.5) == (2.0, 8.0)
    assert longest_gap(times, since=0.0) == (5.0, 5.0)


def test_spread_shows_the_range_only_where_there_is_one():
    assert spread([1234.5], 1) == "1,234.5"
    assert spread([3.0, 1.0, 2.0], 0) == "2 (1–3)"


def test_best_depends_on_what_is_better():
    assert table(HOP, one=[1.0], two=[2.0]).best_peer(HOP) == "one"
    assert table(RATE, one=[1.0], two=[2.0]).best_peer(RATE) == "two"
    assert table(RATE).best_peer(RATE) is None


def test_summary_gives_ours_as_ratio_to_floor_and_best_peer():
    made = table(RATE, ours=[90.0, 100.0, 110.0], floor=[200.0], slow=[40.0], quick=[80.0])
    assert summary_rows(made) == [
        ["burst (1 worker): calls/s ↑", "100", "200", "80 quick", "0.50", "1.25"]
    ]


def test_peer_that_lost_a_call_is_shown_and_not_compared_with():
    made = table(RATE, ours=[100.0], lost_some=[900.0], other=[50.0])
    assert summary_rows(made)[0][3:] == ["50 other", "–", "2.00"]
    assert "| lost_some (lost calls) | 900     |" in details(made)


def test_floor_is_not_the_best_peer():
    made = table(HOP, ours=[3.0], floor=[1.0], other=[2.0])
    assert summary_rows(made)[0][3:] == ["2.00 other", "3.00", "1.50"]


def test_ours_is_one_listener_with_one_connection_whatever_is_in_flight():
    shape = Ours().shape(16)
    assert len(Ours().commands(shape)) == Ours().connections(shape) == 1


def test_without_ours_there_is_nothing_to_compare():
    assert summary_rows(table(HOP, other=[2.0])) == []


def test_peer_that_failed_is_named_with_the_reason():
    made = table(HOP, ours=[3.0])
    made.add("other", "peer", {})
    made.failures["other"] = "did not\nstart"
    assert "other: did not start" in details(made)
    assert summary_rows(made)[0][3] == "–"


def test_grid_is_a_markdown_table():
    assert grid(["", "a"], [["row", "1"]]) == "|     | a |\n|-----|---|\n| row | 1 |"


def test_report_has_machine_tables_and_notes():
    made, facts = table(HOP, ours=[3.0, 1.0]), {"Machine": {"cores": "2"}}
    text = markdown([made], facts, ["a note"])
    assert all(part in text for part in ("- cores: 2", "## burst: a title — 1 worker", "- a note"))


def test_calls_at_once_are_those_that_arrived_and_are_not_done():
    arrived = [(0.0, "a", 0), (1.0, "b", 0), (2.5, "c", 0), (6.0, "a", 1)]
    done = [(2.0, "a", 0), (5.0, "b", 0), (5.0, "c", 0), (7.0, "a", 1)]
    assert most_at_once(Record(arrived, done)) == 2


def test_longest_stages_are_for_ours_alone():
    measured = {
        variant: [peer.kind for peer in (Ours(), Queue(), Floor()) if Slow().applies(peer, variant)]
        for variant in Slow.variants
    }
    assert measured["64 in flight, 1 s"] == ["ours", "peer"]
    assert measured["200 in flight, 1 s"] == measured["64 in flight, 10 s"] == ["ours"]


@pytest.mark.parametrize("limit", ["none", "max_running", "pool", "fair", "asynchronous"])
def test_pipeline_has_the_limit_that_is_measured(limit, monkeypatch):
    monkeypatch.setenv("BENCH_LIMIT", limit)
    stages = runpy.run_module("bench.limited")["PIPELINE"]
    check(stages)
    declared = [vars(stage.limits).items() for stage in stages.values()]
    assert [{name for name, value in one if value} for one in declared] == 5 * [{limit} - {"none"}]

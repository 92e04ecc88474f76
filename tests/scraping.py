"""Reads the output of `metrics` with Prometheus' own parser."""

import re

from prometheus_client.parser import text_string_to_metric_families
from test_ops_mistakes import CONTROL

import history
from ops.metrics import OUTCOMES
from ops.metrics import scrape as read_metrics

PREFIX = "job_state_listener_"
STAGES = ["vlm_analyze", "yolo_detect", "planner", "overlay", "vlm_judge"]
# The limits without which some metrics are not written.
EVERYTHING = """
UPDATE pipeline_stages SET max_running = 3 WHERE stage = 'planner';
INSERT INTO stage_limits (name, stages, max_running) VALUES ('gpu', '{planner}', 1);
INSERT INTO stage_limits (name, stages, seconds, per_tenant) VALUES ('planner', '{planner}', 1, 2);
UPDATE pipeline_tables SET run_after_column = 'run_after';
"""


class Scraped(dict):
    """Samples by name and labels."""

    def __init__(self, text: str):
        assert text.endswith("\n") and not CONTROL.search(text), text
        self.families = list(text_string_to_metric_families(text))
        for sample in (sample for family in self.families for sample in family.samples):
            key = (sample.name, *sorted(sample.labels.items()))
            assert key not in self, f"{key} is there twice"
            self[key] = sample.value

    def of(self, name: str, **labels: str) -> float:
        return self[(PREFIX + name, *sorted(labels.items()))]

    def by_stage(self, name: str) -> dict[str, float]:
        return {stage: self.of(name, stage=stage) for stage in STAGES}

    def counters(self) -> dict[tuple, float]:
        found = {key: n for key, n in self.items() if re.search("_total|_duration_", key[0])}
        found.pop((PREFIX + "scrape_duration_seconds",))
        assert len(found) == len(STAGES) * (len(OUTCOMES) + len(history.BUCKETS) + 3)
        return found


def scrape(database, **settings) -> Scraped:
    """The output of the command, parsed; made in this process."""
    page, failure = read_metrics(database.settings(**settings))
    assert failure is None
    return Scraped(page.text())

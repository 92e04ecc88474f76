"""PIPELINE of the five stages, each with the limit that BENCH_LIMIT names. The limits are never
reached: the workload measures the cost of counting.
"""

import os

from bench.pipeline import ROUTES, STAGES, stage
from pipeline import Pool, limits

MANY = 1000
LIMITS = {
    "none": limits(),
    "max_running": limits(max_running=MANY),
    "pool": limits(pool=Pool("gpu", size=MANY)),
    "fair": limits(fair=True),
    "asynchronous": limits(asynchronous=True),
}
limit = LIMITS[os.environ["BENCH_LIMIT"]]

PIPELINE = {
    state: limit(stage(name, path))
    for name, (state, path) in zip(STAGES, ROUTES.items(), strict=True)
}

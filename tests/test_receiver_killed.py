"""receiver/ together with the listener: stage processes die at every moment of a request, and the
effect of each job is there once.
"""

import pytest

from chaos import once, once_api
from chaos.once_pipeline import STAGES
from receiver import Receiver

pytestmark = pytest.mark.slow

MOMENTS = 13  # statements and commits of a request
ALL_DONE = "SELECT count(*) = %s FROM jobs WHERE current_step <> 'new' AND status = 'done'"


def test_stage_killed_at_any_moment_leaves_one_effect_of_each_job(
    database, listener, run_command, tmp_path
):
    run_command(database, "install", PIPELINE_MODULE="chaos.once_pipeline")
    Receiver(database.connect).install()
    database.rows(once_api.TABLES)
    fates = [(stage, moment) for stage in STAGES for moment in range(1, MOMENTS + 1)]
    for stage, moment in fates:
        job = database.add_job("new", stage)
        database.rows(once.PLAN, job, moment, "kill")
    with once.StageProcess(database.dsn, tmp_path / "stages.log", children=4) as api:
        process = listener(database, "run", "--workers", "4", api=api, **once.SETTINGS)
        database.wait_for(ALL_DONE, len(fates))
        assert process.stop() == 0
    assert database.rows(once.WRONG) == []
    assert database.value("SELECT count(*) FROM happened") == len(fates)

"""The SQL of the guide's first version, which its users have run."""

from pathlib import Path

DATABASE = (Path(__file__).parent / "guide_database.sql").read_text(encoding="utf-8")
# The function and trigger of jobs alone.
JOBS_TRIGGER = DATABASE[
    DATABASE.index("CREATE OR REPLACE FUNCTION notify_job_state_change") : DATABASE.index(
        "CREATE OR REPLACE FUNCTION notify_job_variant"
    )
]

"""What a failover that loses commits leaves to be judged.

The database and the stages have different records of a job that was worked on meanwhile. Of such a
job and its family the checker asks only that nothing is owed at the end; it judges all others.
"""

from chaos.history import History

# The result of a call that was answered less than so many seconds before the loss, or the work that
# follows a 202, may have been committed during it.
BEFORE = 10.0
# Not their leases, which count for limits and turns.
OF_JOBS = ("moves", "debts", "joins", "gone", "claims", "rows", "effects", "posts")


def jobs_with_lost_commits(history: History) -> set[str]:
    """The jobs, and variants, of which the database may have lost something."""
    spans = [(began - BEFORE, ended + history.timeout)
             for fault in history.faults for began, ended in fault.lost]  # fmt: skip
    touched = {
        post.job
        for post in history.posts
        if post.job
        and any(post.finished >= began and post.arrived <= ended for began, ended in spans)
    }
    # A request may not have arrived whose claim is lost.
    touched |= {
        row.job
        for row in history.rows
        if any(row.finished >= began and row.started <= ended for began, ended in spans)
    }
    parent_of = {move.job: move.parent for move in history.moves if move.parent}
    families = touched | {parent_of[job] for job in touched if job in parent_of}
    return families | {variant for variant, parent in parent_of.items() if parent in families}


def judged(history: History) -> History:
    """The history without these jobs."""
    lost = jobs_with_lost_commits(history)
    if not lost:
        return history
    kept = {
        name: [one for one in getattr(history, name) if one.job not in lost] for name in OF_JOBS
    }
    bugs = [
        bug
        for bug in history.bugs
        if not bug.startswith("audit:") or not any(job in bug for job in lost)
    ]
    return History(**(vars(history) | kept | {"bugs": bugs}))

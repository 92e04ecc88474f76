"""`make chaos` and `make soak`: python -m chaos run, check or soak."""

import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

import click

from chaos import history
from chaos.checker import check
from chaos.once import Once
from chaos.plot import svg
from chaos.report import report, soak_report
from chaos.run import Run
from chaos.soak import WORKERS, Soak


@click.group(context_settings={"max_content_width": 100})
def cli() -> None:
    """Break the listener on purpose, and judge from a record what it did."""


@cli.command()
@click.option("--seed", type=int, help="Which plan; default: a new one, which is printed.")
# A run is shorter than clock.STEP.
@click.option("--minutes", default=3.0, show_default=True, type=click.FloatRange(0.1, 23 * 60))
@click.option("--record", type=click.Path(dir_okay=False, writable=True, path_type=Path),
              help="Write the history there in any case.")  # fmt: skip
def run(seed: int | None, minutes: float, record: Path | None) -> None:
    """Break listeners, database, network and stages at random; exit 1 if a promise broke.

    The same seed gives the same plan of faults, jobs and answers. Their timing depends on the
    machine, so a second run is similar and not identical.
    """
    seed = random.SystemRandom().randrange(10**6) if seed is None else seed
    directory = Path(tempfile.mkdtemp(prefix="chaos-"))
    click.echo(f"seed {seed}, {minutes:g} minutes")
    began = time.monotonic()
    try:
        with Run(seed, 60 * minutes, directory) as started:
            happened = started.happen(click.echo)
    except BaseException:
        click.echo(f"the listeners' logs: {directory}", err=True)
        raise
    if record:
        happened.write(record)
    kept = judge(happened)
    click.echo(f"took {time.monotonic() - began:.0f} s")
    if kept:
        shutil.rmtree(directory)
        return
    happened.write(directory / "history.json")
    click.echo(f"history and logs: {directory}")
    click.echo(f"check it again: python -m chaos check {directory / 'history.json'}")
    click.echo(f"run it again: make chaos SEED={seed} MINUTES={minutes:g}")
    sys.exit(1)


@cli.command("check")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
def check_file(file: Path) -> None:
    """Judge the history in FILE, which a run wrote; exit 1 if a promise broke."""
    try:
        happened = history.read(file)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    sys.exit(0 if judge(happened) else 1)


@cli.command()
@click.option("--seed", type=int, help="What happens to which job; default: a new one, printed.")
@click.option("--jobs", default=300, show_default=True, type=click.IntRange(1, 100_000))
def once(seed: int | None, jobs: int) -> None:
    """Count the effects of stages built on receiver/ while everything is killed and repeated.

    Exit 1 if a job has none or two.
    """
    seed = random.SystemRandom().randrange(10**6) if seed is None else seed
    directory = Path(tempfile.mkdtemp(prefix="chaos-once-"))
    click.echo(f"seed {seed}, {jobs} jobs")
    began = time.monotonic()
    with Once(seed, jobs, directory) as started:
        wrong = started.happen(click.echo)
        for line in started.report():
            click.echo(line)
    lost = [row for row in wrong if row[3] == 0]
    for job, *state, effects in wrong[:20]:
        click.echo(f"✗ job {job} is at ({', '.join(state)}) with {effects} effects")
    click.echo(f"{len(lost)} effects lost, {sum(row[3] > 1 for row in wrong)} doubled")
    click.echo(f"took {time.monotonic() - began:.0f} s")
    if wrong:
        click.echo(f"logs: {directory}; run it again: python -m chaos once --seed {seed}")
        sys.exit(1)
    shutil.rmtree(directory)


@cli.command()
@click.option("--minutes", default=30.0, show_default=True, type=click.FloatRange(0.5, 24 * 60))
@click.option("--rate", default=3.0, show_default=True, type=click.FloatRange(0.1, 50),
              help="Jobs that arrive in a second; each is called five times.")  # fmt: skip
@click.option("--plot", default="soak.svg", show_default=True, help="Write the picture there.",
              type=click.Path(dir_okay=False, writable=True, path_type=Path))  # fmt: skip
def soak(minutes: float, rate: float, plot: Path) -> None:
    """Run a steady load and measure; exit 1 if something grows that should not."""
    click.echo(f"{minutes:g} minutes, {WORKERS} workers, {rate:g} jobs a second")
    with tempfile.TemporaryDirectory(prefix="soak-") as directory:
        with Soak(rate, Path(directory)) as started:
            seconds, series = started.measure(60 * minutes, click.echo)
        bad = started.problems()
    plot.write_text(svg(f"{minutes:g} minutes at {rate:g} jobs a second", seconds, series))
    for line in soak_report(seconds, series):
        click.echo(line)
    click.echo(f"plot: {plot}")
    for line in bad:
        click.echo(f"✗ {line}")
    sys.exit(1 if bad or any(one.grows for one in series) else 0)


def judge(happened: history.History) -> bool:
    verdict = check(happened)
    for line in report(happened, verdict):
        click.echo(line)
    return not verdict.findings


if __name__ == "__main__":
    cli()

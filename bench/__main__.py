"""Measure the listener side by side with what people use instead: python -m bench"""

import signal
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import click

from bench import machine
from bench.database import Server
from bench.harness import Bench
from bench.peers.base import Peer
from bench.peers.node import Graphile, PgBoss
from bench.peers.ours import Ours, OursOwed, OursQuiet
from bench.peers.python import Awa, Dbos, Oban, PgQueuer, Procrastinate
from bench.peers.references import Floor, NoTrigger
from bench.report import OURS, Table, markdown
from bench.stage_process import StageProcess
from bench.workloads.asynchronous import Asynchronous
from bench.workloads.backlog import Backlog
from bench.workloads.base import Workload
from bench.workloads.children import Children
from bench.workloads.commits import Bulk, ChildCommits, Commits
from bench.workloads.hop import Hop
from bench.workloads.limits import Limits
from bench.workloads.listeners import Listeners
from bench.workloads.rest import Idle, Memory, Startup
from bench.workloads.throughput import Burst, Slow

RESULTS = Path(__file__).parent / "results"
PEERS: list[Peer] = [Ours(), OursQuiet(), OursOwed(), Floor(), NoTrigger(), Graphile(), PgBoss(),
                     PgQueuer(), Procrastinate(), Awa(), Dbos(), Oban()]  # fmt: skip
WORKLOADS = [Hop, Burst, Slow, Asynchronous, Limits, Listeners, Commits, Bulk, Children,
             ChildCommits, Startup, Memory, Idle, Backlog]  # fmt: skip


def measure(
    bench: Bench, workload: Workload, peers: list[Peer], repetitions: int, tables: list[Table]
) -> None:
    """Add a table for every variant; the peers take turns, so that a busy moment of the machine
    meets all.
    """
    for variant in workload.variants:
        table = Table(workload.name, workload.title, variant, workload.metrics)
        tables.append(table)
        for repetition in range(max(repetitions, workload.repetitions)):
            for peer in peers:
                if not workload.applies(peer, variant):
                    continue
                began = time.monotonic()
                try:
                    numbers = workload.run(bench, peer, variant)
                except Exception as error:  # go on with the other peers
                    table.failures[peer.name] = f"{type(error).__name__}: {error}"
                    numbers = {}
                table.add(peer.name, peer.kind, numbers)
                say(workload.name, variant, peer.name, repetition, numbers, began)


def say(workload: str, variant: str, peer: str, repetition: int, numbers: dict, began: float):
    shown = " ".join(f"{name}={value:.2f}" for name, value in numbers.items()) or "FAILED"
    where = f"{workload} {variant}".strip()
    took = time.monotonic() - began
    click.echo(f"{where:20} {peer:19} #{repetition + 1} {shown}  [{took:.0f} s]", err=True)


def broken(tables: list[Table]) -> list[str]:
    """Calls that our listener lost or repeated; with one, all other figures are worthless."""
    found = []
    for table in tables:
        for count in ("lost", "repeated"):
            if any(table.values.get(OURS, {}).get(count, [])):
                found.append(f"ours has {count} calls in {table.workload} {table.variant}")
        if OURS in table.failures:
            found.append(f"ours failed in {table.workload} {table.variant}")
    return found


@click.command()
@click.option("--workload", "workloads", multiple=True, help="May be repeated; default: all.",
              type=click.Choice([workload.name for workload in WORKLOADS]))  # fmt: skip
@click.option("--peer", "only", multiple=True, help="May be repeated; default: all that can run.",
              type=click.Choice([peer.name for peer in PEERS]))  # fmt: skip
@click.option("--repetitions", type=click.IntRange(1), default=1, show_default=True,
              help="At least; a hop is measured five times anyway.")  # fmt: skip
def main(workloads: tuple[str, ...], only: tuple[str, ...], repetitions: int) -> None:
    """Measure the listener side by side with what people use instead, and report to the terminal
    and to bench/results/; what there is by then, if it is ended by a signal.

    Exit codes: 0 done; 1 ours lost or repeated a call; 2 bad input.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # leaves no process behind
    missing = {peer.name: why for peer in PEERS if (why := peer.unavailable())}
    notes = [f"left out: {name}: {why}" for name, why in missing.items()]
    if out := missing.keys() & set(only):
        raise click.UsageError("\n".join(f"{name}: {missing[name]}" for name in sorted(out)))
    peers = [p for p in PEERS if p.name not in missing and (not only or p.name in only)]
    chosen = [w() for w in WORKLOADS if not workloads or w.name in workloads]
    facts = {"Machine": machine.machine()}
    tables: list[Table] = []
    with ExitStack() as stack:
        server, stages = stack.enter_context(Server()), stack.enter_context(StageProcess())
        bench = Bench(server, stages, notes)
        facts["PostgreSQL"] = machine.server(server)
        try:
            for workload in chosen:
                measure(bench, workload, peers, repetitions, tables)
        except (KeyboardInterrupt, SystemExit):
            notes.append(f"ended by a signal in {tables[-1].workload} {tables[-1].variant}")
            raise
        finally:
            write(markdown(tables, facts, notes))
    problems = broken(tables)
    for problem in problems:
        click.echo(f"PROBLEM: {problem}", err=True)
    sys.exit(1 if problems else 0)


def write(report: str) -> None:
    path = RESULTS / f"{time.strftime('%Y-%m-%d-%H%M%S')}.md"
    RESULTS.mkdir(exist_ok=True)
    path.write_text(report)
    click.echo(report)
    click.echo(f"written: {path}", err=True)


if __name__ == "__main__":
    main()

"""The seeded plan: what the application does with each job, how the stage API answers each request,
and which stage functions misbehave. The faults are in deck.py.

The same seed gives the same plan. How processes and packets interleave is the machine's doing, so
two runs of one plan are alike, not identical.
"""

import random
import struct
import uuid
from dataclasses import dataclass

from chaos.families import CUT, QUEUED, variant_id
from demo import five_stages

STAGE_TIMEOUT, LEASE_MARGIN = 2.0, 2.5  # seconds, as the listeners are told
LEASE = STAGE_TIMEOUT + LEASE_MARGIN
SWEEP_INTERVAL = 1.0

ASYNCHRONOUS = "overlay"  # a stage
# Seconds by which a listener has the time wrong, as its file holds them.
CLOCK = struct.Struct("d")
CLOCK_STEPS = [-1e8, -3600.0, -5.0, 5.0, 3600.0, 1e8]
TENANTS = {"large": 6, "middle": 2, "small": 1}  # how often


@dataclass(frozen=True)
class Step:
    """One thing that the application does with a job: see application.ACTIONS."""

    at: float
    job: str
    what: str
    state: tuple[str, str] | None = None
    seconds: float = 0.0
    number: int = 0  # of a variant

    @property
    def variant(self) -> str:
        return variant_id(self.job, self.number)


# What may happen to a job beside the pipeline's work, and how often.
MEDDLING = {
    "touch": 5,
    "move": 3,
    "bounce": 3,
    "flip": 3,
    "roll back": 4,
    "lock": 2,
    "cancel": 2,
    "delete": 2,
}
ARRIVED = ("img_gen", "done")
ROUTED = list(five_stages.PIPELINE)
# What may happen to a family: to the job itself, or to one of its variants.
FAMILY_EVERY = 3  # jobs
FAMILY_MEDDLING = {
    "add variant": 2,
    "redo variant": 4,
    "remove variant": 2,
    "lock": 2,
    "touch": 1,
    "delete": 1,
}


def job_id(seed: int, number: int) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_OID, f"chaos/{seed}/{number}"))


def steps(seed: int, seconds: float, rate: float) -> list[Step]:
    """Everything the application does, in order of time; `rate` jobs arrive a second."""
    planned = []
    for number in range(int(seconds * rate)):
        chance = random.Random(f"{seed}/job/{number}")
        job, at = job_id(seed, number), (number + chance.random()) / rate
        if number % FAMILY_EVERY == 0:
            planned += family(chance, job, at)
            continue
        planned += arrival(chance, job, at)
        for _ in range(chance.choices([0, 1, 2], [60, 30, 10])[0]):
            planned.append(meddling(chance, job, at + chance.uniform(0.05, 8)))
    return sorted(planned, key=lambda step: step.at)


def arrival(chance: random.Random, job: str, at: float) -> list[Step]:
    """Born done, or queued and then done; some are rolled back at first."""
    born = [Step(at, job, "insert", ARRIVED)]
    if chance.random() < 0.5:
        queued = Step(at, job, "insert", ("img_gen", "queued"))
        born = [queued, Step(at + chance.uniform(0, 1), job, "move", ARRIVED)]
    if chance.random() < 0.05:
        born.insert(0, Step(at - 1, job, "insert and roll back", ARRIVED))
    return born


def family(chance: random.Random, job: str, at: float) -> list[Step]:
    """A job with three variants, which come together or one by one."""
    apart = chance.choice([0.0, 0.0, 1.0])
    born = [Step(at, job, "insert", QUEUED)]
    for number in range(3):
        when = at + chance.uniform(0, apart)
        born.append(Step(when, job, "add variant", CUT, number=number))
    for number in range(3, 3 + chance.choices([0, 1, 2, 3], [20, 40, 25, 15])[0]):
        what = chance.choices(list(FAMILY_MEDDLING), list(FAMILY_MEDDLING.values()))[0]
        number = number if what == "add variant" else chance.randrange(4)
        when, seconds = at + chance.uniform(0.05, 8), chance.choice([0.0, 0.3, 1.0])
        born.append(Step(when, job, what, CUT, seconds, number))
    return born


def meddling(chance: random.Random, job: str, at: float) -> Step:
    what = chance.choices(list(MEDDLING), list(MEDDLING.values()))[0]
    state = chance.choice(ROUTED) if what in ("move", "roll back") else None
    if what == "cancel":
        what, state = "move", ("cancelled", "cancelled")
    return Step(at, job, what, state, chance.choice([0.0, 0.1, 1.0, LEASE + 0.5]))


def tenant(job: str) -> str:
    return random.Random(f"{job}/tenant").choices(list(TENANTS), list(TENANTS.values()))[0]


def order(row: str) -> tuple[int | None, float | None]:
    """The priority of a job or variant, and the seconds from its insertion to its run_after; None:
    it has none."""
    chance = random.Random(f"{row}/order")
    return chance.choice([None, 0, 0, 7]), chance.choice([None] * 4 + [chance.uniform(0.5, 3)])


# One job in so many meets hardly anything but trouble, so that calls are given up as well.
CURSED = 10


def behaviour(seed: int, job: str, stage: str, nth: int, weights: dict[str, float]) -> tuple:
    """How the stage meets the `nth` request for a job: a name out of `weights`, and a chance
    that says how long things take."""
    chance = random.Random(f"{seed}/{job}/{stage}/{nth}")
    if random.Random(f"{seed}/{job}").randrange(CURSED) == 0:
        weights = weights | {"work": weights["work"] / 20, "hang": 10 * weights["hang"]}
    return chance.choices(list(weights), list(weights.values()))[0], chance


# What a stage function may do at one of a call's first attempts.
MISCHIEF = [
    "compute in C",
    "block",
    "exit",
    "crash",
    "post, then compute in C",
    "post, then raise",
    "post, then fork",
]
MISCHIEVOUS = 0.035  # of these attempts
TRIED = 3  # later attempts are left alone, so that every job comes through


def mischief(seed: int, job: str, stage: str, attempt: int) -> str | None:
    """What the stage function does at this attempt instead of just calling; mostly nothing."""
    if attempt > TRIED:
        return None
    chance = random.Random(f"{seed}/mischief/{job}/{stage}/{attempt}")
    return chance.choice(MISCHIEF) if chance.random() < MISCHIEVOUS else None

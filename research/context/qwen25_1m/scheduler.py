"""The asynchronous generator of an engine, as a simulation of events.

Serving a batch takes three processes: a scheduler that chooses the rows of a step and allocates
their cache slots, a runner that drives the device, and a detokeniser that reads tokens, finds stop
tokens and sends text away. One after the other, the device waits for the other two at every step.
The totally asynchronous generator (arXiv 2501.15383) lets them run beside each other: the scheduler
allocates a slot per row for step t + 1, assuming one token, before the tokens of step t are known.
They stay on the device, where step t + 1 reads them.

The price is paid at stop tokens. A row whose step t makes one is already in step t + 1: that slot
is written and its token thrown away. A row that ends by its number of tokens wastes nothing, since
the scheduler counts. Prompts are taken as prefilled; a request that cannot hold its prompt and all
its tokens in the free slots waits, so that no row is ever evicted.
"""

import dataclasses
import heapq
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Request:
    """One text: its prompt, how many tokens it may have, and after how many it stops by itself.

    ``stop_after`` counts the stop token; None, or more than ``limit``: it ends by its limit.
    """

    prompt: int
    limit: int
    stop_after: int | None = None
    arrival: float = 0.0

    def __post_init__(self) -> None:
        if self.prompt < 0 or self.limit < 1 or self.arrival < 0:
            raise ValueError(f"a request needs a limit of 1 or more, nothing below 0: {self}.")
        if self.stop_after is not None and self.stop_after < 1:
            raise ValueError(f"stop_after counts the stop token, so it is 1 or more: {self}.")

    @property
    def tokens(self) -> int:
        """Tokens that are delivered."""
        return self.limit if self.stop_after is None else min(self.limit, self.stop_after)


@dataclasses.dataclass(frozen=True)
class Span:
    """Time of one process for a step: ``fixed + per_row * rows``."""

    fixed: float
    per_row: float = 0.0

    def of(self, rows: int) -> float:
        """The time for a step of that many rows."""
        return self.fixed + self.per_row * rows


@dataclasses.dataclass(frozen=True)
class Engine:
    """How an engine works, and what each part takes.

    Attributes:
        schedule, device, detokenise: of one step.
        handover: from one process to another; there are three in a step's round.
        ahead: steps that are scheduled before the tokens of the one before are known: 0, or 1 as
            in the asynchronous generator. More hides a longer round and wastes more slots.
        rows: of a step, at most.
        slots: of the cache.
    """

    schedule: Span
    device: Span
    detokenise: Span
    handover: float = 0.0
    ahead: int = 1
    rows: int = 64
    slots: int = 2**20

    def __post_init__(self) -> None:
        if self.ahead < 0 or self.rows < 1 or self.slots < 1 or self.handover < 0:
            raise ValueError(f"rows and slots are 1 or more, the rest 0 or more: {self}.")
        if self.device.of(1) <= 0:
            raise ValueError("a step of the device must take some time.")


@dataclasses.dataclass(frozen=True)
class Step:
    """One step of the device: which requests, and when."""

    rows: tuple[int, ...]
    scheduled: float
    start: float
    end: float
    reported: float


@dataclasses.dataclass(frozen=True)
class Trace:
    """What came of it.

    Attributes:
        steps: in their order.
        delivered: when the last token of each request left the detokeniser.
        wasted: slots written for tokens behind a stop token.
        tokens: delivered.
        peak_slots: allocated at once, prompts included.
    """

    steps: tuple[Step, ...]
    delivered: tuple[float, ...]
    wasted: int
    tokens: int
    peak_slots: int

    @property
    def makespan(self) -> float:
        """Until the last text was delivered."""
        return max(self.delivered)

    @property
    def idle(self) -> float:
        """The share of the time from the first step's begin to the last one's end without a step.

        Where requests arrive late this includes waiting for them.
        """
        span = self.steps[-1].end - self.steps[0].start
        return 1 - sum(step.end - step.start for step in self.steps) / span


class _Scheduler:
    """The scheduler's own view: what it admitted, allocated and was told."""

    def __init__(self, engine: Engine, requests: Sequence[Request]) -> None:
        self.engine, self.requests = engine, requests
        self.waiting = sorted(range(len(requests)), key=lambda i: (requests[i].arrival, i))
        self.running: dict[int, int] = {}  # slots of each row's tokens, allocated so far
        self.reserved = self.allocated = self.peak = 0

    def admit(self, now: float) -> None:
        """Take requests that have arrived, in order, while rows and slots last."""
        while self.waiting and len(self.running) < self.engine.rows:
            request = self.requests[self.waiting[0]]
            need = request.prompt + request.limit
            if request.arrival > now or self.reserved + need > self.engine.slots:
                return
            self.reserved += need
            self.allocated += request.prompt
            self.running[self.waiting.pop(0)] = 0

    def allocate(self) -> tuple[int, ...]:
        """One slot for every row that, as far as is known, goes on."""
        rows = tuple(i for i, made in self.running.items() if made < self.requests[i].limit)
        for i in rows:
            self.running[i] += 1
        self.allocated += len(rows)
        self.peak = max(self.peak, self.allocated)
        return rows

    def release(self, ended: Sequence[int]) -> None:
        """Free what the texts that ended hold, slots allocated ahead included."""
        for i in ended:
            self.allocated -= self.requests[i].prompt + self.running.pop(i)
            self.reserved -= self.requests[i].prompt + self.requests[i].limit


def simulate(engine: Engine, requests: Sequence[Request]) -> Trace:
    """Serve the requests.

    Step t is scheduled when the scheduler is free and has heard of step ``t - 1 - ahead``; whatever
    else it has been told by then it knows, too. The runner begins a step when the device is free
    and the step has been handed over.

    Raises:
        ValueError: no request, or one that does not fit the cache.
    """
    for i, request in enumerate(requests):
        if request.prompt + request.limit > engine.slots:
            raise ValueError(f"request {i} needs more than {engine.slots} slots: give more.")
    if not requests:
        raise ValueError("there are no requests: give at least one.")
    scheduler = _Scheduler(engine, requests)
    steps: list[Step] = []
    reports: list[tuple[float, tuple[int, ...]]] = []  # (when, the texts that ended), a heap
    made, delivered = [0] * len(requests), [0.0] * len(requests)
    wasted = 0
    now = device_free = reader_free = 0.0
    while True:
        known = len(steps) - 1 - engine.ahead
        now = max(now, steps[known].reported if known >= 0 else 0.0)
        while reports and reports[0][0] <= now:
            scheduler.release(heapq.heappop(reports)[1])
        scheduler.admit(now)
        rows = scheduler.allocate()
        if not rows:
            events = [reports[0][0]] if reports else []
            events += [requests[i].arrival for i in scheduler.waiting if requests[i].arrival > now]
            if not events:
                break
            now = min(events)
            continue
        now += engine.schedule.of(len(rows))
        start = max(device_free, now + engine.handover)
        device_free = start + engine.device.of(len(rows))
        arrived = max(reader_free, device_free + engine.handover)
        reader_free = arrived + engine.detokenise.of(len(rows))
        steps.append(Step(rows, now, start, device_free, reader_free + engine.handover))
        ended = []
        for i in rows:
            made[i] += 1
            wasted += made[i] > requests[i].tokens
            if made[i] == requests[i].tokens:
                delivered[i] = reader_free
                ended.append(i)
        heapq.heappush(reports, (steps[-1].reported, tuple(ended)))
    total = sum(request.tokens for request in requests)
    return Trace(tuple(steps), tuple(delivered), wasted, total, scheduler.peak)

"""Drafters in a pool: rows that end and begin while others go on, texts as each gets alone."""

from collections.abc import Callable
from typing import Any

import pytest

from inference.batching import Batching, Job
from inference.drafter import Drafter
from inference.scheduler import SameLength
from tests.inference import test_eagle_tree as eagle2
from tests.inference.models import config, engine, prompts
from tests.research.speculative import test_del_exit as del_exit
from tests.research.speculative import test_longspec as longspec
from tests.research.speculative import test_specdec_pp as specdec

LENGTHS = (1, 2, 3, 7, 5, 2)
NEW = (14, 3, 9, 12, 1, 6)

DRAFTERS: dict[str, Callable[[], tuple[Drafter, Any]]] = {
    "del": lambda: del_exit.drafter_of(config()),
    "specdec": lambda: specdec.drafter(0.5),
    "eagle2": lambda: (eagle2.drafter(), eagle2.layer()),
    "longspec": lambda: (longspec.drafter(), longspec.layer()),
}


@pytest.mark.parametrize(
    "scheduler",
    [
        pytest.param(None, id="together"),
        pytest.param(SameLength(batch=1, window=2), id="in turn", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("kind", DRAFTERS)
def test_every_job_gets_what_it_gets_alone(kind: str, scheduler: Any):
    """Its text and its counters, which tell whether the drafter's state is its own."""
    drafter, params = DRAFTERS[kind]()
    eng = engine(drafter=drafter, drafter_params=params, widths=())
    jobs = [Job(prompt, new) for prompt, new in zip(prompts(*LENGTHS), NEW, strict=True)]
    pool = Batching(eng, 2, 128, scheduler, rounds_per_call=2)
    numbers = [pool.submit(job) for job in jobs]
    # Rows take new jobs while their mates are in the middle of a text.
    mixed = 0
    while pool.step():
        mixed += len(pool._order) == 1 and len(pool._queue) > 0
    accepted = 0
    for number, job in zip(numbers, jobs, strict=True):
        got, alone = pool.result(number), eng.generate([job.prompt], job.max_new_tokens)
        assert got.tokens == alone.tokens[0] and len(got.tokens) == job.max_new_tokens
        for name in ("rounds", "drafted", "accepted"):
            assert getattr(got, name) == getattr(alone.stats, name)[0]
        accepted += got.accepted
    assert mixed > 1 and accepted > 0

"""Combinators make the points that they say, and refuse what does not go together."""

import math

import pytest

from configs import sweep


def test_product_varies_the_last_part_fastest() -> None:
    points = sweep.product({"a": [1, 2], "b": ["x", "y"]}, [{"c": 0}, {"c": 9, "d": 8}])
    assert len(points) == 8
    assert points[:3] == [
        {"a": 1, "b": "x", "c": 0},
        {"a": 1, "b": "x", "c": 9, "d": 8},
        {"a": 1, "b": "y", "c": 0},
    ]
    assert sweep.product() == [{}]


def test_zipped_goes_side_by_side() -> None:
    points = sweep.zipped({"a": [1, 2], "b": [3, 4]}, [{"c": 5}, {"c": 6}])
    assert points == [{"a": 1, "b": 3, "c": 5}, {"a": 2, "b": 4, "c": 6}]
    with pytest.raises(ValueError, match=r"\[1, 2\] values"):
        sweep.zipped({"a": [1, 2], "b": [3]})


def test_chain_leaves_out_what_is_there() -> None:
    first = sweep.product({"a": [1, 2]})
    points = sweep.chain(first, sweep.product({"a": [2, 3]}))
    assert points == [{"a": 1}, {"a": 2}, {"a": 3}]
    points[0]["a"] = 7
    assert first[0] == {"a": 1}


@pytest.mark.parametrize("combine", [sweep.product, sweep.zipped])
def test_a_key_set_twice_is_an_error(combine) -> None:
    with pytest.raises(ValueError, match="a is set by two parts"):
        combine({"a": [1]}, [{"a": 2}])


def test_samples_lie_in_their_space_and_repeat() -> None:
    space = {
        "rate": sweep.log_uniform(1e-4, 1e-1),
        "share": sweep.uniform(-1.0, 1.0),
        "width": sweep.integers(1, 4),
        "steps": sweep.integers(1, 100, log=True),
        "name": sweep.choice("a", "b", None),
    }
    points = sweep.sample(space, 2000, seed=3)
    assert points[:50] == sweep.sample(space, 50, seed=3) != sweep.sample(space, 50, seed=4)
    logs = [math.log10(p["rate"]) for p in points]
    assert -4 <= min(logs) < -3.98 and -1.02 < max(logs) <= -1
    assert abs(sum(logs) / len(logs) + 2.5) < 0.1
    assert {p["width"] for p in points} == {1, 2, 3, 4}
    assert {p["name"] for p in points} == {"a", "b", None}
    steps = [p["steps"] for p in points]
    assert all(isinstance(s, int) and 1 <= s <= 100 for s in steps)
    # Uniform in the logarithm, the end's half step included: P(1) = ln 3 / ln 201.
    assert abs(steps.count(1) / len(steps) - math.log(3) / math.log(201)) < 0.04


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sweep.uniform(1, 1), "empty"),
        (lambda: sweep.log_uniform(0, 1), "low > 0"),
        (lambda: sweep.choice(), "at least one"),
    ],
)
def test_empty_ranges_are_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()

"""Data in its three forms, users' files, and the problems that make it."""

import dataclasses
import pathlib
from typing import Any

import jax
import numpy as np
import pytest
import scipy.io

from research.approximation.deeponet import data, load, problems
from research.approximation.deeponet.data import Aligned, Batched, Cartesian
from research.approximation.deeponet.problems import make_problem
from research.approximation.deeponet.systems import ode
from research.approximation.deeponet.task import cartesian_batch
from tests.models.test_torch_archive import DICT, MARK, archive, tensor, text

RNG = np.random.default_rng(0)
GRID = Cartesian(RNG.normal(size=(5, 3)), RNG.normal(size=(4, 2)), np.arange(40.0).reshape(5, 4, 2))


def test_the_same_triples_in_every_form() -> None:
    rows = GRID.aligned()
    assert rows.u.shape == (20, 3) and rows.s.shape == (20, 2) and rows.u.dtype == np.float32
    for i in (0, 7, 19):
        np.testing.assert_array_equal(rows.u[i], GRID.u[i // 4])
        np.testing.assert_array_equal(rows.y[i], GRID.y[i % 4])
        np.testing.assert_array_equal(rows.s[i], GRID.s[i // 4, i % 4])
    picked = GRID.pick(np.random.default_rng(1), 3)
    for i in range(5):
        assert len({tuple(y) for y in picked.y[i]}) == 3
        for y, s in zip(picked.y[i], picked.s[i], strict=True):
            where = np.flatnonzero((GRID.y == y).all(1))
            np.testing.assert_array_equal(s, GRID.s[i, where[0]])
    np.testing.assert_array_equal(picked.aligned().u[::3], GRID.u)
    with pytest.raises(ValueError, match="cannot pick 5 of 4"):
        GRID.pick(RNG, 5)


def test_ragged_queries_are_padded_and_unpadded() -> None:
    y = [np.ones((2, 1)), 2 * np.ones((3, 1)), 3 * np.ones((1, 1))]
    s = [np.arange(2.0), np.arange(3.0), np.arange(1.0)]
    padded = data.pad(np.eye(3), y, s)
    assert padded.mask.sum(1).tolist() == [2, 3, 1] and padded.y.shape == (3, 3, 1)
    rows = padded.aligned()
    np.testing.assert_array_equal(rows.s, np.concatenate(s))
    np.testing.assert_array_equal(rows.y, np.concatenate(y))
    assert rows.u.argmax(1).tolist() == [0, 0, 1, 1, 1, 2]
    with pytest.raises(ValueError, match="function 1 has 3 queries and 2 values"):
        data.pad(np.eye(3), y, [s[0], s[0], s[2]])
    with pytest.raises(ValueError, match="3 functions, 2 sets"):
        data.pad(np.eye(3), y[:2], s)


def test_splits_share_no_function() -> None:
    train, test = data.split(GRID, 2, np.random.default_rng(3))
    seen = {tuple(u) for u in train.u}
    assert len(seen) == 3 and len(test.u) == 2 and not seen & {tuple(u) for u in test.u}
    for part in (train, test):
        for u, s in zip(part.u, part.s, strict=True):
            i = np.flatnonzero((GRID.u == u).all(1))[0]
            np.testing.assert_array_equal(s, GRID.s[i])
    with pytest.raises(ValueError, match="split the functions before aligned"):
        data.split(GRID.aligned(), 2, RNG)
    with pytest.raises(ValueError, match="cannot hold out 5 of 5"):
        data.split(GRID, 5, RNG)


def test_mini_batches_over_functions_and_queries() -> None:
    batches = data.iterate_cartesian(GRID, 2, 3, np.random.default_rng(0))
    firsts = [next(batches) for _ in range(2)]
    seen = np.concatenate([b.u for b in firsts])
    assert len({tuple(u) for u in seen}) == 4 and firsts[0].s.shape == (2, 3, 2)
    for batch in [*firsts, next(batches)]:
        check_batch(batch)
    with pytest.raises(ValueError, match="does not fit data of 5 and 4"):
        next(data.iterate_cartesian(GRID, 6, 3, RNG))
    arrays = {f.name: getattr(GRID, f.name) for f in dataclasses.fields(GRID)}
    make = jax.jit(lambda key: cartesian_batch(key, 2, 3, arrays))
    for seed in range(3):
        made = make(jax.random.key(seed))
        np.testing.assert_array_equal(GRID.y[made["rows"]], made["y"])
        check_batch(Cartesian(*(np.asarray(made[name]) for name in "uys")))
    whole = cartesian_batch(jax.random.key(0), 5, 0, arrays)
    assert "rows" not in whole and whole["s"] is arrays["s"]


def check_batch(batch: Cartesian) -> None:
    for i, u in enumerate(batch.u):
        for j, y in enumerate(batch.y):
            a = np.flatnonzero((GRID.u == u).all(1))[0]
            b = np.flatnonzero((GRID.y == y).all(1))[0]
            np.testing.assert_array_equal(batch.s[i, j], GRID.s[a, b])
    assert len({tuple(y) for y in batch.y}) == len(batch.y)


@pytest.mark.parametrize(
    ("u", "y", "s", "message"),
    [
        (np.zeros((3, 2)), np.zeros((3, 1)), np.zeros(2), "numbers of functions differ"),
        (np.zeros((3, 2)), np.zeros((2, 1)), np.zeros(3), "numbers of functions differ"),
        (np.full((3, 2), np.nan), np.zeros((3, 1)), np.zeros(3), r"u\[0, 0\] is nan"),
        (np.zeros((3, 2)), np.zeros((3, 1)), np.array([0, np.inf, 0]), r"s\[1\] is inf"),
    ],
)
def test_bad_triples_are_told(u: Any, y: Any, s: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Aligned(u, y, s)


def test_bad_grids_and_masks_are_told() -> None:
    with pytest.raises(ValueError, match="3 queries do not fit solutions on 4 points"):
        Cartesian(np.zeros((2, 2)), np.zeros((3, 1)), np.zeros((2, 4)))
    with pytest.raises(ValueError, match="numbers of queries differ"):
        Batched(np.zeros((2, 2)), np.zeros((2, 3, 1)), np.zeros((2, 4)), np.ones((2, 4), bool))
    y = np.array([[[0.0], [np.nan]]])
    kept = Batched(np.zeros((1, 2)), y, np.zeros((1, 2)), np.array([[True, False]]))
    assert len(kept.aligned().u) == 1
    with pytest.raises(ValueError, match=r"y\[0, 1, 0\] is nan"):
        Batched(np.zeros((1, 2)), y, np.zeros((1, 2)), np.ones((1, 2), bool))


def test_files(tmp_path: pathlib.Path) -> None:
    arrays = {"a": np.arange(6.0).reshape(2, 3), "b": np.ones((2, 4, 5)), "c": np.zeros((2, 4, 5))}
    np.savez(tmp_path / "x.npz", **arrays)
    scipy.io.savemat(tmp_path / "x.mat", arrays)
    np.save(tmp_path / "x.npy", arrays["a"])
    for suffix in ("npz", "mat"):
        found = load.load_cartesian(tmp_path / f"x.{suffix}", ["a", "b"], ["b", "c"])
        assert found.u.shape == (2, 23) and found.s.shape == (2, 20, 2)
        np.testing.assert_array_equal(found.u[1, :3], arrays["a"][1])
        np.testing.assert_allclose(found.y[6], [1 / 3, 1 / 4])
        assert found.s[..., 0].min() == 1 and found.s[..., 1].max() == 0
    np.testing.assert_array_equal(load.read_arrays(tmp_path / "x.npy")["data"], arrays["a"])
    with pytest.raises(ValueError, match="no array 'z': there are a, b, c"):
        load.load_cartesian(tmp_path / "x.npz", ["z"], ["b"])
    with pytest.raises(ValueError, match="give one axis per dimension"):
        load.load_cartesian(tmp_path / "x.npz", ["a"], ["b"], [np.linspace(0, 1, 4)])
    with pytest.raises(ValueError, match=r"hold \[2, 3\] functions"):
        load.load_cartesian({"a": np.ones((3, 2)), "b": np.ones((2, 4))}, ["a"], ["b"])
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load.read_arrays(tmp_path / "y.npz")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "x.npz").read_bytes()[:80])
    with pytest.raises(ValueError, match=r"cut\.npz cannot be read as \.npz"):
        load.read_arrays(tmp_path / "cut.npz")
    (tmp_path / "new.mat").write_bytes(
        b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM" + b"\0" * 99
    )
    with pytest.raises(ValueError, match=r"version 7\.3: save it with -v7"):
        load.read_arrays(tmp_path / "new.mat")
    (tmp_path / "x.csv").write_text("1")
    with pytest.raises(ValueError, match=r"\.npz, \.npy, \.mat"):
        load.read_arrays(tmp_path / "x.csv")


def test_torch_files_and_nested_names(tmp_path: pathlib.Path) -> None:
    """A dict of one tensor and a list that holds another."""
    values = np.arange(12, dtype=np.float32)
    program = DICT + MARK + text("x") + tensor("0", "FloatStorage", 12, (3, 2), (4, 1))
    program += text("more") + b"]" + MARK + tensor("0", "FloatStorage", 12, (3, 4), (4, 1)) + b"e"
    archive(tmp_path / "x.pt", program + b"u", _0=values)
    found = load.load_cartesian(tmp_path / "x.pt", ["x"], ["more.0"])
    np.testing.assert_array_equal(found.u, values.reshape(3, 4)[:, :2])
    np.testing.assert_array_equal(found.s, values.reshape(3, 4))


def test_files_with_queries_of_their_own() -> None:
    y = np.arange(12.0).reshape(2, 3, 2)
    s = np.arange(6.0).reshape(2, 3)
    y[1, 2], s[1, 2] = np.nan, np.nan
    found = load.load_batched({"u": np.ones((2, 4)), "y": y, "s": s}, ["u"], "y", "s")
    assert found.mask.tolist() == [[True] * 3, [True, True, False]]
    one = load.load_batched({"u": np.ones((2, 4)), "y": y[:, 0], "s": s[:, :1]}, ["u"], "y", "s")
    assert one.y.shape == (2, 1, 2) and one.aligned().s.tolist() == [0, 3]
    with pytest.raises(ValueError, match="do not fit: give"):
        load.load_batched({"u": np.ones((2, 4)), "y": y, "s": s[:, :2]}, ["u"], "y", "s")
    y[0, 0, 0] = np.nan
    with pytest.raises(ValueError, match="leave out or repair"):
        load.load_batched({"u": np.ones((2, 4)), "y": y, "s": s}, ["u"], "y", "s")


SMALL = {
    "diffusion_reaction": {"sensors": 12, "nt": 9},
    "advection": {"sensors": 12, "nt": 13, "case": "III"},
    "advection_diffusion": {"sensors": 12, "nt": 9},
    "legendre": {"sensors": 12, "orders": 4},
    "caputo": {"sensors": 12, "orders": (0.5,), "points": 5},
    "stochastic_ode": {"sensors": 6, "modes": 3, "points": 11},
    "stochastic_elliptic": {"output": "mean", "sensors": 6, "modes": 3, "points": 11,
                            "samples": 50},
    "ode": {"sensors": 12, "equation": "pendulum", "length": 0.5},
}  # fmt: skip


@pytest.mark.parametrize("name", problems.PROBLEMS)
def test_every_problem_draws_new_functions_on_request(name: str) -> None:
    problem = make_problem({"name": name, **SMALL[name]})
    first, again, other = (problem.cartesian(np.random.default_rng(seed), 3) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.s, again.s)
    assert first.u.shape[0] == 3 and np.abs(first.u - other.u).max() > 1e-3
    assert first.s.std() > 0 and len(np.unique(first.u[:, 1])) == 3
    rows = problem.batched(np.random.default_rng(2), 3, 2)
    assert rows.y.shape == (3, 2, first.y.shape[1]) and rows.s.shape == (3, 2)


@pytest.mark.parametrize("name", ["stochastic_ode", "stochastic_elliptic"])
def test_paths_have_queries_of_their_own(name: str) -> None:
    fields = SMALL[name] | {"output": "path"}
    problem = make_problem({"name": name, **fields})
    rows = problem.batched(np.random.default_rng(0), 4, 5)
    assert rows.y.shape == (4, 5, 4) and rows.u.shape == (4, 18)
    ends = {"stochastic_ode": 1.0, "stochastic_elliptic": 0.0}
    at_start = rows.s[rows.y[..., -1] == 0]
    np.testing.assert_allclose(at_start, ends[name], atol=1e-6)
    with pytest.raises(ValueError, match="give queries per function"):
        problem.cartesian(np.random.default_rng(0), 4)
    with pytest.raises(ValueError, match="unknown output"):
        make_problem({"name": name, "output": "median"})


def test_labels_of_random_times_are_the_solutions() -> None:
    """The antiderivative at random times, against quadrature of the same functions."""
    problem = make_problem({"name": "ode", "sensors": 400})
    rows = problem.batched(np.random.default_rng(0), 6, 4)
    x = np.linspace(0, 1, 400)
    for u, y, s in zip(rows.u, rows.y[..., 0], rows.s, strict=True):
        whole = np.concatenate([[0], np.cumsum(0.5 * np.diff(x) * (u[1:] + u[:-1]))])
        np.testing.assert_allclose(np.interp(y, x, whole), s, atol=5e-5)
    assert (rows.y > 0).all() and (rows.y < 1).all()


def test_functions_without_a_solution_are_drawn_again() -> None:
    wild = {"name": "ode", "equation": "nonlinear", "length": 2.0, "sensors": 10}
    found, tame = (
        make_problem(wild | {"largest": largest}).cartesian(np.random.default_rng(0), 12)
        for largest in (1e9, 1.5)
    )
    assert np.abs(found.s).max() > 1.5 >= np.abs(tame.s).max()
    never = {"name": "ode", "sensors": 10, "largest": 0.001}
    with pytest.raises(ValueError, match="found no solution"):
        make_problem(never).cartesian(np.random.default_rng(0), 2)


def test_unresolved_solutions_are_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    solve, calls = ode.solve, []

    def unsure(*arguments: Any) -> ode.Solution:
        """Doubts the first function that it is asked for."""
        out = solve(*arguments)
        calls.append(arguments[2])
        return dataclasses.replace(
            out, resolved=out.resolved & (np.arange(calls[-1]) + len(calls) > 1)
        )

    problem = make_problem({"name": "ode", "sensors": 10})
    plain = problem.cartesian(np.random.default_rng(0), 3)
    monkeypatch.setattr(ode, "solve", unsure)
    again = problem.cartesian(np.random.default_rng(0), 3)
    assert calls == [3, 1]
    np.testing.assert_array_equal(again.s[1:], plain.s[1:])
    assert np.abs(again.s[0] - plain.s[0]).max() > 1e-2


def test_unknown_problems_and_spaces_are_told() -> None:
    with pytest.raises(ValueError, match="unknown problem 'heat'"):
        make_problem({"name": "heat"})
    with pytest.raises(ValueError, match=r"unknown key problem\.sensor: did you mean sensors"):
        make_problem({"name": "ode", "sensor": 3})
    with pytest.raises(ValueError, match="unknown equation"):
        make_problem({"name": "ode", "equation": "lorenz"})
    with pytest.raises(ValueError, match="unknown space"):
        problems.make_space({"name": "fourier"})
    with pytest.raises(ValueError, match=r"lives on \[0, 1\]"):
        problems.make_space({"name": "chebyshev"}, length=2.0)
    chebyshev = problems.make_space({"name": "chebyshev", "terms": 4})
    assert chebyshev.sample(np.random.default_rng(0), 2).shape == (2, 4)

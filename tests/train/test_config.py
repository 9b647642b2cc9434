"""Configs: every key checked, every value of its type."""

import dataclasses

import pytest

from configs import defaults
from tests.train.regression import Regression, get_config, make
from train.config import OptimizerConfig, TrainConfig, build, build_task, first_difference
from train.resolve import resolve


def test_defaults_name_every_key_and_no_other():
    config = defaults.training()
    assert set(config) == {f.name for f in dataclasses.fields(TrainConfig)}
    assert set(config.optimizer) == {f.name for f in dataclasses.fields(OptimizerConfig)}


def test_a_misspelt_key_names_the_nearest():
    values = get_config().to_dict()
    values["optimizer"]["learning_rte"] = values["optimizer"].pop("learning_rate")
    with pytest.raises(ValueError, match=r"config\.optimizer\.learning_rte.*learning_rate\?"):
        build(TrainConfig, values)


def test_a_misspelt_key_of_the_task_names_the_nearest():
    with pytest.raises(ValueError, match=r"unknown key config\.task\.hiden: did you mean hidden"):
        build_task(make({"hiden": 3}))


def test_a_missing_key_is_named():
    values = get_config().to_dict()
    del values["optimizer"]["eps"]
    with pytest.raises(ValueError, match=r"config\.optimizer\.eps is missing"):
        build(TrainConfig, values)


@pytest.mark.parametrize(
    ("key", "value"), [("steps", "many"), ("steps", 1.5), ("clip", 3), ("tensorboard", 1)]
)
def test_a_value_of_another_type_is_refused(key: str, value: object):
    with pytest.raises(ValueError, match=rf"config\.{key} is .*must be of type"):
        build(TrainConfig, {**get_config().to_dict(), key: value})


def test_an_integer_serves_as_a_real_number():
    assert build(TrainConfig, {**get_config().to_dict(), "clip_threshold": 2}).clip_threshold == 2.0


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("steps", 0), ("microbatches", 3), ("clip", "both"), ("compute_dtype", "int8"),
        ("ema_decay", 1.0), ("clip_threshold", 0.0), ("steps_per_call", 3), ("seed", -1),
    ],
)  # fmt: skip
def test_a_value_out_of_range_is_refused(key: str, value: object):
    with pytest.raises(ValueError, match=r"config\."):
        build(TrainConfig, {**get_config().to_dict(), key: value})


def test_the_task_gets_its_fields():
    assert build_task(make({"width": 3})) == Regression(width=3)


def test_nested_fields_and_optional_ones():
    @dataclasses.dataclass(frozen=True)
    class Inner:
        sizes: tuple[int | None, ...] | None = None

    @dataclasses.dataclass(frozen=True)
    class Outer:
        inner: Inner | None
        rate: float | None = 1.0

    assert build(Outer, {"inner": {"sizes": [1, None]}, "rate": None}) == Outer(
        Inner((1, None)), None
    )
    with pytest.raises(ValueError, match=r"config\.inner\.sizes.*type int"):
        build(Outer, {"inner": {"sizes": ["a"]}})


def test_the_first_difference_is_named_and_harmless_ones_are_not():
    one = {"a": {"b": 1}, "log_every": 3, "t": (1, 2)}
    assert first_difference(one, {"a": {"b": 1}, "log_every": 4, "t": [1, 2]}) is None
    assert first_difference(one, {"a": {"b": 2}}) == "a.b is 1 in the checkpoint and 2 now"


@pytest.mark.parametrize("name", ["train.loop", "train.nothing:x", "train.loop:nothing", ":x"])
def test_resolve_says_what_is_wrong(name: str):
    with pytest.raises(ValueError, match=r"check the name|module:attribute"):
        resolve(name)


def test_resolve_finds_nested_attributes():
    assert resolve("train.config:TrainConfig.__post_init__") is TrainConfig.__post_init__

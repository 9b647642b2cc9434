import dataclasses
import itertools

import numpy as np
import orbax.checkpoint as ocp
import pytest
from grain.checkpoint import CheckpointRestore, CheckpointSave

from train.data.bpe import train_bpe
from train.data.packing import PackedWindows
from train.data.pipeline import DataConfig, evaluation_batches, load_tokens, make_dataset


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    root = tmp_path_factory.mktemp("pipeline")
    (root / "texts").mkdir()
    texts = [f"document {number}: " + "some words " * (number % 17) for number in range(120)]
    for number, text in enumerate(texts):
        (root / "texts" / f"{number}.txt").write_text(text)
    train_bpe(texts, 270).save(root / "tokenizer")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LONGREACH_DATA", str(root / "cache"))
        yield DataConfig(
            corpus=f"text:{root / 'texts'}",
            tokenizer=str(root / "tokenizer"),
            split="train",
            sequence_length=31,
            batch_size=4,
            seed=3,
        )


def assert_equal(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])


def windows_per_epoch(config: DataConfig) -> int:
    return PackedWindows(load_tokens(config), config.sequence_length, 0, True, 1).windows_per_epoch


def test_batches_have_the_promised_arrays(config):
    batch = next(iter(make_dataset(config)))
    assert {name: (value.shape, value.dtype.name) for name, value in batch.items()} == {
        "tokens": ((4, 31), "int32"),
        "targets": ((4, 31), "int32"),
        "segments": ((4, 31), "int32"),
        "positions": ((4, 31), "int32"),
        "mask": ((4, 31), "float32"),
    }


def test_resume_is_exact_at_any_batch_and_across_epochs(config):
    per_epoch = windows_per_epoch(config) / config.batch_size
    assert per_epoch % 1, "the test needs a batch that straddles two epochs"
    border = int(per_epoch)
    iterator = iter(make_dataset(config))
    reference, states = [], []
    for _ in range(2 * border + 6):
        states.append(iterator.get_state())
        reference.append(next(iterator))
    for point in (0, 1, border - 1, border, border + 1, 2 * border + 2):
        resumed = iter(make_dataset(config))
        resumed.set_state(states[point])
        for expected in reference[point : point + 4]:
            assert_equal(next(resumed), expected)


def test_iterator_goes_through_an_orbax_checkpoint(config, tmp_path):
    iterator = iter(make_dataset(config))
    for _ in range(5):
        next(iterator)
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(5, args=ocp.args.Composite(data=CheckpointSave(iterator)))
        manager.wait_until_finished()
        expected = [next(iterator) for _ in range(3)]
        restored = iter(make_dataset(config))
        manager.restore(5, args=ocp.args.Composite(data=CheckpointRestore(restored)))
    for batch in expected:
        assert_equal(next(restored), batch)


def test_finite_epochs_end_and_endless_ones_do_not(config):
    twice = list(make_dataset(dataclasses.replace(config, epochs=2)))
    assert len(twice) == -(-2 * windows_per_epoch(config) // config.batch_size)
    tokens = load_tokens(config)
    positions = len(tokens.ids) + tokens.num_documents
    assert sum(batch["mask"].sum() for batch in twice) == 2 * positions
    endless = iter(make_dataset(config))
    for batch in twice[:-1]:
        assert_equal(next(endless), batch)
    assert next(endless)["mask"].any(axis=1).all()


def test_processes_share_each_global_batch(config):
    whole = make_dataset(config)
    shares = [
        make_dataset(dataclasses.replace(config, process_index=index, process_count=2))
        for index in range(2)
    ]
    for batch, one, two in itertools.islice(zip(whole, *shares, strict=False), 12):
        assert_equal(batch, {name: np.concatenate([one[name], two[name]]) for name in batch})


def test_seed_and_shuffle_decide_the_order(config):
    def first(**changes):
        return next(iter(make_dataset(dataclasses.replace(config, **changes))))["tokens"].tolist()

    assert first() == first()
    assert first() != first(seed=4)
    assert first(shuffle=False, seed=3) == first(shuffle=False, seed=4) != first()


@pytest.mark.parametrize("overlap", [0, 16])
def test_evaluation_scores_each_token_and_end_once(config, overlap):
    held_out = dataclasses.replace(config, split="validation")
    tokens = load_tokens(held_out)
    batches = list(evaluation_batches(held_out, overlap))
    targets = np.concatenate([batch["targets"][batch["mask"] == 1] for batch in batches])
    ends = np.full(tokens.num_documents, tokens.eos_id)
    np.testing.assert_array_equal(
        np.sort(targets), np.sort(np.concatenate([np.asarray(tokens.ids), ends]))
    )
    assert {batch["tokens"].shape for batch in batches} == {(4, 31)}


def test_evaluation_overlap_must_leave_something_to_score(config):
    with pytest.raises(ValueError, match="overlap 31 is not below sequence_length 31"):
        evaluation_batches(config, 31)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split": "dev"}, "unknown split 'dev'"),
        ({"sequence_length": 0}, "sequence_length is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"epochs": 0}, "epochs is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"process_count": 3}, "cannot be split between 3 processes"),
        ({"process_index": 2, "process_count": 2}, r"process_index 2 is not in 0\.\.1"),
    ],
)
def test_bad_configs_are_refused_early(config, changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(config, **changes)

"""Batches of shuffled windows, reading ahead, and the hash of a batch."""

from itertools import islice

import numpy as np
import pytest

from rwkv_jax.data.batches import batch_hash, dataset, read_ahead

T, B = 8, 4
NUM_WINDOWS = 50
TOKENS = np.arange(NUM_WINDOWS * T + 5, dtype=np.uint16)  # the token is its position; 4 targets are left over


def make(**changes):
    return dataset(TOKENS, **{"seq_len": T, "batch_size": B, "seed": 0} | changes)


def assert_same(a, b):
    assert a.keys() == b.keys() == {"tokens", "mask"}
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])


def test_batch_has_windows_of_consecutive_tokens():
    batch = make()[0]
    assert batch["tokens"].shape == (B, T + 1) and batch["tokens"].dtype == np.int32
    assert batch["mask"].shape == (B, T) and batch["mask"].dtype == bool and batch["mask"].all()
    np.testing.assert_array_equal(np.diff(batch["tokens"]), 1)
    np.testing.assert_array_equal(batch["tokens"][:, 0] % T, 0)


def test_shuffled_order_has_each_target_once_an_epoch():
    ds = make(batch_size=5)
    epochs = [np.concatenate([ds[10 * e + s]["tokens"][:, 1:] for s in range(10)]) for e in range(2)]
    for targets in epochs:
        np.testing.assert_array_equal(np.sort(targets.ravel()), np.arange(1, NUM_WINDOWS * T + 1))
    assert (epochs[0] != epochs[1]).any()
    assert (np.diff(epochs[0][:, 0]) < 0).any()


def test_shuffled_order_depends_on_the_seed_alone():
    assert_same(make(seed=3)[7], make(seed=3)[7])
    assert (make(seed=3)[7]["tokens"] != make(seed=4)[7]["tokens"]).any()


@pytest.mark.parametrize("start", [0, 13, 40])
def test_read_ahead_equals_indexing(start):
    ds = make()
    for step, batch in enumerate(islice(read_ahead(ds, start), 20), start):
        assert_same(batch, ds[step])


def test_read_ahead_resumes_in_the_middle():
    whole = list(islice(read_ahead(make(), 0), 12))
    first, second = list(islice(read_ahead(make(), 0), 5)), list(islice(read_ahead(make(), 5), 7))
    for a, b in zip(whole, first + second, strict=True):
        assert_same(a, b)


def test_dataset_reads_some_rows_of_the_whole_batch():
    for step in (0, 5, 12, 30):  # beyond the first epoch too
        whole = make()[step]
        for rows in ([0, 1], [2, 3], [3, 0]):
            assert_same(make(rows=rows)[step], {name: array[rows] for name, array in whole.items()})


def test_dataset_reads_from_a_memory_map(tmp_path):
    TOKENS.tofile(tmp_path / "tokens.bin")
    mapped = np.memmap(tmp_path / "tokens.bin", np.uint16, mode="r")
    batch = dataset(mapped, seq_len=T, batch_size=B, seed=0)[3]
    assert_same(batch, make()[3])
    assert type(batch["tokens"]) is np.ndarray


def test_dataset_of_one_window_repeats_it():
    batch = dataset(TOKENS[: T + 1], seq_len=T, batch_size=2, seed=0)[5]
    np.testing.assert_array_equal(batch["tokens"], [np.arange(T + 1)] * 2)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"seq_len": 405}, r"^corpus has 405 tokens: shorter than one window of 406$"),
        ({"rows": [0, 4]}, r"^rows are \[0, 4\]: expected some of 0 to 3$"),
        ({"rows": []}, r"^rows are \[\]: expected some of 0 to 3$"),
        ({"batch_size": 0}, r"^seq_len is 8 and batch_size 0: both must be at least 1$"),
        ({"seq_len": 0}, r"^seq_len is 0 and batch_size 4: both must be at least 1$"),
    ],
)
def test_dataset_refuses_bad_shapes_and_rows(changes, line):
    with pytest.raises(ValueError, match=line):
        make(**changes)


def test_batch_hash_depends_on_tokens_and_mask():
    batch = make()[0]
    assert batch_hash(batch) == batch_hash(make()[0]) == batch_hash({k: v.copy() for k, v in batch.items()})
    assert len(batch_hash(batch)) == 16
    other_token = {**batch, "tokens": batch["tokens"] + np.eye(B, T + 1, dtype=np.int32)}
    other_mask = {**batch, "mask": ~np.eye(B, T, dtype=bool)}
    assert len({batch_hash(b) for b in (batch, other_token, other_mask, make()[1])}) == 4

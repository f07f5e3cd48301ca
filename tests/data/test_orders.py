"""Orders of data, masks of targets, and mixtures: the tokens of each row, on any number of hosts."""

import math
from fractions import Fraction
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest

from rwkv_jax.data import batches, orders

T, B = 8, 4
LENGTHS = [5, 1, 30, 3, 8, 2, 17, 9, 4, 60, 7, 1, 12, 40, 6]


def split(lengths=LENGTHS, offset=0, mask=False):
    """Documents whose tokens are their own positions in the file, so a batch shows its origin."""
    tokens = offset + np.arange(sum(lengths), dtype=np.uint32)
    starts = np.cumsum([0, *lengths[:-1]])
    return SimpleNamespace(tokens=tokens, starts=starts, mask=(tokens % 3 == 0).astype(np.uint8) if mask else None)


def make(source=None, **changes):
    return batches.dataset(
        split() if source is None else source, **{"seq_len": T, "batch_size": B, "seed": 0} | changes
    )


@pytest.mark.parametrize("order", list(orders.ORDERS))
def test_dataset_gives_hosts_rows_of_the_same_batch_and_applies_masks(order):
    def mixture(mask):
        others = [(split(offset=1000), 0.25), (split([40, 20, 50], offset=2000), "1/4")]
        return [(split(mask=mask), 0.5), *others]

    for parts in (split, mixture):
        plain, whole = make(parts(mask=False), order=order), make(parts(mask=True), order=order)
        hosts = [(rows, make(parts(mask=True), order=order, rows=rows)) for rows in ([0, 1], [3, 2], [1])]
        for step in (0, 1, 7, 40):  # includes steps beyond the first epoch
            batch = whole[step]
            assert batch["tokens"].dtype == np.int32 and batch["mask"].dtype == bool
            np.testing.assert_array_equal(batch["tokens"], plain[step]["tokens"])
            targets = batch["tokens"][:, 1:]
            excluded = (targets < 1000) & (targets % 3 != 0)
            np.testing.assert_array_equal(batch["mask"], plain[step]["mask"] & ~excluded)
            for rows, host in hosts:
                own = host[step]
                assert own.keys() == batch.keys()
                for name in batch:
                    np.testing.assert_array_equal(own[name], batch[name][rows])


# The order of the released code


def released_windows(num_tokens, seq_len, samples):
    tokens = np.broadcast_to(np.uint8(0), num_tokens)  # takes no memory: only the order matters
    sample = orders.ORDERS["released"](batches._text(tokens), seq_len, 1, 0)
    return (sample(np.array(samples)).at[:, 0] // seq_len).tolist()


PILE, PRIME = 332_115_325_534, 324_331_313
FIRST = {  # windows of samples 0 to 4 of mini-epochs 0 and 8,000
    0: [200447775, 306256948, 222788917, 179736393, 82460774],
    8000: [214932314, 239733066, 130181234, 115969529, 102459349],
}


def test_released_order_starts_mini_epochs_of_the_pile_at_the_released_windows():
    """Compares with Python's integers: in 64 bits f·n³ overflows from n = 3,584 on."""
    factor = (math.isqrt(5 * PRIME**2) - PRIME) // 2
    for mini_epoch, windows in FIRST.items():
        numbers = [40320 * mini_epoch + i for i in range(1, 6)]
        assert windows == [factor * n * n * n % PRIME for n in numbers]
        assert released_windows(PILE, 1024, [n - 1 for n in numbers]) == windows


def test_released_order_uses_the_primes_of_the_released_scripts():
    """Covers the Pile and MiniPile."""
    for num_tokens, seq_len, prime in ((PILE, 1024, PRIME), (PILE, 8192, 40_541_399), (1_498_226_207, 512, 2_926_181)):
        # sample p - 1 is f·p³ mod p = 0, and only a multiple of p gives 0
        first, last, again = released_windows(num_tokens, seq_len, [0, prime - 1, prime])
        assert last == 0 and again == first


def test_released_order_visits_every_window_below_the_prime_once_an_epoch():
    windows = released_windows(50 * T + 1, T, range(47))  # 47 = 2 mod 3
    assert sorted(windows) == list(range(47))
    assert released_windows(50 * T + 1, T, range(47, 94)) == windows


# Documents by rows

STEPS = (sum(LENGTHS) - 1) // (B * T)  # steps of an epoch


def test_documents_order_continues_rows_and_repeats_no_target_within_an_epoch():
    ds, starts = make(order="documents"), split().starts
    epochs = [[ds[e * STEPS + s] for s in range(STEPS)] for e in range(2)]
    for epoch in epochs:
        for step, batch in enumerate(epoch):
            assert batch["mask"].all()
            expected = np.isin(batch["tokens"][:, :-1], starts)
            expected[:, 0] |= step == 0
            np.testing.assert_array_equal(batch["reset"], expected)
            if step:
                np.testing.assert_array_equal(batch["tokens"][:, 0], epoch[step - 1]["tokens"][:, -1])
            inside = ~np.isin(batch["tokens"][:, 1:], starts)  # within a document tokens are consecutive
            assert (np.diff(batch["tokens"])[inside] == 1).all()
        targets = np.unique([batch["tokens"][:, 1:] for batch in epoch])
        assert len(targets) == STEPS * B * T > sum(LENGTHS) - B * T - 1
    assert (epochs[0][0]["tokens"] != epochs[1][0]["tokens"]).any()
    assert (make(order="documents", seed=1)[0]["tokens"] != epochs[0][0]["tokens"]).any()


def test_documents_order_splits_an_array_without_documents_over_the_rows():
    ds = make(np.arange(96, dtype=np.uint8), order="documents")  # one too few for a third step
    np.testing.assert_array_equal(ds[1]["tokens"][:, 0], [8, 24, 40, 56])
    assert ds[0]["reset"].sum() == B and not ds[1]["reset"].any()


def test_documents_order_reads_a_far_step_without_computing_earlier_ones():
    """Reads the first step of epoch 1,000 of a million documents."""
    lengths = np.full(10**6, 50)
    source = SimpleNamespace(tokens=np.broadcast_to(np.uint8(7), lengths.sum()), starts=np.arange(10**6) * 50)
    ds = make(source, order="documents")
    assert ds[1000 * ((50 * 10**6 - 1) // (B * T))]["reset"][:, 0].all()


# Packed rows


def test_packed_order_keeps_documents_whole_and_has_every_target_once():
    text, ds = split(), make(batch_size=1, order="packed")
    num_windows = len(orders._packs(batches._text(text), T)[0])
    targets, cut = [], set()
    for step in range(num_windows):
        tokens, mask, reset = (ds[step][name][0] for name in ("tokens", "mask", "reset"))
        n = int(mask.sum())
        assert n and mask[:n].all()  # padding is at the end
        np.testing.assert_array_equal(reset, np.isin(tokens[:-1], text.starts) & mask)
        np.testing.assert_array_equal(np.diff(tokens)[:n], 1)
        targets += tokens[1:][mask].tolist()
        if not {tokens[0], tokens[n]} <= {*text.starts, text.tokens[-1]}:
            cut.add(int(np.searchsorted(text.starts, tokens[0], side="right") - 1))
    assert sorted(targets) == list(range(1, sum(LENGTHS)))
    assert cut == {i for i, length in enumerate(LENGTHS) if length > T}  # documents that fit a window are never cut


# Mixtures


@pytest.mark.parametrize("weights", [(0.7, "0.3"), (70, 30), (Fraction(7, 10), Fraction(3, 10))])
def test_mixture_proportions_are_exact_and_even(weights):
    parts = [(split(), weights[0]), (split(offset=1000), weights[1])]
    ds = make(parts, batch_size=2)
    second = np.concatenate([ds[step]["tokens"][:, 0] >= 1000 for step in range(50)])
    assert (second.reshape(10, 10).sum(axis=1) == 3).all()
    drift = np.cumsum(second) - 0.3 * np.arange(1, 101)
    assert np.abs(drift).max() < 0.5 + 1e-9  # counts are the nearest integers to the shares


@pytest.mark.parametrize("order", orders.ORDERS)
def test_mixture_rows_of_a_part_equal_those_of_the_part_alone(order):
    """In documents order a row stays in its part: 3 of 4 rows in the first, 1 in the second."""
    parts = [(split(), "0.75"), (split(offset=1000), "0.25")]
    mixed = make(parts, order=order)
    rows = np.concatenate([mixed[step]["tokens"] for step in range(24)])
    for i, (part, _) in enumerate(parts):
        own = rows[(rows[:, 0] >= 1000) == i]
        alone = make(part, order=order, batch_size=(3, 1)[i])
        expected = np.concatenate([alone[step]["tokens"] for step in range(24)])
        np.testing.assert_array_equal(own, expected)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"order": "sorted"}, "order is 'sorted', expected one of shuffled, released, packed, documents"),
        ({"seq_len": 0}, "^seq_len is 0 and batch_size 4: both must be at least 1$"),
        ({"seq_len": 405}, "^corpus has 205 tokens: shorter than one window of 406$"),
        ({"rows": [0, 4]}, r"^rows are \[0, 4\]: expected some of 0 to 3$"),
        ({"order": "documents", "seq_len": 60}, "corpus has 205 tokens: shorter than 4 rows of 60 and one more"),
        ({"order": "released", "seq_len": 190}, "expected two windows of 190 and one more"),
        (
            {"source": [(split(), 0.7), (split(), 0.3)], "order": "documents", "batch_size": 15},
            r"expected a multiple of 10: .* weights are as 7:3",
        ),
        ({"source": [(split(), 1), (split(), "1e-7")]}, "weights are 1, 1e-7: expected shares above 0 with a common"),
    ],
)
def test_dataset_refuses_orders_and_shapes_that_do_not_fit(changes, line):
    with pytest.raises(ValueError, match=line):
        make(**changes)


# Windows, reading ahead, the hash of a batch


def test_dataset_reads_windows_of_consecutive_tokens_from_a_memory_map(tmp_path):
    split().tokens.tofile(tmp_path / "tokens.bin")
    mapped = np.memmap(tmp_path / "tokens.bin", np.uint32, mode="r")
    for step in (0, 5, 12):
        batch = make(mapped)[step]
        assert type(batch["tokens"]) is np.ndarray and (batch["tokens"].dtype, batch["mask"].dtype) == (np.int32, bool)
        assert batch["tokens"].shape == (B, T + 1) and batch["mask"].shape == (B, T) and batch["mask"].all()
        np.testing.assert_array_equal(np.diff(batch["tokens"]), 1)
        np.testing.assert_array_equal(batch["tokens"][:, 0] % T, 0)


def test_shuffled_order_has_each_target_once_an_epoch_by_its_seed():
    """205 tokens are 25 windows; 4 targets are left over."""
    ds, again, other = (make(batch_size=5, seed=seed) for seed in (3, 3, 4))
    epochs = [np.concatenate([ds[5 * e + s]["tokens"][:, 1:] for s in range(5)]) for e in range(2)]
    for targets in epochs:
        np.testing.assert_array_equal(np.sort(targets.ravel()), np.arange(1, 25 * T + 1))
    assert (epochs[0] != epochs[1]).any() and (np.diff(epochs[0][:, 0]) < 0).any()
    np.testing.assert_array_equal(ds[7]["tokens"], again[7]["tokens"])
    assert (ds[7]["tokens"] != other[7]["tokens"]).any()


@pytest.mark.parametrize("start", [0, 13])
def test_read_ahead_equals_indexing_from_any_step(start):
    ds = make()
    for step, batch in enumerate(islice(batches.read_ahead(ds, start), 12), start):
        assert batch.keys() == {"tokens", "mask"}
        for name in batch:
            np.testing.assert_array_equal(batch[name], ds[step][name])


def test_batch_hash_depends_on_tokens_mask_and_resets():
    batch = make(order="documents")[0]
    changed = [batch | {"tokens": batch["tokens"] + np.eye(B, T + 1, dtype=np.int32)}]
    changed += [batch | {name: batch[name] ^ np.eye(B, T, dtype=bool)} for name in ("mask", "reset")]
    changed += [{name: x for name, x in batch.items() if name != "reset"}, make(order="documents")[1]]
    hashes = {batches.batch_hash(other) for other in [batch, *changed]}
    assert len(hashes) == 6 and {len(digits) for digits in hashes} == {16}
    assert batches.batch_hash({name: x.copy() for name, x in batch.items()}) in hashes

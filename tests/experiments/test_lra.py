"""Long Range Arena: expressions and rules, the classifier, verdicts."""

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import drawn

import rwkv_jax
from experiments.lra import classify, listops, run
from experiments.lra.listops import Examples

WORDS = {str(digit): digit for digit in range(10)} | {"MIN": 10, "MAX": 11, "MED": 12, "SM": 13, "]": 14}
SHAPE = SimpleNamespace(buckets=(8,), batch_size=8)


def tokens(text):
    return np.array([WORDS[word] for word in text.replace("[", "").split()], np.uint8)


def test_lra_evaluate_gives_the_value_at_each_number_of_levels():
    for text, values in (  # at 0, 1, 2, ... levels
        ("[MAX 4 3 [MIN 2 3 ] 1 0 [MED 1 5 8 9 2 ] ]", [9, 4, 5]),
        ("[MED 3 8 5 6 ]", [4, 5]),  # 5.5, rounded down
        ("[SM 9 [SM 1 2 ] [MAX 0 [MIN 3 4 ] ] ]", [4, 2, 2, 5]),
    ):
        assert [listops.evaluate(tokens(text), levels) for levels in range(len(values))] == values
        assert listops.evaluate(tokens(text)) == values[-1]
    with pytest.raises(ValueError, match="1 unclosed lists"):
        listops.evaluate(tokens("[MAX 1 2"))


def test_listops_generate_follows_the_recipe():
    recipe = listops.Recipe(above=5, below=30, max_depth=3, max_args=4)
    made = listops.generate(600, recipe)
    lengths = [len(one) for one in made.tokens]
    assert min(lengths) == 6 and max(lengths) <= 29 and len({one.tobytes() for one in made.tokens}) == 600
    assert made.labels.tolist() == [listops.evaluate(one) for one in made.tokens]
    deepest = [np.cumsum(np.where(one == 14, -1, (one > 9).astype(int))).max() for one in made.tokens]
    assert max(deepest) == recipe.max_depth - 1  # the digits are the last level
    assert set(np.concatenate(made.tokens)) == set(range(15))


@pytest.mark.parametrize("workers", ["threads", pytest.param("processes", marks=pytest.mark.slow)])
def test_listops_generate_is_independent_of_the_number_of_workers(workers, monkeypatch):
    if workers == "threads":  # processes take seconds to start
        monkeypatch.setattr(listops, "ProcessPoolExecutor", lambda number, mp_context: ThreadPoolExecutor(number))
    recipe = listops.Recipe(5, 30)
    one, two = (listops.generate(700, recipe, seed=3, processes=n) for n in (1, 2))
    assert [x.tobytes() for x in one.tokens] == [x.tobytes() for x in two.tokens] and (one.labels == two.labels).all()
    assert one.tokens[0].tobytes() != listops.generate(1, recipe, seed=4).tokens[0].tobytes()


def test_listops_rules_agree_with_values_by_hand():
    roots = [WORDS[name] for name in ("MAX", "MAX", "MAX", "MIN", "SM")]
    known = Examples([np.array([root, 1, 2, 14]) for root in roots], np.array([9, 9, 8, 1, 5]))
    texts = (  # predicted correctly by
        "[MAX 1 2 ]",  # the root
        "[MAX 7 [MIN 8 9 ] ]",  # two levels
        "[MAX 4 [MAX 1 3 ] ]",  # two levels
        "[MIN 1 5 ]",  # operator, root
        "[SM 2 [SM 1 2 ] ]",  # operator, two levels
        "[MAX 9 [MED 1 [MIN 2 3 ] ] ]",  # all rules
        "[SM 1 [SM 1 [SM 5 5 ] ] ]",  # three levels
    )
    asked = Examples([tokens(text) for text in texts], np.array([2, 8, 4, 1, 5, 9, 2]))
    assert listops.rules(known, asked) == {
        "most frequent answer": 1 / 7,
        "root operator alone": 3 / 7,
        "root evaluated": 3 / 7,
        "2 levels evaluated": 6 / 7,
        "3 levels evaluated": 7 / 7,
    }


@pytest.mark.slow
def test_listops_rules_agree_with_another_program_at_the_public_lengths():
    """The other program measured 0.169, 0.377, 0.593, 0.743 and 0.838 on 6,000 examples. Tolerance: four standard
    errors of 500."""
    made = listops.generate(1000)
    found = listops.rules(made.part(0, 500), made.part(500, 1000))
    for share, expected in zip(found.values(), (0.169, 0.377, 0.593, 0.743, 0.838), strict=True):
        assert abs(share - expected) < 4 * (expected * (1 - expected) / 500) ** 0.5


@pytest.fixture(scope="module")
def examples():
    """Sequences whose class is their first token."""
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 4, rng.integers(1, 9)) for _ in range(101)]
    return Examples(rows, np.array([row[0] for row in rows]))


def test_classifier_batches_have_one_bucket_and_hold_every_example_once(examples):
    lengths = np.array([len(row) for row in examples.tokens])
    judged = classify.batches(examples, (4, 8), 16)
    assert sorted(np.concatenate([index for _, index in judged])) == list(range(101))
    trained = classify.batches(examples, (4, 8), 16, np.random.default_rng(0))
    index = np.concatenate([index for _, index in trained])
    assert all(len(index) == 16 for _, index in trained) and len(set(index)) == len(index) > 101 - 2 * 16
    for T, index in judged + trained:
        assert lengths[index].max() <= T and (T == 4 or lengths[index].min() > 4)
    with pytest.raises(ValueError, match="an example has 8 tokens, expected at most 6"):
        classify.batches(examples, (4, 6), 16)


CLASSIFIER = classify.Classifier(rwkv_jax.build("rwkv4", vocab_size=4, num_layers=1, dim=8), 4)


def test_classifier_ignores_padding(examples):
    _, params = drawn(CLASSIFIER)
    rows = classify.batch(examples, 8, np.arange(5), 8)
    assert rows["valid"].sum(axis=1).tolist() == [len(examples.tokens[i]) for i in (0, 1, 2, 3, 4, 0, 0, 0)]
    other = rows | {"tokens": np.where(rows["valid"], rows["tokens"], 3)}
    seen = other | {"valid": np.ones((8, 8), bool)}
    nats, same, different = (
        np.asarray(classify._judge(CLASSIFIER, params, batch)[0]) for batch in (rows, other, seen)
    )
    assert (nats == same).all() and not (nats == different).all()


def test_classifier_reads_the_documents_of_a_pair_separately():
    model, (_, params) = classify.Classifier(CLASSIFIER.lm, 4, num_documents=2), drawn(CLASSIFIER)
    kernel = np.random.default_rng(0).standard_normal((4 * 8, 4), np.float32)
    params = params | {"Dense_0": params["Dense_0"] | {"kernel": kernel}}
    rows = [np.array([1, 2, 3]), np.array([3, 0, 3]), np.array([0, 1]), np.array([2, 2, 2])]
    pairs = Examples(rows, np.array([0, 1]), 2)
    assert [row.tolist() for row in pairs.part(1, 2).tokens] == [[0, 1], [2, 2, 2]]
    batch = classify.batch(pairs, 4, np.array([1, 0]), 2)

    @jax.jit
    def forward(params, tokens_BT, valid_BT):
        logits = model.apply({"params": params}, tokens_BT, valid_BT)
        return logits, model.lm.apply({"params": params["lm"]}, tokens_BT, valid_BT=valid_BT, method="hidden")[0]

    logits, x_BTD = map(np.asarray, forward(params, batch["tokens"], batch["valid"]))
    one, other = x_BTD[2:, :3].mean(axis=1)  # the first pair is the second of the batch
    by_hand = np.concatenate([one, other, one * other, one - other]) @ kernel + params["Dense_0"]["bias"]
    np.testing.assert_allclose(logits[1], by_hand, rtol=1e-4, atol=1e-5)


class Fading(nn.Module):
    """A stand-in for a language model, whose gradient takes seconds to trace: embeddings that decay along time."""

    @nn.compact
    def hidden(self, tokens_BT, valid_BT):
        return nn.Embed(4, 8)(tokens_BT) * 0.25 ** jnp.arange(tokens_BT.shape[1])[None, :, None], None


SLOW_RWKV = pytest.param(CLASSIFIER, marks=pytest.mark.slow, id="rwkv4")


@pytest.mark.parametrize("model", [pytest.param(classify.Classifier(Fading(), 4), id="fading"), SLOW_RWKV])
def test_classifier_learns_the_first_token(examples, model):
    params, curve = classify.fit(model, examples, examples, SHAPE, lr=3e-2, epochs=15, seed=0)
    nats, right = classify.judge(model, params, examples, SHAPE)
    assert curve["valid_right"][-1] == right.mean() > 0.9
    some, _ = classify.judge(model, params, examples.part(5, 9), SHAPE)
    np.testing.assert_allclose(some, nats[5:9], rtol=1e-5, atol=1e-7)
    assert curve["valid_loss_nats"][-1] == pytest.approx(nats.mean(), abs=1e-4)
    assert curve["valid_loss_nats"][-1] < curve["valid_loss_nats"][0]
    assert curve["steps"][-1] == 15 * (101 // 8) and len(curve["loss_nats"]) == classify.POINTS


@pytest.mark.parametrize(
    "right, interval, verdict",
    [
        ({"rwkv4": 0.55}, (0.53, 0.57), "same sign"),
        ({"rwkv4": 0.36}, (0.34, 0.39), "not resolved"),
        ({"rwkv4": 0.30}, (0.28, 0.32), "contradicted"),
        ({"rwkv4": 0.55, "transformer": 0.40}, (0.53, 0.57), "reproduced"),
        ({"rwkv4": 0.70, "transformer": 0.40}, (0.68, 0.72), "same sign"),
        ({"rwkv4": 0.55, "transformer": 0.60}, (0.53, 0.57), "contradicted"),
    ],
)
def test_lra_verdict_follows_from_shares_and_interval(right, interval, verdict):
    assert run.verdict_of(right, *interval, rule=0.37) == verdict


def test_lra_interval_is_wilsons():
    """Checks its definition: at both ends the observed share has a z of 1.96, to seven digits 1.959964."""
    low, high = run.interval(0.3, 50)
    for share in (low, high):
        assert abs(0.3 - share) / (share * (1 - share) / 50) ** 0.5 == pytest.approx(1.959964)

"""The experiment on small initial embeddings: its vocabulary, its arms, and conclusions from made-up curves."""

import numpy as np
import pytest

from experiments import study
from experiments.small_init.run import ARMS, SHARES, SMALL, STUDY, USUAL, bpe, conclude, tokens_until
from rwkv_jax import data
from rwkv_jax.data import tokenizers
from rwkv_jax.train.run_config import model_of

ITS = study.Study(**STUDY)
LOOKS = 20


def values(small=0.0, norm=0.0, noise=0.01, fades=True):
    """Curves of all arms that fall by one nat a decade of tokens, shifted by what an arm has in the beginning."""
    rng = np.random.default_rng(0)
    steps = np.arange(1, LOOKS + 1) * 10
    found = {}
    for arm, fields in ARMS.items():
        shift = small * (fields["model.embedding_init"] == "v5") + norm * fields["model.embedding_norm"]
        for seed in range(3):
            rest = np.linspace(1, 0, LOOKS) if fades else 1
            nats = 8 - np.log10(steps) + shift * rest + noise * rng.standard_normal() + 0.1 * seed
            curve = {"evaluated_steps": steps.tolist(), "valid_loss_nats": nats.tolist()}
            found[study.name_of(arm, seed)] = {"lr": 0.01, "curve": curve}
    return found


@pytest.mark.parametrize(
    ("given", "verdict"),
    [
        ({"small": -0.3, "norm": -0.2}, "same sign"),
        ({"small": 0.3}, "contradicted"),
        ({"noise": 0.1}, "not resolved"),
        ({"small": -0.3, "norm": 0.3, "noise": 0.1}, "not resolved"),
    ],
    ids=str,
)
def test_verdict_is_about_the_beginning_of_training(given, verdict):
    assert conclude(ITS, values(**given))["ledger"][0]["verdict"] == verdict


def test_conclude_separates_the_two_halves_of_the_treatment():
    concluded = conclude(ITS, values(small=-0.3, norm=-0.1, noise=0, fades=False))
    for share in map("{:g}".format, SHARES):
        found = {name: mean for name, (mean, _, _) in concluded["differences"][share].items()}
        assert found == pytest.approx({"small with LN0 - normal without": -0.4, "LN0": -0.1, "small": -0.3})
    sooner, later = (np.array(concluded["tokens_until"][arm]) for arm in (SMALL, USUAL))
    assert len(concluded["levels"]) and np.all(sooner[:, 0] < later[:, 0])


def test_tokens_until_a_loss_are_interpolated_on_the_best_so_far():
    assert tokens_until([5.0, 4.0, 3.0], [10, 20, 30], 3.5) == pytest.approx(25)
    assert tokens_until([5.0, 4.0, 4.5, 3.0], [10, 20, 30, 40], 3.9) == pytest.approx(31)  # of the best so far
    assert tokens_until([5.0, 4.0], [10, 20], 3.5) is None
    assert tokens_until([5.0, 4.0], [10, 20], 6.0) is None


def test_bpe_vocabulary_is_built_once_and_round_trips_text(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat, the café at the end\n" * 400)
    path = bpe(str(text), 300, tmp_path)
    tokenizer = tokenizers.get_tokenizer(str(path))
    assert 256 < tokenizer.vocab_size <= 300
    ids = tokenizer.encode("the mat\nunseen: ж")
    assert tokenizer.decode(ids) == "the mat\nunseen: ж" and data.SEPARATOR not in ids
    assert len(tokenizer.encode("the cat")) < 7
    before = path.stat().st_mtime_ns
    assert bpe(str(text), 300, tmp_path) == path and path.stat().st_mtime_ns == before


def test_arms_are_two_by_two_and_differ_in_nothing_else():
    models = [model_of(study.config_of(ITS, fields)) for fields in ARMS.values()]
    assert {(m.embedding_init, m.embedding_norm) for m in models} == {
        (scheme, norm) for scheme in ("v5", "normal") for norm in (True, False)
    }
    assert len({m.clone(embedding_init="v5", embedding_norm=True) for m in models}) == 1

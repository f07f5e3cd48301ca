"""Order of a prompt: does a model answer better if it knows the question before it reads the data?

Claim: an RNN cannot look back, so a prompt should ask first (the paper, appendix L, Tables 6 and 7). Tested here on a
synthetic task: of n pairs of key and value, name the value of one key, asked before the pairs or after them. Asked
before, the model needs to remember one key and one value; asked after, all n pairs. Attention can look back: the
transformers are the control, which should not depend on the order. One model of each arm is trained on both orders,
half of every batch each, with 1 to 16 pairs, and tested on the same questions in both; two layers of width 64.

    python -m experiments.order.run                   up to 16 pairs, vocabulary 40, 2 seeds
    python -m experiments.order.run --smoke

Cost: 9 minutes, each run on one core.

The paper's numbers, RWKV-4-Raven-14B without examples, the prompt in ChatGPT's order and with the question first: RTE
44.2 and 74.8 (F1), WNLI 47.9 and 49.3, GoEmotions 7.9 and 7.9, PolEmo2 38.2 and 40.9. They need the weights and tasks
of that table, some of which are gated: not run.

Verdict by the accuracy of RWKV-4 at the largest n at the end of training, question first minus question last:
  *same sign*       above 0.05 with every seed, and above the difference of the transformer with token shift
  *contradicted*    below -0.05 with every seed
  *not comparable*  the transformer with token shift is at chance in both orders, so that it is no control; this rule
                    came after the run, in which it is, and which the others called *same sign*
  *not resolved*    otherwise. The tasks differ from the paper's, so *reproduced* is not among the verdicts.

Deviations: trained from the initialisers on this task alone, at the learning rates of recall's sweep. Both
transformers stayed at chance from 2 pairs on (with 16, 0.06 to 0.08 right in both orders), so there they are no
control.
"""

from functools import partial
from pathlib import Path

import numpy as np

import rwkv_jax
from experiments import statistics, study, sweeps, tasks
from experiments.command import claim, not_run
from experiments.recall.run import DONE, TEST_SEED
from experiments.recall.sequences import shuffled

SWEEP = Path(__file__).parents[1] / "recall" / "sweep.json"
ARMS = ("rwkv4", "transformer+shift", "transformer")
ORDERS = ("first", "last")
SMALLEST = 0.05  # smallest difference of accuracies that counts


def asked(rng: np.random.Generator, pairs_B, most: int, vocab_size: int, order: str) -> dict:
    """Return {"tokens" [B, T + 1], "mask" [B, T]} with T = 2 most + 3; only the last token counts.

        first    _ _ ? q k1 v1 ... kn vn ! v
        last     _ _ k1 v1 ... kn vn ? q ! v

    Row b has pairs_B[b] pairs, at most `most`. Keys and values come from two halves of the vocabulary without its last
    three tokens, which are "?", "!" and "_".
    """
    (B,), half = pairs_B.shape, (vocab_size - 3) // 2
    ask, answer, blank = range(vocab_size - 3, vocab_size)
    if not 1 <= pairs_B.min() <= pairs_B.max() <= most <= half:
        raise ValueError(f"{max(most, pairs_B.max())} pairs do not fit a vocabulary of {vocab_size}")
    keys_BN, values_BN = (shuffled(rng, B, low, low + half)[:, :most] for low in (0, half))
    which_B1 = most - 1 - rng.integers(pairs_B)[:, None]  # the pairs are at the end of their block
    question_B2 = np.insert(np.take_along_axis(keys_BN, which_B1, axis=1), 0, ask, axis=1)
    data_BT = np.stack([keys_BN, values_BN], axis=2).reshape(B, 2 * most)
    place_T, start_B1 = np.arange(2 * most + 2)[None], 2 * (most - pairs_B)[:, None]
    if order == "first":
        prompt_BT = np.concatenate([question_B2, data_BT], axis=1)
        np.put_along_axis(prompt_BT, start_B1 + np.arange(2), question_B2, axis=1)
    else:
        prompt_BT = np.concatenate([data_BT, question_B2], axis=1)
    prompt_BT = np.where(place_T < start_B1, blank, prompt_BT)
    value_B1 = np.take_along_axis(values_BN, which_B1, axis=1)
    tokens_BT = np.concatenate([prompt_BT, np.full((B, 1), answer), value_B1], axis=1).astype(np.int32)
    return {"tokens": tokens_BT, "mask": np.arange(2 * most + 3)[None].repeat(B, 0) == 2 * most + 2}


def learn(config, folder) -> dict:
    """Accuracy by n on the same questions, asked first and last, against examples of both orders together."""
    draw = partial(asked, most=max(config.pairs), vocab_size=config.model.vocab_size)
    model = rwkv_jax.build(**config.model.to_dict())
    test = lambda n, order: draw(np.random.default_rng(TEST_SEED), np.full(config.tested, n), order=order)
    tests = {order: [test(n, order) for n in config.pairs] for order in ORDERS}

    def batch_of(step):
        rng = np.random.default_rng((config.seed, step))
        halves = [draw(rng, rng.choice(config.pairs, config.batch_size // 2), order=order) for order in ORDERS]
        return {name: np.concatenate([half[name] for half in halves]) for name in halves[0]}

    def look(step, params):
        right = lambda batch: round(float(tasks.share_right(model, params, batch)), 4)
        by_order = {order: [right(batch) for batch in tests[order]] for order in ORDERS}
        return {"examples": step * config.batch_size} | by_order, min(map(min, by_order.values())) >= DONE

    steps, every = config.examples // config.batch_size, config.every // config.batch_size
    _, curve = tasks.fit(model, batch_of, lr=config.lr, steps=steps, seed=config.seed, every=every, look=look)
    return {"lr": config.lr, "curve": curve}


def arm_of(name: str, base) -> dict:
    """Return a model at the best learning rate of recall's sweep, unless the base has a rate."""
    lr = base.lr or sweeps.best(SWEEP, f"{name} {base.model.num_layers}x{base.model.dim}", max)
    return study.flat(study.MODELS[name]) | {"lr": lr}


def verdict(differences: list[float], control: list[float], is_learned: bool) -> str:
    """Return the verdict on differences of accuracy, question first minus last, one per seed.

    Args:
        is_learned: whether the control is better than chance in an order.
    """
    if not is_learned:
        return "not comparable"
    if min(differences) > SMALLEST and np.mean(differences) > np.mean(control):
        return "same sign"
    return "contradicted" if max(differences) < -SMALLEST else "not resolved"


def conclude(its, values) -> dict:
    """Return a row of the ledger: accuracy by the number of pairs, asked first and last."""
    pairs, told_pairs = its.base["pairs"], its.base["told"]
    accuracy = {}
    for arm in ARMS:
        last = [run["curve"][-1] for run in study.runs_of(its, values, arm)]
        for i, n in enumerate(pairs):
            by_seed = {order: [one[order][i] for one in last] for order in ORDERS}
            difference = np.subtract(by_seed["first"], by_seed["last"]).round(4).tolist()
            mean, low, high = statistics.t_interval(difference)
            interval = None if np.isnan(low) else [low, high]
            accuracy[f"{arm}, n {n}"] = by_seed | {"difference": difference, "mean": mean, "interval": interval}
    at = lambda arm, n: accuracy[f"{arm}, n {n}"]
    told = lambda arm, n: " and ".join(f"{np.mean(at(arm, n)[order]):.2f}" for order in ORDERS)
    line = lambda arm: f"{arm} " + ", ".join(f"{told(arm, n)} at n {n}" for n in told_pairs)
    most = told_pairs[-1]
    size = study.size_of(its)
    difference_of = lambda arm: statistics.told(at(arm, most)["mean"], *at(arm, most)["interval"] or (None, None), 2)
    by_seed = lambda arm: f"{arm} {', '.join(f'{x:+.2f}' for x in at(arm, most)['difference'])}"
    chance = ", ".join(f"{1 / n:.2f}" for n in told_pairs)
    is_learned = any(np.mean(at(ARMS[1], most)[order]) > 1 / most + SMALLEST for order in ORDERS)
    return {
        "accuracy": accuracy,
        "ledger": [
            claim(
                "Question first or last (Tables 6, 7)",
                "Raven-14B, data first and question first: RTE 44.2 and 74.8, WNLI 47.9 and 49.3",
                f"first minus last {difference_of(ARMS[0])} right",
                verdict(at(ARMS[0], most)["difference"], at(ARMS[1], most)["difference"], is_learned),
                run=f"{most} pairs, {size}",
                details=f"accuracy asked first and last (chance {chance}): {'; '.join(map(line, ARMS))}; first minus "
                f"last at n {most} by seed: {'; '.join(map(by_seed, ARMS[:2]))}",
            )
        ],
        "not_run": [
            not_run(
                "Tables 6 and 7 themselves",
                "python -m rwkv_jax.generate --model=RWKV-4-Raven-14B.pth --prompt_file=FILE",
                hours=2,
                hardware="one GPU of 40 GB",
                why="neither the weights nor the tasks were at hand",
            )
        ],
    }


STUDY = {
    "base": {
        "model": {"num_layers": 2, "dim": 64, "vocab_size": 40},
        "pairs": (1, 2, 4, 8, 16),  # equally often in training
        "told": (4, 16),  # reported in the ledger
        "batch_size": 32,
        "examples": 96_000,
        "every": 8_000,  # examples between two tests
        "tested": 256,  # questions of each test
        "lr": None,
    },
    "arms": {arm: partial(arm_of, arm) for arm in ARMS},
    "seeds": 2,
    "measure": (),
    "against": None,
    "run": learn,
    "conclude": conclude,
    "presets": {
        "smoke": {
            "base": {
                "model": {"dim": 16, "vocab_size": 16}, "pairs": (1, 3), "told": (3,), "batch_size": 8,
                "examples": 32, "every": 16, "tested": 16, "lr": 8e-3,
            },
            "seeds": 1,
        }
    },
}  # fmt: skip

if __name__ == "__main__":
    study.main(**STUDY)

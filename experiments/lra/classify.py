"""Classification of token sequences: a linear classifier on the mean of a model's activations over a sequence."""

import math
from collections.abc import Sequence
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from experiments.lra.listops import Examples
from rwkv_jax import models, train
from rwkv_jax.train import optim

POINTS = 40  # of the curve of a run


class Classifier(nn.Module):
    """Logits [B / num_documents, classes]: a linear layer on the mean of causal activations over valid positions.

    With two documents per example, rows 2i and 2i + 1 are a pair. The classifier sees both means, their product and
    their difference.
    """

    lm: models.LM
    num_classes: int
    num_documents: int = 1

    @nn.compact
    def __call__(self, tokens_BT, valid_BT=None):
        valid_BT = jnp.ones(tokens_BT.shape, bool) if valid_BT is None else valid_BT
        x_BTD, _ = self.lm.hidden(tokens_BT, valid_BT=valid_BT)
        mean_BD = jnp.where(valid_BT[..., None], x_BTD, 0).sum(axis=1) / jnp.maximum(valid_BT.sum(axis=1), 1)[:, None]
        if self.num_documents == 2:
            one, other = mean_BD[::2], mean_BD[1::2]
            mean_BD = jnp.concatenate([one, other, one * other, one - other], axis=-1)
        return nn.Dense(self.num_classes)(mean_BD)


def batches(examples: Examples, buckets: Sequence[int], batch_size: int, rng=None) -> list[tuple[int, np.ndarray]]:
    """Return (T, indices of examples) of each batch; its examples share the smallest bucket that holds them.

    With `rng`, batches are for training: in random order, dropping the rest that does not fill a batch. Without it,
    they cover all examples in order; `batch` fills up the last ones of a bucket.
    """
    lengths = np.array([len(tokens) for tokens in examples.tokens]).reshape(-1, examples.num_documents).max(axis=1)
    if lengths.max() > buckets[-1]:
        raise ValueError(f"an example has {lengths.max()} tokens, expected at most {buckets[-1]}")
    made = []
    for which, T in enumerate(buckets):
        index = np.flatnonzero(np.searchsorted(buckets, lengths) == which)
        if rng is not None:
            index = rng.permutation(index)[: len(index) // batch_size * batch_size]
        made += [(T, index[at : at + batch_size]) for at in range(0, len(index), batch_size)]
    return made if rng is None else [made[i] for i in rng.permutation(len(made))]


def batch(examples: Examples, T: int, index, batch_size: int) -> dict:
    """Return the arrays of one batch: tokens and valid [batch_size * num_documents, T], labels [batch_size].

    Sequences are padded on the right. Missing examples are filled up with the first one.
    """
    index = np.concatenate([index, np.full(batch_size - len(index), index[0])])
    rows = (index[:, None] * examples.num_documents + np.arange(examples.num_documents)).ravel()
    tokens_BT, valid_BT = np.zeros((len(rows), T), np.int32), np.zeros((len(rows), T), bool)
    for row, i in enumerate(rows):
        tokens_BT[row, : len(examples.tokens[i])] = examples.tokens[i]
        valid_BT[row, : len(examples.tokens[i])] = True
    return {"tokens": tokens_BT, "valid": valid_BT, "labels": examples.labels[index]}


def fit(model: Classifier, known: Examples, valid: Examples, preset, *, lr: float, epochs: int, seed: int):
    """Train with the released recipe from the initialisers of `seed`, on batches of `seed`; return (params, curve).

    The curve has the number of steps and of tokens so far, and the mean training loss since its last point; after each
    epoch also the loss on `valid` and the share of correct classes.
    """
    order = lambda epoch: batches(known, preset.buckets, preset.batch_size, np.random.default_rng([seed, epoch]))
    tx, total = optim.optimiser(), epochs * len(order(0))
    rate = optim.schedule("exponential", lr, lr / 10, total, math.ceil(total / 20), total - total // 10)
    state = jax.jit(train.make_init(model, tx))(jax.random.key(seed))

    def loss(params, batch):
        logits = model.apply({"params": params}, batch["tokens"], batch["valid"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"]).mean()

    @jax.jit
    def step(state, batch, lr):
        nats, grads = jax.value_and_grad(loss)(state.params, batch)
        return train.apply_gradient(tx, state, grads, nats, lr)

    curve = {name: [] for name in ("steps", "tokens", "loss_nats", "valid_loss_nats", "valid_right")}
    losses, tokens, done = [], 0, 0
    with tqdm(total=total, disable=None, leave=False) as bar:
        for epoch in range(epochs):
            for T, index in order(epoch):
                rows = batch(known, T, index, preset.batch_size)
                state, metrics = step(state, rows, np.float32(rate(done)))
                losses.append(metrics["loss_nats"])
                tokens, done = tokens + int(rows["valid"].sum()), done + 1
                bar.update()
                if done * POINTS // total > (done - 1) * POINTS // total:
                    curve["steps"].append(done)
                    curve["tokens"].append(tokens)
                    curve["loss_nats"].append(round(float(np.mean(losses)), 4))
                    losses = []
            nats, right = judge(model, state.params, valid, preset)
            curve["valid_loss_nats"].append(round(float(nats.mean()), 4))
            curve["valid_right"].append(float(right.mean()))
    return state.params, curve


def judge(model: Classifier, params, examples: Examples, preset) -> tuple[np.ndarray, np.ndarray]:
    """Return the loss in nats of each example, and whether its class is the most likely."""
    nats, right = np.zeros(len(examples.labels)), np.zeros(len(examples.labels), bool)
    for T, index in tqdm(batches(examples, preset.buckets, preset.batch_size), disable=None, leave=False):
        found = _judge(model, params, batch(examples, T, index, preset.batch_size))
        nats[index], right[index] = (np.asarray(x)[: len(index)] for x in found)
    return nats, right


@partial(jax.jit, static_argnums=0)
def _judge(model, params, batch):
    logits = model.apply({"params": params}, batch["tokens"], batch["valid"])
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])
    return nats, logits.argmax(axis=-1) == batch["labels"]

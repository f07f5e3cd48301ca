"""Build everything that a run needs from its config, and check it before the workdir is touched."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax

from rwkv_jax import interop, models, runs
from rwkv_jax.data import batches, mixture, tokenizers
from rwkv_jax.train import metrics, optim, parallel, run_config
from rwkv_jax.train.diagnostics import make_diagnose
from rwkv_jax.train.methods import Method, method_of
from rwkv_jax.train.step import make_init, make_step
from rwkv_jax.train.workdir import tokenizer

# Fields that the weights determine; None in a config accepts any value.
DECIDED_BY_WEIGHTS = (
    *("vocab_size", "num_layers", "dim", "layers", "hidden_dim", "head_size", "embedding_norm"),
    *("head_norm_epsilon", "low_ranks"),
)


class Run(NamedTuple):
    config: Any  # with the fields that `finetune.model` determines filled in
    model: models.LM
    method: Method
    corpus: mixture.Mixture
    batches: grain.MapDataset  # of all hosts
    mine: grain.MapDataset  # their rows that this host reads
    lr: Callable  # learning rate of each step
    init: Callable  # these four as `parallel` describes them
    step: Callable
    put: Callable
    diagnose: Callable


def assembled(config, workdir: Path) -> Run:
    """Return everything that a run needs, from its config.

    Raises:
        ValueError, OSError: an invalid field, or a text that cannot be read.
    """
    run_config.check_ranges(config)
    method = method_of(config)
    if config.finetune.model:
        config = completed(config)
    model = run_config.check(config)
    method.check(model)
    metrics.check_installed(**config.logging)
    lr = learning_rate(config, model)
    encoder = tokenizer(config, workdir)
    corpus = mixture.prepare(config.corpus, encoder, text=config.data.text, prompt=config.data.prompt)
    if corpus.vocab_size > model.vocab_size:
        raise ValueError(
            f"model.vocab_size is {model.vocab_size}, expected at least {corpus.vocab_size}, "
            f"the vocabulary of tokenizer {config.tokenizer!r}"
        )
    if config.finetune.model and jax.process_index() == 0:
        tokenizers.warn_if_small(corpus.tokenizer, corpus.vocab_size, model.vocab_size)
    if config.eval_tokens:
        corpus.held_out(config.eval_tokens)  # fails before training if the text has no target
    shape = {"seq_len": config.seq_len, "batch_size": config.batch_size}
    dataset = functools.partial(batches.dataset, corpus.train, **shape, seed=config.seed, order=config.data.order)
    of_all, mine = dataset(), dataset(rows=parallel.own_rows(config.strategy, config.batch_size, config.replicas))
    o = config.optim
    recipe = (tuple(o.betas), o.eps, o.weight_decay, o.clip, o.groups and tuple(map(tuple, o.groups)))
    programs = _programs(
        model,
        method,
        recipe,
        (config.strategy, config.replicas),
        config.batch_size if config.carry_state else None,
        accumulation=config.accumulation,
        seed=config.seed if model.dropout else 0,  # only dropout draws: else seeds share a program
        l2wrap=o.l2wrap,
        loss_chunk=config.loss_chunk,
        segments=config.segments,
        stop_gradient=config.stop_gradient,
    )
    return Run(config, model, method, corpus, of_all, mine, lr, *programs)


def completed(config):
    """Fill in the fields that a fine-tuning config leaves to the weights at `finetune.model`.

    Raises:
        ValueError: the config names another size, or a tokenizer of another vocabulary.
    """
    path = interop.locate(config.finetune.model)
    base, config = runs.describe(path), config.copy_and_resolve_references()
    for name in DECIDED_BY_WEIGHTS:
        wanted, found = config.model[name], getattr(base, name)
        if wanted not in (None, found):
            raise ValueError(f"model.{name} is {wanted!r}, expected {found!r} as in {path}")
        config.model[name] = found
    for name, wanted in config.model.variant.items():
        found = base.variant.get(name)
        if wanted not in (None, found):
            raise ValueError(f"model.variant.{name} is {wanted!r}, expected {found!r} as in {path}")
        config.model.variant[name] = found
    own = tokenizers.carried(path) if path.is_dir() else None
    if config.tokenizer is None:
        config.tokenizer = tokenizers.get_tokenizer(own or tokenizers.of_model(path, base.vocab_size)).name
    elif own and (config.tokenizer == "characters" or _vocabulary(config.tokenizer) != _vocabulary(own)):
        raise ValueError(f"tokenizer is {config.tokenizer!r}, expected {own!r} as in {path}")
    config.finetune.model = str(path.absolute())
    return config


def _vocabulary(name: str) -> int:
    return tokenizers.get_tokenizer(name).vocab_size


@functools.cache
def _programs(model, method, recipe, strategy_and_replicas, carry_rows, **options):
    """(init, step, put, diagnose), compiled once a process: further runs of the same model start at once."""
    (strategy, replicas), tx = strategy_and_replicas, optim.optimiser(*recipe)
    init, options = make_init(model, tx, method, carry_rows), options | {"method": method}
    distribute = functools.partial(parallel.STRATEGIES[strategy], replicas=replicas)
    _, diagnose, _ = distribute(init, make_diagnose(model, tx, **options))
    return *distribute(init, make_step(model, tx, **options)), diagnose


def learning_rate(config, model):
    """Return the schedule of a run: a function from a step, counted from 0, to its learning rate."""
    o, steps = config.optim, config.steps
    lr = optim.default_lr(model.layers[0], model.dim) if o.lr is None else o.lr
    lr_end = lr / 10 if o.lr_end is None else o.lr_end
    warmup, decay_start = round(o.warmup * steps), steps - round(o.decay * steps)
    return optim.schedule(o.schedule, lr, lr_end, steps, warmup, decay_start)

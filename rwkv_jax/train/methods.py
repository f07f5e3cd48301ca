"""Methods of fine-tuning: the tree that a run trains, and the model's parameters and state made from it.

full     all parameters; rules of `optim.groups` freeze some of them, or some layers
lora     low-rank adapters beside matrices (`models.lora`)
state    the state before the first token
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from rwkv_jax import models
from rwkv_jax.models import lora
from rwkv_jax.train import optim


@dataclass(frozen=True)
class Method:
    """A method of fine-tuning; "full" is also that of pre-training."""

    name: str = "full"
    rank: int = 0  # lora
    alpha: float = 0.0  # lora: adapters count alpha / rank times
    targets: str = ""  # lora: a regular expression over the paths of kernels
    groups: tuple = ()  # rules as in `optim.factors`: no gradient is computed where the factor is 0

    def split(self, model, params, key):
        """(trained tree, frozen parameters or None)."""
        if self.name == "full":
            return params, None
        if self.name == "lora":
            return lora.init(key, params, self.rank, self.targets), params
        return untuned_state(model), params

    def bind(self, model, trained, frozen, batch: int):
        """(parameters, state [batch, ...] before the first token or None) for the model."""
        trained = optim.frozen_stopped(trained, self.groups)
        if self.name == "full":
            return trained, None
        if self.name == "lora":
            return lora.join(frozen, trained, self.alpha), None
        return frozen, tuned_state(model, trained, batch)

    def check(self, model) -> None:
        """Raise ValueError where the method does not fit the model, or a rule matches no parameter."""
        params = models.parameter_shapes(model)
        trained = jax.eval_shape(lambda params: self.split(model, params, jax.random.key(0))[0], params)
        optim.check_groups(trained, self.groups)


FULL = Method()


def method_of(config) -> Method:
    """The method of a run's config."""
    f = config.finetune
    if f.method != "full" and not f.model:
        raise ValueError(f"finetune.method is {f.method!r}, which needs finetune.model, the weights to start from")
    groups = tuple(map(tuple, config.optim.groups or ()))
    low_rank = (f.rank, f.alpha, f.targets) if f.method == "lora" else ()
    return Method(f.method, *low_rank, groups=groups)


def untuned_state(model):
    """Return the initial tree of state tuning: `Kind.tuned_start` of each layer, stacked as parameters are.

    Raises:
        ValueError: a kind of layer has no state that can be tuned.
    """
    fixed = [name for name, kind, _ in model.unit if kind.tuned_start is None]
    if fixed:
        raise ValueError(f"finetune.method is 'state', expected full or lora: {fixed[0]!r} has no tunable state")
    layers = {f"blocks_{i}": kind.tuned_start(config) for i, (_, kind, config) in enumerate(model.every_layer)}
    return models.stack(layers, len(model.layers))


def tuned_state(model, tuned, batch: int) -> tuple:
    """The tuned values as a state of `batch` equal rows."""
    layers = models.unstack(tuned)
    states = [kind.tuned_state(layers[f"blocks_{i}"]) for i, (_, kind, _) in enumerate(model.every_layer)]
    return jax.tree.map(lambda x_D: jnp.broadcast_to(x_D, (batch, *x_D.shape)), tuple(states))

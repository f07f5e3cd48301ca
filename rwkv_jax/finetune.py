"""Fine-tuning: what a run trains of a model that `rwkv_jax.load` reads. The command is training's own:

    python -m rwkv_jax.train --config=configs/finetune.py:lora --workdir=runs/lora --config.finetune.model=PATH

    full     all parameters; rules of `optim.groups` freeze some of them, or some layers
    lora     low-rank adapters beside matrices (`models.lora`). `rwkv_jax.load(workdir)` merges them
    state    the state before the first token (RWKV-4: 4 numbers a channel and layer). `load` gives the model as it was

What the last two learn can leave the workdir as one small file that belongs to the model, and only to it:

    python -m rwkv_jax.finetune export runs/lora adapters.safetensors
    python -m rwkv_jax.finetune merge BASE adapters.safetensors merged.pth        (any format of `rwkv_jax.save`)
    python -m rwkv_jax.finetune export runs/state tuned.context
    python -m rwkv_jax.generate --model=BASE --context=tuned.context --prompt="..."
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from rwkv_jax import checkpoint, generate, interop, models, optim, runs, tokenizers
from rwkv_jax.corpora import SEPARATOR
from rwkv_jax.interop import formats, safetensors_file
from rwkv_jax.models import lora

FORMAT = "rwkv_jax adapters 1"
# What a model's weights decide, and a config may leave open with None.
SIZES = ("vocab_size", "num_layers", "dim", "layers", "hidden_dim", "head_size", "embedding_norm")


@dataclass(frozen=True)
class Method:
    """One way to fine-tune, or with "full" to train at all: which tree is trained, and what model that tree makes."""

    name: str = "full"
    rank: int = 0  # lora
    alpha: float = 0.0  # lora: adapters count alpha / rank times
    targets: str = ""  # lora: a regular expression over the paths of kernels
    groups: tuple = ()  # rules as in `optim.factors`: no gradient is computed where the factor is 0

    def split(self, model, params, key):
        """(what is trained, the parameters that it needs and leaves as they are, or None)."""
        if self.name == "full":
            return params, None
        if self.name == "lora":
            return lora.init(key, params, self.rank, self.targets), params
        return untuned_state(model), params

    def bind(self, model, trained, frozen, batch: int):
        """(parameters, state [batch, ...] before the first token or None) that a model takes."""
        trained = optim.frozen_stopped(trained, self.groups)
        if self.name == "full":
            return trained, None
        if self.name == "lora":
            return lora.join(frozen, trained, self.alpha), None
        return frozen, tuned_state(model, trained, batch)

    def check(self, model) -> None:
        """ValueError where this does not fit the model, or a rule names nothing."""
        params = interop.parameter_shapes(model)
        trained = jax.eval_shape(lambda params: self.split(model, params, jax.random.key(0))[0], params)
        optim.check_groups(trained, self.groups)


FULL = Method()


def method_of(config) -> Method:
    """The method that a run's config asks for."""
    f = config.finetune
    if f.method != "full" and not f.model:
        raise ValueError(f"finetune.method is {f.method!r}, which needs finetune.model, the weights to start from")
    groups = tuple(map(tuple, config.optim.groups or ()))
    return (
        Method(f.method, f.rank, f.alpha, f.targets, groups) if f.method == "lora" else Method(f.method, groups=groups)
    )


def completed(config):
    """The config of a fine-tuning run with all that it leaves to the weights at `finetune.model`.

    Raises:
        ValueError: it names another size, or a tokenizer of another vocabulary.
    """
    path = interop.locate(config.finetune.model)
    base, config = runs.describe(path), config.copy_and_resolve_references()
    for name in SIZES:
        wanted, found = config.model[name], getattr(base, name)
        if wanted not in (None, found):
            raise ValueError(f"model.{name} is {wanted!r}, and {found!r} in {path}, the model to fine-tune")
        config.model[name] = found
    for name, wanted in config.model.variant.items():
        found = base.variant.get(name)
        if wanted not in (None, found):
            raise ValueError(f"model.variant.{name} is {wanted!r}, and {found!r} in {path}, the model to fine-tune")
        config.model.variant[name] = found
    own = tokenizers.carried(path) if path.is_dir() else None
    if config.tokenizer is None:
        config.tokenizer = own or tokenizers.of_model(path, base.vocab_size)
    elif own and (config.tokenizer == "characters" or _vocabulary(config.tokenizer) != _vocabulary(own)):
        raise ValueError(f"tokenizer is {config.tokenizer!r}, and {path} comes with another: {own!r}")
    config.finetune.model = str(path.absolute())
    return config


def _vocabulary(name: str) -> int:
    return tokenizers.get_tokenizer(name).vocab_size


def with_base(state, method: Method, path: str, param_dtype: str):
    """A train state with the parameters at `path`, each read straight to where its random one was."""
    name = "params" if method.name == "full" else "frozen"
    drawn = getattr(state, name)
    shardings = jax.tree.map(lambda x: x.sharding, drawn)
    jax.tree.map(lambda x: x.delete(), drawn)  # never two models in memory
    scan = "blocks" in drawn
    return state.replace(**{name: runs.load(path, dtype=param_dtype, sharding=shardings, scan=scan)[1]})


def untuned_state(model):
    """The tree that state tuning begins with: `Kind.tuned_start` of each layer, stacked as parameters are.

    Raises:
        ValueError: a kind of layer has no state that can be tuned.
    """
    fixed = [name for name, kind, _ in model.unit if kind.tuned_start is None]
    if fixed:
        raise ValueError(f"finetune.method is 'state', and the state of {fixed[0]!r} layers cannot be tuned")
    layers = {f"blocks_{i}": kind.tuned_start(config) for i, (_, kind, config) in enumerate(model.every_layer)}
    return models.stack(layers, len(model.layers))


def tuned_state(model, tuned, batch: int) -> tuple:
    """The tuned values as a state of `batch` equal rows."""
    layers = models.unstack(tuned)
    states = [kind.tuned_state(layers[f"blocks_{i}"]) for i, (_, kind, _) in enumerate(model.every_layer)]
    return jax.tree.map(lambda x_D: jnp.broadcast_to(x_D, (batch, *x_D.shape)), tuple(states))


def tuned_context(model, params, tuned) -> generate.Context:
    """The beginning of a document after a tuned state, for `generate(context=...)`: the separator has been read."""
    wide = jnp.promote_types(model.dtype, jnp.float32)
    before = generate.Context(tuned_state(model, tuned, 1), jnp.zeros((1, model.vocab_size), wide))
    return generate.read(model, params, [[SEPARATOR]], before)


def save_adapters(path, model, params, adapters, alpha: float) -> None:
    """Adapters of this model as one .safetensors file, whole or not at all; leaves by their path, "blocks/att/...".

    The factor alpha / rank is not part of B; `params` are those of the model beneath, which the file will know.
    """
    metadata = {"format": FORMAT, "alpha": repr(float(alpha)), "fingerprint": interop.fingerprint(model, params)}
    safetensors_file.write(path, flatten_dict(adapters, sep="/"), metadata)


def load_adapters(path, model, params) -> tuple[dict, float]:
    """(adapters, alpha) that `save_adapters` wrote. `lora.join` uses them as they are, `lora.merge` dissolves them.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file holds no adapters, or those of another model.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file; expected saved adapters")
    if formats.kind(path) != "safetensors":
        raise ValueError(f"{path} holds no adapters")
    arrays, metadata = safetensors_file.read(path)
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} holds no adapters, or those of another version: expected {FORMAT!r}")
    if metadata.get("fingerprint") != interop.fingerprint(model, params):
        raise ValueError(f"{path} holds the adapters of another model")
    adapters = unflatten_dict({tuple(name.split("/")): jnp.array(x) for name, x in arrays.items()})
    return adapters, float(metadata["alpha"])


def learned(workdir) -> tuple:
    """(model beneath, its parameters, method, what was learned) of a run by "lora" or "state".

    Raises:
        ValueError: the run trained anything else.
    """
    run = runs.read_run(workdir)
    if run.method == "full":
        raise ValueError(f"{workdir} is no run by lora or state: rwkv_jax.load gives all that it has learned")
    model, params = run.model, run.base()
    f = run.finetune
    method = Method(f["method"], f["rank"], f["alpha"], f["targets"])
    shapes = jax.eval_shape(lambda params: method.split(model, params, jax.random.key(0))[0], params)
    _, trained = checkpoint.restore(Path(workdir) / "checkpoints", shapes, key="params")
    return model, params, method, trained


def export(workdir, destination) -> None:
    """What a run has learned as one file: adapters, or a context for `generate`."""
    model, params, method, trained = learned(workdir)
    if method.name == "lora":
        save_adapters(destination, model, params, trained, method.alpha)
    else:
        generate.save_context(destination, tuned_context(model, params, trained), model, params)


def merge(base, adapters, destination) -> None:
    """The weights at `base` with adapters merged into them, as another file or folder."""
    model, params = runs.load(base)
    interop.save(destination, model, lora.merge(params, *load_adapters(adapters, model, params)))


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m rwkv_jax.finetune", description="Files of what fine-tuning by lora or state has learned."
    )
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("export", help="a run's adapters, or its state as a context for rwkv_jax.generate")
    command.set_defaults(call=export)
    command.add_argument("workdir")
    command.add_argument("destination")
    command = commands.add_parser("merge", help="weights with adapters merged into them")
    command.set_defaults(call=merge)
    command.add_argument("base", help="whatever rwkv_jax.load reads")
    command.add_argument("adapters")
    command.add_argument("destination", help="model.pth, model.safetensors or a folder")
    args = vars(parser.parse_args(argv))
    call = args.pop("call")
    try:
        call(**args)
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The fields of a training run: their defaults, valid values, and setting from files and flags."""

import dataclasses
import math
import re
import runpy
import typing

from flax.traverse_util import flatten_dict

from rwkv_jax import command, files, models
from rwkv_jax.data import orders
from rwkv_jax.models.block import switches
from rwkv_jax.train import parallel


def kind_defaults(name: str) -> dict:
    """Fields of a model, named as for `build`, whose default its kind of layer may choose."""
    defaults = {f.name: f.default for f in dataclasses.fields(models.LM)}
    chosen = {name: defaults[name] for kind in models.KINDS.values() for name in kind.fields}
    return chosen | dict(models.kind_of(models.kinds.kind_of_model(name)).fields)


def default():
    """Every field of a run with its default, from which files in `configs/` start. None: chosen for the model."""
    from ml_collections import ConfigDict
    from ml_collections.config_dict import placeholder

    hints = typing.get_type_hints(models.LM)
    model = {"name": models.kinds.DEFAULT, "vocab_size": 256, "num_layers": 4, "dim": 128}
    for field in dataclasses.fields(models.LM):
        if field.name in ("parent", "name", "layers", "variant", *model):
            continue
        optional = [t for t in typing.get_args(hints[field.name]) if t is not type(None)]
        optional = optional or [hints[field.name]] * (field.name in kind_defaults(model["name"]))
        model[field.name] = placeholder(typing.get_origin(optional[0]) or optional[0]) if optional else field.default
    kinds = models.KINDS.values()
    model["variant"] = {name: placeholder(t) for kind in kinds for name, (t, _) in switches(kind.variant).items()}
    return ConfigDict(
        {
            "model": model | {"layers": placeholder(tuple)},
            # or enwik8, hf:NAME, a path of text, JSONL, .npy, Megatron: see `data.prepare`; or a.txt:0.7,b.txt:0.3
            "corpus": "stdlib",
            "data": {
                # Of JSONL and hf: a field, or a template such as "Question: {question}"; the prompt is not predicted.
                # On the command line \n, \t and \\ are one character each.
                "text": "text",
                "prompt": "",
                "order": "shuffled",  # shuffled, released, packed, documents: see `rwkv_jax.data.orders`
            },
            "tokenizer": "bytes",  # or characters, world, or the path of a tokenizer.json
            "seq_len": 256,
            "batch_size": 16,
            "steps": 1000,
            "seed": 0,
            "strategy": "single",  # single, pmap, fsdp
            "replicas": 1,  # fsdp: copies of the parameters, each split over devices / replicas; best: one a slice
            "accumulation": 1,  # micro-batches a step
            "segments": 1,  # of a step's T tokens, processed in turn in the memory of one
            "stop_gradient": False,  # between these segments: truncated back-propagation
            "carry_state": False,  # rows start a step in their state after the last; needs order "documents"
            "loss_chunk": placeholder(int),  # tokens whose logits exist at one time on a device; None: by vocab_size
            "optim": {
                "lr": placeholder(float),  # None: `optim.default_lr` of the width
                "lr_end": placeholder(float),  # None: a tenth of lr
                "schedule": "exponential",  # exponential, cosine, constant
                "warmup": 0.05,  # share of the steps
                "decay": 0.1,  # share of the steps in which "exponential" decays
                "betas": (0.9, 0.99),
                "eps": 1e-8,
                "weight_decay": 0.0,
                "clip": 1.0,
                "groups": placeholder(tuple),  # (regex over parameter paths, factor); None: `optim.released_groups`
                "l2wrap": True,
            },
            "finetune": {
                "model": "",  # weights to start from, as `rwkv_jax.load` reads them; empty: random
                "method": "full",  # full, lora, state: see finetune.py
                "rank": 8,
                "alpha": 16.0,  # adapters count alpha / rank times
                "targets": "/(att|ffn)/",  # regex over paths of the kernels that get adapters
            },
            "branch_from": "",  # <workdir>/checkpoints/<step> of a trunk to start from, its step included
            "log_every": 10,
            "logging": {"tensorboard": False, "wandb_project": ""},  # beside metrics.jsonl: see `metrics.opened`
            "diagnostics_every": 0,  # see `diagnostics.make_diagnose`; each costs about a step and a half
            "eval_every": 250,
            "eval_tokens": 65536,
            "save_every": 250,
            "keep": 2,  # newest checkpoints to keep
            "compilation_cache": placeholder(bool),  # None: on, except on CPUs (see `train.loop`)
            "max_skipped": 10,  # non-finite steps in a row, without effect, that a run tolerates
            "max_loss_rise": 0.0,  # nats above the mean of the last 20 steps at which a run stops; 0: never
        }
    )


_AT_LEAST = lambda low: (lambda x: low <= x < 2**31, f"{low} or more, and below 2^31")
_ABOVE_0 = (lambda x: 0 < x < math.inf, "a finite number above 0")
_NOT_NEGATIVE = (lambda x: 0 <= x < math.inf, "a finite number, 0 or more")
_SHARE = (lambda x: 0 <= x <= 1, "a fraction from 0 to 1")
RANGES = {
    "seq_len": _AT_LEAST(1),
    "batch_size": _AT_LEAST(1),
    "steps": _AT_LEAST(1),
    "seed": (lambda x: 0 <= x < 2**32, "0 to 2^32 - 1"),
    "replicas": _AT_LEAST(1),
    "accumulation": _AT_LEAST(1),
    "segments": _AT_LEAST(1),
    "loss_chunk": _AT_LEAST(1),
    "data.order": (lambda x: x in orders.ORDERS, f"one of {', '.join(orders.ORDERS)}"),
    "log_every": _AT_LEAST(0),
    "diagnostics_every": _AT_LEAST(0),
    "eval_every": _AT_LEAST(0),
    "eval_tokens": (lambda x: x == 0 or 2 <= x < 2**31, "0, or 2 tokens and more, below 2^31"),
    "save_every": _AT_LEAST(0),
    "keep": _AT_LEAST(1),
    "max_skipped": _AT_LEAST(0),
    "max_loss_rise": _NOT_NEGATIVE,
    "corpus": (bool, "'stdlib', a name such as enwik8, or a path"),
    "data.text": (bool, "a field of the JSONL or a template such as 'Answer: {answer}'"),
    "finetune.method": (lambda x: x in ("full", "lora", "state"), "full, lora or state"),
    "finetune.rank": _AT_LEAST(1),
    "finetune.alpha": _ABOVE_0,
    "finetune.targets": (lambda x: bool(x) and re.compile(x), "a regular expression over paths of kernels"),
    "optim.lr": _ABOVE_0,
    "optim.lr_end": _ABOVE_0,
    "optim.warmup": _SHARE,
    "optim.decay": _SHARE,
    "optim.betas": (lambda x: len(x) == 2 and all(0 <= beta < 1 for beta in x), "two numbers from 0 to below 1"),
    "optim.eps": _ABOVE_0,
    "optim.weight_decay": _NOT_NEGATIVE,
    "optim.clip": _NOT_NEGATIVE,
    "optim.groups": (
        lambda x: all(re.compile(pattern) and 0 <= factor < math.inf for pattern, factor in x),
        "pairs of a regular expression and a factor",
    ),
}


def model_of(config) -> models.LM:
    """The model that a config describes. ValueError as from `models.build`."""
    return models.build(**model_fields(config))


def model_fields(config) -> dict:
    """The arguments of `models.build` in a config, without those left to the model."""
    model = config.model.to_dict()
    model["variant"] = {name: value for name, value in model.get("variant", {}).items() if value is not None}
    return {name: value for name, value in model.items() if not (name == "layers" and value is None)}


def check(config, devices: int | None = None) -> models.LM:
    """Return the model of a config, once its fields are consistent with each other and the machine.

    Args:
        devices: number to split the batch over; None: all present.

    Raises:
        ValueError: naming the first field that does not fit, and what was expected.
    """
    check_ranges(config)
    model = model_of(config)
    parallel.check_divisible(config.batch_size, config.accumulation, config.strategy, config.replicas, devices)
    _check_segments(config, model)
    return model


def check_ranges(config):
    """Raise ValueError for a field out of range; None means that a default is chosen later."""
    for name, (holds, expected) in RANGES.items():
        value = config
        for part in name.split("."):
            value = value[part]
        try:
            good = value is None or holds(value)
        except (TypeError, ValueError, re.error, OverflowError, RecursionError):  # the last two: of a pattern
            good = False
        if not good:
            raise ValueError(f"config field {name} is {value!r}, expected {expected}")


def _check_segments(config, model):
    """Raise ValueError where state cannot be carried as the config asks."""
    if (config.carry_state or config.segments > 1) and not model.recurrent:
        raise ValueError(
            f"carry_state is {config.carry_state} and segments {config.segments}, expected False and 1: "
            f"one of the layers {model.layers} has a state that grows with the text"
        )
    if config.finetune.method == "state" and (config.segments > 1 or config.data.order != "shuffled"):
        raise ValueError(
            f"data.order is {config.data.order!r} and segments {config.segments} with finetune.method 'state', "
            "expected 'shuffled' and 1: every row starts from the tuned state"
        )
    if config.carry_state and config.data.order != "documents":
        raise ValueError(
            f"data.order is {config.data.order!r} with carry_state, expected 'documents': "
            "no other order continues a row in the next step"
        )
    if config.seq_len % config.segments:
        raise ValueError(f"seq_len is {config.seq_len}, expected a multiple of {config.segments} segments")


def read(source: str, overrides=()):
    """The config of `FILE.py[:ARG]` with overrides "--config.a.b=VALUE"; those of `data` may hold escapes."""
    from absl import flags
    from ml_collections import ConfigDict, config_flags

    ends = [found.start() for found in re.finditer(r":|\Z", source)]  # of the path, which may hold colons too
    end = max((end for end in ends if files.user_path(source[:end]).is_file()), default=None)
    if end is None:
        raise ValueError(f"no config file {source!r}, expected a Python file with get_config(arg)")
    path, arg = files.user_path(source[:end]), source[end + 1 :]
    try:
        config = runpy.run_path(str(path))["get_config"](arg)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    except Exception as error:  # a user's own program may fail in any way
        raise ValueError(
            f"{path}: {type(error).__name__}: {error}; expected a Python file with get_config(arg)"
        ) from error
    if not isinstance(config, ConfigDict):
        raise ValueError(f"{path}: get_config returned {type(config).__name__}, expected a ConfigDict")
    rest, values = ["train", *overrides], flags.FlagValues()
    try:
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=rest)
        left = values(rest)[1:]
    except (AttributeError, KeyError) as error:  # an unknown field: ml_collections names the nearest one
        unknown = " ".join(str(error).replace("\\n", " ").replace("\\'", "").replace("'", "").split())
        raise ValueError(f"unknown config field {unknown}") from None
    except flags.Error as error:
        raise ValueError(" ".join(str(error).split())) from None
    if left:
        raise ValueError(f"unexpected argument {left[0]!r}")
    names = lambda config: flatten_dict(config.to_dict(), sep=".").keys()
    if missing := sorted(name for name in names(default()) - names(config) if not name.startswith("model.variant.")):
        raise ValueError(
            f"{path}: no field {missing[0]!r}; start from run_config.default(), and set a section's fields one by one"
        )
    for name in ("text", "prompt"):
        if f"config.data.{name}" in values:
            config.data[name] = command.unescaped(config.data[name])
    return values.config

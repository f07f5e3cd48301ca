"""Models from training workdirs; `load` and `describe` also take whatever `interop` reads."""

from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np

from rwkv_jax import files, interop
from rwkv_jax.interop import formats
from rwkv_jax.interop.official import activation_dtype, float_dtype, place, sharding_tree
from rwkv_jax.models import build, lora, parameter_shapes, stack, unstack

RELEASED_LENGTH = 1024  # tokens of a training sequence of the released RWKV-4 models


def load(path, dtype: str | None = None, sharding: Any = None, scan: bool = True) -> tuple[nn.Module, Any]:
    """Return model and parameters from `path`, whose format is detected from its content.

    A training workdir (`config.json` beside `checkpoints/`) gives its newest valid checkpoint, with LoRA's adapters
    merged into the base weights. Everything else is read by `interop.load`, which documents arguments and errors.
    """
    path = interop.locate(path)
    if _is_workdir(path):
        return _load_run(read_run(path), dtype, sharding, scan)
    return interop.load(path, dtype, sharding, scan)


def describe(path) -> nn.Module:
    """Return the model that `load` would return for `path`, without reading its parameters; the same errors."""
    path = interop.locate(path)
    return read_run(path).model if _is_workdir(path) else interop.describe(path)


def trained_length(path) -> int:
    """Return the training sequence length of the model at `path`: the workdir's, else that of the released models."""
    config = files.user_path(path) / "config.json"
    length = (files.read_json(config) if config.is_file() else {}).get("seq_len", RELEASED_LENGTH)
    if type(length) is not int or length < 1:
        raise ValueError(f"{config}: seq_len is {length!r}, expected a positive integer")
    return length


class Run(NamedTuple):
    """The model of a training workdir, as its config.json describes it."""

    path: Path
    name: str
    fields: dict[str, Any]
    finetune: dict[str, Any]  # that section of the run's config; empty if training began from scratch
    fingerprint: str | None  # of the base weights of a fine-tuning run

    @property
    def method(self) -> str:
        return self.finetune.get("method", "full") if self.finetune.get("model") else "full"

    @property
    def model(self) -> nn.Module:
        try:
            return build(self.name, **self.fields)
        except Exception as error:  # a field of a wrong type can make `build` raise nearly anything
            raise ValueError(f"{self.path / 'config.json'}: {files.one_line(error)}") from error

    def base(self) -> Any:
        """Return the frozen base parameters of a run by "lora" or "state".

        Raises:
          ValueError: they are missing, or have changed.
        """
        source = self.finetune["model"]
        try:
            _, params = load(source, dtype=self.fields["param_dtype"], scan=self.fields["scan"])
        except OSError as error:
            raise ValueError(f"{self.path} needs the weights that it was trained on: {error}") from error
        if self.fingerprint not in (None, interop.fingerprint(self.model, params)):
            raise ValueError(f"{self.path} was trained on other weights than {source} now holds")
        return params


def read_run(workdir) -> Run:
    """Return the run of a training workdir; ValueError if `workdir` is not one."""
    workdir = files.user_path(workdir)
    path = workdir / "config.json"
    if not path.is_file():
        raise ValueError(
            f"{workdir}: a folder without config.json; expected a training workdir or a folder for transformers"
        )
    record = files.read_json(path)
    try:
        fields = dict(record["model"])
        finetune = dict(record.get("config", {}).get("finetune", {}))
        return Run(workdir, fields.pop("name"), fields, finetune, record.get("base_fingerprint"))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f'{path}: expected {{"model": {{"name": ..., fields}}}}: {error!r}') from error


def _is_workdir(path: Path) -> bool:
    config = path / "config.json"
    return path.is_dir() and not (config.is_file() and "model_type" in files.read_json(config))


def _load_run(run: Run, dtype, sharding, scan) -> tuple[nn.Module, Any]:
    model, params = run.model, _trained(run)
    if scan != model.scan:
        model = model.clone(scan=scan)
        params = stack(params, len(model.layers), model.layers_apart) if scan else unstack(jax.device_get(params))
    if dtype is not None:
        dtype = float_dtype(dtype)
        model = model.clone(dtype=activation_dtype(dtype), param_dtype=dtype)
    shapes = parameter_shapes(model)

    def put(path, x, leaf, sharding):
        name = f"{run.path}: {jax.tree_util.keystr(path, simple=True, separator='/')}"

        def read(index):
            part = np.asarray(x)[index]
            return formats.copied(name, part, np.empty(part.shape, leaf.dtype))

        return place(read, leaf.shape, sharding)

    return model, jax.tree.map_with_path(put, params, shapes, sharding_tree(sharding, shapes))


def _trained(run: Run) -> Any:
    """Return the trained parameters of a run, with its adapters merged into the base weights."""
    from rwkv_jax import checkpoint  # here, because Orbax takes seconds to import and a .pth does not need it

    folder = run.path / "checkpoints"
    if run.method == "full":
        return checkpoint.restore(folder, parameter_shapes(run.model), key="params")[1]
    params = run.base()
    if run.method != "lora":
        return params
    rank, targets = run.finetune["rank"], run.finetune["targets"]
    shapes = jax.eval_shape(lambda params: lora.init(jax.random.key(0), params, rank, targets), params)
    _, adapters = checkpoint.restore(folder, shapes, key="params")
    return lora.merge(params, adapters, run.finetune["alpha"])

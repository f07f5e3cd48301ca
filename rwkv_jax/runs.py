"""Models from training workdirs; `load` and `describe` also take whatever `interop` reads."""

import contextlib
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np

from rwkv_jax import files, interop
from rwkv_jax.interop import card, formats
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
        return _load_run(read_run(path), dtype, sharding, scan)[:2]
    return interop.load(path, dtype, sharding, scan)


def load_with_training(
    path, dtype: str | None = None, sharding: Any = None, scan: bool = True
) -> tuple[nn.Module, Any, dict[str, Any] | None]:
    """Return what `load` returns, and the known facts of training (`interop.card.FIELDS`), None if there are none.

    Facts come from a training workdir, or from the model card of a folder.
    """
    path = interop.locate(path)
    if _is_workdir(path):
        model, params, step = _load_run(read_run(path), dtype, sharding, scan)
        return model, params, None if step is None else _training(path, step)
    return *interop.load(path, dtype, sharding, scan), card.read(path) if path.is_dir() else None


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
    finetune: dict[str, Any]  # that section of the run's config; no `model` in it: training began from scratch
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


def _load_run(run: Run, dtype, sharding, scan) -> tuple[nn.Module, Any, int | None]:
    """Model, parameters and the step as from `_trained`."""
    model, (step, params) = run.model, _trained(run)
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

    return model, jax.tree.map_with_path(put, params, shapes, sharding_tree(sharding, shapes)), step


def _training(workdir: Path, step: int) -> dict[str, Any]:
    """What config.json and metrics.jsonl know of the run at a step."""
    record = files.read_json(workdir / "config.json")
    section = lambda name: found if isinstance(found := record.get(name), dict) else {}
    corpus, config = section("corpus"), section("config")
    finetune = config.get("finetune") or {}
    facts = {"corpus": corpus.get("name"), "corpus_sha256": corpus.get("sha256"), "steps": step}
    facts |= {"versions": section("versions") or None, "config": config or None}
    facts["started_from"] = config.get("branch_from") or finetune.get("model") or None
    sizes = config.get("batch_size"), config.get("seq_len")
    if all(type(size) is int for size in sizes) and not config.get("branch_from"):  # a trunk may have had others
        facts["tokens"] = step * sizes[0] * sizes[1]
    return card.known(facts | _last_losses(workdir / "metrics.jsonl", step))


def _last_losses(path: Path, step: int) -> dict[str, Any]:
    """The newest training and held-out loss in a log up to a step; lines that are not JSON count for nothing."""
    losses = {}
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        with contextlib.suppress(ValueError):
            row = files.parse_json(line)
            if type(row.get("step")) is int and row["step"] <= step:
                losses |= {name: row[name] for name in ("loss_nats", "valid_loss_nats") if name in row}
    return losses


def _trained(run: Run) -> tuple[int | None, Any]:
    """Return step and trained parameters of a run, with its adapters merged into the base weights.

    The step is None for a run by "state", which leaves the parameters as they were.
    """
    from rwkv_jax import checkpoint  # here, because Orbax takes seconds to import and a .pth does not need it

    folder = run.path / "checkpoints"
    if run.method == "full":
        return checkpoint.restore(folder, parameter_shapes(run.model), key="params")
    params = run.base()
    if run.method != "lora":
        return None, params
    rank, targets = run.finetune["rank"], run.finetune["targets"]
    shapes = jax.eval_shape(lambda params: lora.init(jax.random.key(0), params, rank, targets), params)
    step, adapters = checkpoint.restore(folder, shapes, key="params")
    return step, lora.merge(params, adapters, run.finetune["alpha"])

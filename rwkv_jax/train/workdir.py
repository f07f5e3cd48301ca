"""A workdir: `config.json`, `metrics.jsonl` and `checkpoints/`, held by one run at a time."""

import contextlib
import fcntl
import importlib.metadata
import json
import os
import platform

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from jax.experimental import multihost_utils

from rwkv_jax import checkpoint, files, interop, runs
from rwkv_jax.data import tokenizers
from rwkv_jax.train import metrics, run_config
from rwkv_jax.train.methods import Method
from rwkv_jax.train.step import stored

# Fields that may change when a workdir is resumed: none that training depends on (with dropout it depends on the
# strategy: each device of pmap draws its own). The corpus hash covers `data.text` and `data.prompt`.
FREE_FIELDS = (
    "log_every", "logging.tensorboard", "logging.wandb_project", "diagnostics_every", "compilation_cache",
    "eval_every", "eval_tokens", "save_every", "keep", "strategy", "replicas", "loss_chunk",
    "model.remat", "data.text", "data.prompt", "finetune.model", "max_skipped", "max_loss_rise",
)  # fmt: skip


@contextlib.contextmanager
def claimed(workdir):
    """Lock a workdir for one run at a time, on its first host; ValueError if another run holds the lock."""
    if jax.process_index() != 0:
        yield
        return
    workdir.mkdir(parents=True, exist_ok=True)
    with (workdir / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"{workdir} is in use by another run") from None
        yield


def write_config(workdir, config, fields, corpus):
    """Write `config.json` of a new workdir; in an old one, refuse a change of any field that affects the numbers."""
    if jax.process_index() != 0:
        return
    path = workdir / "config.json"
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "grain")
    record = {
        "model": fields,
        "seq_len": config.seq_len,
        "corpus": {"name": corpus.name, "sha256": corpus.sha256},
        "config": config.to_dict(),
        "versions": {"python": platform.python_version()}
        | {package: importlib.metadata.version(package) for package in packages},
        "xla_flags": os.environ.get("XLA_FLAGS", ""),  # on a GPU resume is exact only with deterministic ops
    }
    record = json.loads(json.dumps(record))
    if path.exists() and (checkpoint.steps(workdir / "checkpoints") or metrics.logged(workdir / "metrics.jsonl")):
        old = _read_config(path)
        free = set(FREE_FIELDS) - ({"strategy"} if config.model.dropout else set())
        if old["corpus"]["sha256"] == corpus.sha256:
            free.add("tokenizer")  # the same one, perhaps under another path
        flat = lambda r: flatten_dict({"config": r["config"], "corpus": r["corpus"]}, sep=".")
        absent = json.loads(json.dumps(run_config.default().to_dict()))  # fields younger than the workdir
        before, now = flat(old | {"config": absent}) | flat(old), flat(record)
        for flat_record in (before, now):  # None is the default of the kind of layer
            for name, value in run_config.kind_defaults(flat_record["config.model.name"]).items():
                if flat_record.get(f"config.model.{name}") is None:
                    flat_record[f"config.model.{name}"] = value
        changed = [
            f"{key.removeprefix('config.')} was {before.get(key)!r}, now {now.get(key)!r}"
            for key in sorted(before | now)
            if before.get(key) != now.get(key) and key.removeprefix("config.") not in free
        ]
        if changed:
            raise ValueError(f"{workdir} holds a run of another config: {'; '.join(changed)}")
        return
    name = corpus.tokenizer
    record["tokenizer"] = (
        name if name in tokenizers.NAMES else tokenizers.save(tokenizers.get_tokenizer(name), workdir)
    )
    _write_json(path, record)


def hold_to_base(workdir, model, params):
    """Record the fingerprint of a run's base weights in `config.json`; ValueError if they have changed."""
    path = workdir / "config.json"
    record, found = files.read_json(path), interop.fingerprint(model, params)
    if record.get("base_fingerprint", found) != found:
        raise ValueError(
            f"{workdir} holds a run on other weights than {record['config']['finetune']['model']} now has"
        )
    if "base_fingerprint" not in record and jax.process_index() == 0:
        _write_json(path, record | {"base_fingerprint": found})


def _write_json(path, record):
    with files.written(path) as file:
        file.write((files.to_json(record, indent=1) + "\n").encode())


def _read_config(path):
    try:
        old = files.parse_json(path.read_bytes())
        if not isinstance(old["config"], dict) or not isinstance(old["corpus"]["sha256"], str):
            raise TypeError("config or corpus has the wrong type")
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{path} is damaged ({type(error).__name__}: {error}); delete the file to use the config of this command"
        ) from error
    return old


def restore(workdir, config, model, method, init):
    """(state, steps taken) from the newest valid checkpoint, else the trunk of `branch_from`, else step 0."""
    # blocks here: on a CPU, reading a value of a state that ran out of memory would hang forever
    state = jax.block_until_ready(init(jax.random.key(config.seed)))
    folder, step = workdir / "checkpoints", None
    saved = bool(multihost_utils.broadcast_one_to_all(np.array(bool(checkpoint.steps(folder)))))
    if config.finetune.model and not ((saved or config.branch_from) and state.frozen is None):
        state = with_base(state, method, config.finetune.model, config.model.param_dtype)
        hold_to_base(workdir, model, state.params if state.frozen is None else state.frozen)
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), stored(state))
    if saved:
        step, found = checkpoint.restore(folder, like)
        state = state.replace(**found)
    elif config.branch_from:
        trunk = files.user_path(config.branch_from)
        if not trunk.name.isdecimal():
            raise ValueError(f"branch_from is {config.branch_from!r}, expected <workdir>/checkpoints/<step>")
        # another batch has other rows: their carry starts empty
        like = {name: value for name, value in like.items() if name != "carry"}
        step, found = checkpoint.restore(trunk.parent, like, int(trunk.name), drop=("carry",))
        state = state.replace(**found)
        if step >= config.steps:
            raise ValueError(f"steps is {config.steps}, expected more than the {step} of branch_from")
    if jax.process_index() == 0:
        metrics.cut_back(workdir / "metrics.jsonl", step or 0)
    return state, step or 0


def with_base(state, method: Method, path: str, param_dtype: str):
    """A train state with the parameters at `path`, each read with the sharding of its random one."""
    name = "params" if method.name == "full" else "frozen"
    drawn = getattr(state, name)
    shardings = jax.tree.map(lambda x: x.sharding, drawn)
    jax.tree.map(lambda x: x.delete(), drawn)  # never two models in memory
    scan = "blocks" in drawn
    return state.replace(**{name: runs.load(path, dtype=param_dtype, sharding=shardings, scan=scan)[1]})


def tokenizer(config, workdir):
    """The config's tokenizer, or the run's own copy if its file is missing."""
    if config.tokenizer in (*tokenizers.NAMES, "characters") or files.user_path(config.tokenizer).is_file():
        return config.tokenizer
    return tokenizers.carried(workdir) or config.tokenizer

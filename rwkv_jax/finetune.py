"""Fine-tuning of a model that `rwkv_jax.load` reads, by three methods. The command is training's own:

    python -m rwkv_jax.train --config=configs/finetune.py:lora --workdir=runs/lora --config.finetune.model=PATH

    full     all parameters; rules of `optim.groups` freeze some of them, or some layers
    lora     low-rank adapters beside matrices (`models.lora`). `rwkv_jax.load(workdir)` merges them
    state    the state before the first token (RWKV-4: 4 numbers a channel and layer; RWKV-5, 6 and 7: the matrices of
             the heads, as released, while token shift begins at zero). `load` gives the base model

The adapters or states that the last two learn can be exported to one small file, which only the base model accepts:

    python -m rwkv_jax.finetune export runs/lora adapters.safetensors
    python -m rwkv_jax.finetune merge BASE adapters.safetensors merged.pth        (.pth, .safetensors or a folder)
    python -m rwkv_jax.finetune export runs/state tuned.context        (tuned.pth: as released, `time_state`)
    python -m rwkv_jax.generate --model=BASE --context=tuned.context --prompt="..."
"""

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from rwkv_jax import checkpoint, command, files, generate, interop, runs
from rwkv_jax.data import tokenizers
from rwkv_jax.interop import formats, pth, safetensors_file, states
from rwkv_jax.models import lora
from rwkv_jax.train.methods import Method, tuned_state

FORMAT = "rwkv_jax adapters 1"


def tuned_context(model, params, tuned) -> generate.Context:
    """Return the context after a tuned state and the separator, with which every document begins."""
    return generate.after_separator(model, params, tuned_state(model, tuned, 1))


def save_adapters(path, model, params, adapters, alpha: float) -> None:
    """Write adapters as one .safetensors file, whole or not at all; leaves are named by path, "blocks/att/...".

    B does not include the factor alpha / rank. The file has the fingerprint of `params`, the base weights.
    """
    path = files.user_path(path)
    metadata = {"format": FORMAT, "alpha": repr(float(alpha)), "fingerprint": interop.fingerprint(model, params)}
    safetensors_file.write(path, flatten_dict(adapters, sep="/"), metadata)


def load_adapters(path, model, params) -> tuple[dict, float]:
    """Read (adapters, alpha) that `save_adapters` wrote.

    Args:
        params: the base weights, in the layout in which the adapters were trained: layers stacked, or one set a layer.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file holds no adapters, or those of another model or layout, or is damaged.
    """
    arrays, metadata = _read_adapters(path)
    if metadata.get("fingerprint") != interop.fingerprint(model, params):
        raise ValueError(f"{path} holds the adapters of another model")
    _check_adapters(path, arrays, params)
    try:
        alpha = float(metadata["alpha"])
    except (KeyError, ValueError):
        raise ValueError(f"{path} is damaged: alpha is {metadata.get('alpha')!r}, expected a number") from None
    return unflatten_dict({tuple(name.split("/")): jnp.array(x) for name, x in arrays.items()}), alpha


def _read_adapters(path) -> tuple[dict, dict]:
    """Return the arrays of a file of adapters by path, and its metadata."""
    path = files.user_path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected saved adapters")
    if formats.format_of(path) != "safetensors":
        raise ValueError(f"{path} holds no adapters: expected a .safetensors by `finetune export`")
    arrays, metadata = safetensors_file.read(path)
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} holds no adapters, or those of another version: expected {FORMAT!r}")
    return arrays, metadata


def _check_adapters(path, arrays: dict, params) -> None:
    """Raise ValueError unless all arrays are pairs A, B beside kernels of `params`."""
    kernels = {"/".join(where[:-1]): x for where, x in flatten_dict(params).items() if where[-1] == "kernel"}
    for name in arrays:
        place, _, side = name.rpartition("/")
        if place not in kernels:
            layers = "stacked layers (scan=True)" if "blocks" in params else "one set a layer (scan=False)"
            raise ValueError(
                f"{path} has adapters of {place!r}, expected a kernel of the parameters, which have {layers}"
            )
        a, b = (arrays.get(f"{place}/{side}") for side in ("lora_a", "lora_b"))
        if side not in ("lora_a", "lora_b") or a is None or b is None:
            raise ValueError(f"{path} is damaged: {name}, expected lora_a and lora_b of {place}")
        *stacked, n_in, n_out = kernels[place].shape
        rank = a.shape[-1:]
        if (a.shape, b.shape) != ((*stacked, n_in, *rank), (*stacked, *rank, n_out)):
            raise ValueError(
                f"{path} is damaged: {place} has A {a.shape} and B {b.shape}, its kernel [{n_in}, {n_out}]"
            )


def export(workdir, destination) -> None:
    """Write what a run by "lora" or "state" has learned to one file: adapters, or a context for `generate`.

    A state goes to a destination in .pth in the released format, which `generate` and the released code read.

    Raises:
        ValueError: the run trained anything else, or a state that released files cannot hold.
    """
    path = files.user_path(destination)
    files.check_output(path)
    run = runs.read_run(workdir)
    if run.method == "full":
        raise ValueError(f"{workdir} is not a run by lora or state; rwkv_jax.load gives all that it has learned")
    if run.method == "lora" and path.suffix != ".safetensors":
        raise ValueError(f"{path}: adapters are written as .safetensors only, expected that suffix")
    model, params, f = run.model, run.base(), run.finetune
    method = Method(f["method"], f["rank"], f["alpha"], f["targets"])
    shapes = jax.eval_shape(lambda params: method.split(model, params, jax.random.key(0))[0], params)
    _, trained = checkpoint.restore(run.path / "checkpoints", shapes, key="params")
    if method.name == "lora":
        save_adapters(path, model, params, trained, method.alpha)
    elif path.suffix == ".pth":
        pth.write(path, states.to_time_state(trained))
    else:
        generate.save_context(path, tuned_context(model, params, trained), model, params)


def merge(base, adapters, destination) -> None:
    """Merge adapters into the weights at `base`, and write the result to another file, or a folder with the tokenizer
    of `base`."""
    path, format = interop.destination(destination)
    base = interop.locate(base)
    interop.check_format(path, format, runs.describe(base))
    stacked = any(name.startswith("blocks/") for name in _read_adapters(adapters)[0])
    model, params = runs.load(base, scan=stacked)
    merged = lora.merge(params, *load_adapters(adapters, model, params))
    tokenizer = tokenizers.known_for_model(base, model.vocab_size) if format == "huggingface" else None
    interop.save(path, model, merged, format, tokenizer=tokenizer)


@command.reported()
def main(argv=None) -> None:
    parser = command.Parser(
        prog=command.program("rwkv_jax.finetune"),
        description="Export and merge what fine-tuning by lora or state learned.",
    )
    commands = parser.add_subparsers(required=True)
    exports = commands.add_parser("export", help="a run's adapters, or its state as a context (.pth: as released)")
    exports.set_defaults(call=export)
    exports.add_argument("workdir")
    exports.add_argument("destination")
    merges = commands.add_parser("merge", help="merge adapters into weights")
    merges.set_defaults(call=merge)
    merges.add_argument("base", help="whatever rwkv_jax.load reads")
    merges.add_argument("adapters")
    merges.add_argument("destination", help="model.pth, model.safetensors or a folder")
    args = vars(parser.parse_args(argv))
    call = args.pop("call")
    call(**args)
    files.say_written(files.user_path(args["destination"]))


if __name__ == "__main__":
    command.end(main())

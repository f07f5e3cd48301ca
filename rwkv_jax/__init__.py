"""RWKV in JAX and Flax: table of contents.

Importing this module imports nothing else, not even jax; names are loaded on first use. Under `rwkv-jax` and
`python -m rwkv_jax.NAME` it also installs a handler of SIGINT, so that an interrupt of the imports ends with one line.

Dimension key, used in every array name of the project (`x_BTD` is [batch, time, width]):

    B batch    T time    L layers    D model width    H heads    K channels of a head
    F hidden width of channel mixing or of the MLP    S cache slots    C chunk    M chunks    R low-rank width
    V vocabulary; in `ops`, the value channels of a head    N any other count

Beside these, where they occur: D documents, in `evaluate`; L lanes and R recent tokens, in `generate`; G gates, in
`lstm`; P reads and Q writes, in `ops`.
"""

import importlib
import signal
import sys

__version__ = "0.1.0"

_CONTENTS = {
    "build": "models",  # a model by name: build("rwkv4", vocab_size=256, num_layers=6, dim=512)
    "stack": "models",  # parameters of one layer each -> stacked [L, ...]
    "unstack": "models",  # the inverse
    "load": "runs",  # (model, params) from any file or folder that holds them
    "save": "interop",  # the inverse
    "RWKVForCausalLM": "pretrained",  # model, parameters and tokenizer: generate, stream, read, logits, score, embed
    "stream": "generate",  # text that continues a prompt, in pieces as it is generated
    "log_likelihoods": "evaluate",  # nats of each token given those before it
}
_MODULES = (
    "checkpoint", "command", "data", "doctor", "evaluate", "files", "finetune", "generate", "hardware", "harness",
    "interop", "models", "ops", "pretrained", "runs", "train",
)  # fmt: skip

__all__ = ["RWKVForCausalLM", "build", "load", "log_likelihoods", "save", "stack", "stream", "unstack"]


def __getattr__(name):
    if name in _CONTENTS:
        return getattr(importlib.import_module(f"rwkv_jax.{_CONTENTS[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"rwkv_jax.{name}")
    raise AttributeError(f"module 'rwkv_jax' has no attribute {name!r}")


def __dir__():
    return sorted([*_CONTENTS, *_MODULES])


# While Python searches the module of `python -m NAME`, sys.argv[0] is "-m", and NAME precedes the command's arguments
# in sys.orig_argv. A signal that is ignored, as after nohup, stays ignored.
_runs_module = sys.argv[:1] == ["-m"] and sys.orig_argv[-len(sys.argv)].partition(".")[0] == "rwkv_jax"
_starts_command = _runs_module or "".join(sys.argv[:1]).rpartition("/")[2] == "rwkv-jax"
if _starts_command and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, importlib.import_module("rwkv_jax.command").end_while_importing)

"""One command with verbs: `rwkv-jax VERB ...`, which is `python -m rwkv_jax VERB ...`."""

import importlib
import signal
import sys
from typing import NoReturn

import rwkv_jax
from rwkv_jax import command

# The module whose `main` a verb runs, and what `--help` says of it.
VERBS = {
    "train": ("rwkv_jax.train.__main__", "train or fine-tune a model; the same command resumes"),
    "generate": ("rwkv_jax.generate.__main__", "continue a prompt, or chat"),
    "evaluate": ("rwkv_jax.evaluate", "bits per byte and perplexity of held-out text"),
    "convert": ("rwkv_jax.interop.__main__", "write a model in another file format"),
    "corpora": ("rwkv_jax.data.__main__", "tokenize a corpus and report its contents"),
    "finetune": ("rwkv_jax.finetune", "export or merge what a fine-tuning run has learned"),
    "harness": ("rwkv_jax.harness.__main__", "run tasks of lm-evaluation-harness"),
    "launch": ("rwkv_jax.train.launch", "train in several processes of this machine"),
    "doctor": ("rwkv_jax.doctor", "report versions, devices and caches, and run a tiny model"),
}


@command.reported()
def main(argv=None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = command.Parser(
        prog=command.SCRIPT,
        description="RWKV in JAX and Flax.",
        epilog=f"{command.SCRIPT} VERB --help lists the options of a verb.",
    )
    parser.add_argument("--version", action="version", version=f"{command.SCRIPT} {rwkv_jax.__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for verb, (_, does) in VERBS.items():
        verbs.add_parser(verb, help=does, add_help=False)
    module, _ = VERBS[parser.parse_args(argv[:1]).verb]
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, command.end_while_importing)  # until the verb's own main begins
    return importlib.import_module(module).main(argv[1:])


def script() -> NoReturn:
    """Run the script `rwkv-jax`, with the exit codes of `python -m rwkv_jax`."""
    command.end(main())


if __name__ == "__main__":
    command.end(main())

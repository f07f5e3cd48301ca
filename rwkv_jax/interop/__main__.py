"""Convert a model: `python -m rwkv_jax.interop SOURCE DESTINATION`."""

import argparse
import sys

from rwkv_jax import command, runs
from rwkv_jax.data import tokenizers
from rwkv_jax.interop import FORMATS, check_format, destination, locate, save


@command.reported(out_of_memory="--dtype=bfloat16 needs half of float32")
def main(argv=None) -> None:
    parser = argparse.ArgumentParser(prog=command.program("rwkv_jax.interop"), description="Convert a model.")
    parser.add_argument("source", help="whatever holds a model: a file, a folder, a training workdir, a hub name")
    parser.add_argument("destination", help="a .pth or .safetensors; without a suffix, a folder for transformers")
    parser.add_argument("--dtype", help="of the parameters, e.g. bfloat16; by default that of the source")
    parser.add_argument("--format", choices=FORMATS, help="if not what the suffix says; rwkv.cpp must be named")
    args = parser.parse_args(argv)
    path, format = destination(args.destination, args.format)
    source = locate(args.source)
    check_format(path, format, runs.describe(source))
    model, params = runs.load(source, dtype=args.dtype)
    save(path, model, params, format)
    if path.is_dir():
        _carry_tokenizer(source, path, model.vocab_size)


def _carry_tokenizer(source, folder, vocab_size):
    """Save the source's tokenizer beside the weights, or report on stderr that it is unknown."""
    try:
        tokenizer = tokenizers.get_tokenizer(tokenizers.of_model(source, vocab_size))
    except (ValueError, OSError) as error:
        print(f"without a tokenizer: {error}", file=sys.stderr)
    else:
        tokenizers.save(tokenizer, folder)


if __name__ == "__main__":
    command.end(main())

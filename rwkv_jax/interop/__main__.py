"""Convert a model: `python -m rwkv_jax.interop SOURCE DESTINATION`."""

import argparse
import sys

from rwkv_jax.interop import FORMATS, load, save


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m rwkv_jax.interop", description="Convert a model.")
    parser.add_argument("source", help="whatever holds a model: a file, a folder, a training workdir, a hub name")
    parser.add_argument("destination", help="a .pth or .safetensors; without a suffix, a folder for transformers")
    parser.add_argument("--dtype", help="of the parameters, e.g. bfloat16; by default that of the source")
    parser.add_argument("--format", choices=FORMATS, help="if not what the suffix says; rwkv.cpp must be named")
    args = parser.parse_args(argv)
    try:
        model, params = load(args.source, dtype=args.dtype)
        save(args.destination, model, params, format=args.format)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

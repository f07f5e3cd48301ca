"""Convert a model: `python -m rwkv_jax.interop SOURCE DESTINATION`."""

import argparse
import sys

from rwkv_jax.interop import load, save


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m rwkv_jax.interop", description="Convert a model.")
    parser.add_argument("source", help="an official .pth or a training workdir")
    parser.add_argument("destination", help="a file to write; its suffix (.pth) is the format")
    parser.add_argument("--dtype", help="of the parameters, e.g. bfloat16; by default that of the source")
    args = parser.parse_args(argv)
    try:
        model, params = load(args.source, dtype=args.dtype)
        save(args.destination, model, params)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

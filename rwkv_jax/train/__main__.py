"""python -m rwkv_jax.train --config=configs/tiny.py --workdir=runs/tiny [--config.optim.lr=6e-4 ...]"""

import argparse
import sys

from rwkv_jax import run_config
from rwkv_jax.train.loop import run


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m rwkv_jax.train",
        description="Train a model; the same command resumes.",
        allow_abbrev=False,
        epilog="--config.FIELD=VALUE sets any field of the config, for instance --config.optim.lr=6e-4",
    )
    parser.add_argument("--config", metavar="FILE.py[:ARG]", required=True)
    parser.add_argument("--workdir", required=True)
    args, overrides = parser.parse_known_args(argv)
    try:
        run(run_config.read(args.config, overrides), args.workdir)
    except KeyboardInterrupt:
        print("stopped; what was saved before stays", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""python -m rwkv_jax.train --config=configs/tiny.py --workdir=runs/tiny [--config.optim.lr=6e-4 ...]"""

import sys

import jax

from rwkv_jax import command
from rwkv_jax.train import hosts, run_config
from rwkv_jax.train.divergence import DivergedError
from rwkv_jax.train.loop import run
from rwkv_jax.train.rehearse import rehearse, table


@command.reported(
    interrupted="stopped; earlier checkpoints are kept",
    out_of_memory="raise --config.accumulation, or lower --config.batch_size, --config.seq_len or --config.model.dim",
)
def main(argv=None) -> int:
    parser = command.Parser(
        prog=command.program("rwkv_jax.train"),
        description="Train a model; the same command resumes.",
        allow_abbrev=False,
        epilog="--config.FIELD=VALUE sets any field of the config, for instance --config.optim.lr=6e-4",
    )
    parser.add_argument("--config", metavar="FILE.py[:ARG]", required=True)
    parser.add_argument("--workdir", help="folder of the run: config, log, checkpoints; hosts share it")
    parser.add_argument("--profile", metavar="FIRST:END", help="trace steps FIRST to END - 1 to WORKDIR/profile")
    parser.add_argument("--rehearse", metavar="SLICE", help="only compile a step, for v5e:4x4, v5p:4x4x8, 2xv6e:16x16")
    several = parser.add_argument_group("several hosts, the same command on each")
    several.add_argument("--distributed", action="store_true", help="detect the cluster: TPU pod, SLURM, Open MPI")
    several.add_argument("--coordinator", metavar="ADDRESS:PORT", help="of host 0; with the next two, explicitly")
    several.add_argument("--num_hosts", type=int, metavar="N")
    several.add_argument("--host", type=int, metavar="I", help="this one, 0 to N - 1")
    args, overrides = parser.parse_known_args(argv)
    if args.rehearse is not None:
        jax.config.update("jax_platforms", "cpu")  # the compiler needs no TPU
        row = rehearse(run_config.read(args.config, overrides), args.rehearse)
        print(table(row))
        return 0 if row["fits"] else 1
    if args.workdir is None:
        parser.error("expected --workdir, or --rehearse")
    return _train(args, overrides)


def _train(args, overrides) -> int:
    profile = _steps(args.profile)
    try:
        hosts.join(args.distributed, args.coordinator, args.num_hosts, args.host)
        with hosts.together():
            config = run_config.read(args.config, overrides)
        run(config, args.workdir, profile)
    except (hosts.SharedError, DivergedError) as error:  # raised on all hosts at the same step: they end together
        speaker = error.host if isinstance(error, hosts.SharedError) else 0
        if jax.process_index() == speaker:  # before any host ends, because a launcher then kills the others
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        jax.distributed.shutdown()
        return 2
    except jax.errors.JaxRuntimeError as error:
        if not jax.distributed.is_initialized() or command.is_out_of_memory(error):
            raise
        what = f"error: {str(error).splitlines()[0]}; if another host ended first, its output says why"
        print(f"{what}; the same command resumes", file=sys.stderr)
        return 1
    return 0


def _steps(text) -> range | None:
    if text is None:
        return None
    first, _, end = text.partition(":")
    if not (first.isdecimal() and end.isdecimal() and 1 <= int(first) < int(end)):
        raise ValueError(f"--profile is {text!r}, expected FIRST:END such as 10:13")
    return range(int(first), int(end))


if __name__ == "__main__":
    command.end(main())

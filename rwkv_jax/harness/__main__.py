"""lm-evaluation-harness on a model of ours: `python -m rwkv_jax.harness --model=runs/tiny --tasks=lambada_openai`."""

import json
import sys

from rwkv_jax import command, files


@command.reported(out_of_memory="lower --batch_size or --max_length")
def main(argv=None) -> None:
    parser = command.Parser(
        prog=command.program("rwkv_jax.harness"),
        description="Run tasks of lm-evaluation-harness. Other arguments are passed to `lm_eval run` unchanged: "
        "--tasks, --num_fewshot, --limit, --include_path, --use_cache, ...",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model", required=True, help="whatever rwkv_jax.load reads")
    add("--tokenizer", help="'bytes', 'world' or a tokenizer.json; default: the model's own")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="default: the file's")
    add("--batch_size", type=int, default=8, help="texts at a time (default: %(default)s)")
    add("--max_length", type=int, help="tokens read of a text, the last ones; default for RWKV: all")
    add(
        "--add_bos_token",
        action="store_true",
        default=None,
        help="token 0 before every context, as the RWKV releases were evaluated",
    )
    add("--prefix_token_id", type=int, help="another token in its place, such as 187, the line break of GPT-NeoX")
    add("--output_path", "-o", help="folder or .json of lm_eval's results")
    args, rest = parser.parse_known_args(argv)
    args = vars(args)
    batch_size, output = args.pop("batch_size"), args.pop("output_path")
    if output is not None:  # lm_eval would fail after all tasks only, and with exit code 0
        output = files.user_path(output)
        files.check_output_folder(output.parent if output.suffix == ".json" else output)
        rest.append(f"--output_path={output}")
    model = {"pretrained": args.pop("model")} | {name: value for name, value in args.items() if value is not None}
    try:
        from lm_eval.__main__ import cli_evaluate

        from rwkv_jax.harness.adapter import NAME
    except ImportError as error:
        raise ValueError(f'{error}; pip install "rwkv_jax[harness]"') from error
    rest = [_with_home(argument) for argument in rest]
    ours = [f"--model={NAME}", "--model_args", json.dumps(model), f"--batch_size={batch_size}"]
    before, sys.argv = sys.argv, ["lm_eval", "run", *ours, *rest]
    try:
        cli_evaluate()
    finally:
        sys.argv = before


def _with_home(argument: str) -> str:
    """Expand ~ in `--output_path=~/results`, as a shell does in `--output_path ~/results`."""
    name, equals, value = argument.partition("=")
    return f"{name}={files.user_path(value)}" if equals and value.startswith("~") else argument


if __name__ == "__main__":
    command.end(main())

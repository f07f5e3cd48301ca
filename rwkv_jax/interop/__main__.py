"""Convert a model: `python -m rwkv_jax.interop SOURCE DESTINATION`."""

from rwkv_jax import command, files, runs
from rwkv_jax.data import tokenizers
from rwkv_jax.interop import FORMATS, check_format, destination, locate, save


@command.reported(out_of_memory="--dtype=bfloat16 needs half of float32")
def main(argv=None) -> None:
    parser = command.Parser(prog=command.program("rwkv_jax.interop"), description="Convert a model.")
    parser.add_argument("source", help="file, folder, training workdir or hub name of a model")
    parser.add_argument("destination", help="a .pth or .safetensors; without a suffix, a folder for transformers")
    parser.add_argument("--dtype", help="of the parameters, e.g. bfloat16; by default that of the source")
    parser.add_argument("--format", choices=FORMATS, help="default: by the suffix; rwkv.cpp must be given")
    args = parser.parse_args(argv)
    path, format = destination(args.destination, args.format)
    source = locate(args.source)
    check_format(path, format, runs.describe(source))
    model, params, training = runs.load_with_training(source, dtype=args.dtype)
    tokenizer = tokenizers.known_for_model(source, model.vocab_size) if format == "huggingface" else None
    save(path, model, params, format, training=training, tokenizer=tokenizer)
    files.say_written(path)


if __name__ == "__main__":
    command.end(main())

"""Continue a prompt: `python -m rwkv_jax.generate --model=runs/tiny --prompt="def main("`."""

import argparse
import os
import sys

from rwkv_jax import interop, tokenizers
from rwkv_jax.generate import stream


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m rwkv_jax.generate", description="Continue a prompt; only the continuation is printed."
    )
    parser.add_argument("--model", required=True, help="a training workdir or an official .pth")
    parser.add_argument("--prompt", required=True, help="text to continue; empty: the beginning of a document")
    parser.add_argument("--tokenizer", help="'bytes', 'world' or a tokenizer.json; default: what the model carries")
    parser.add_argument("--max_new_tokens", type=int, default=100, help="default: %(default)s")
    parser.add_argument("--temperature", type=float, default=1.0, help="0: always the likeliest token")
    parser.add_argument("--top_p", type=float, default=1.0, help="keep the likeliest tokens of this probability")
    parser.add_argument("--seed", type=int, default=0)
    args = vars(parser.parse_args(argv))
    path, prompt, tokenizer = args.pop("model"), args.pop("prompt"), args.pop("tokenizer")
    try:
        model, params = interop.load(path, scan=False)
        tokenizer = tokenizers.get_tokenizer(tokenizer or tokenizers.of_model(path, model.vocab_size))
        for text in stream(model, params, prompt, tokenizer, **args):
            print(text, end="", flush=True)
        print()
    except KeyboardInterrupt:
        print()
        return 130
    except BrokenPipeError:  # the reader has seen enough; what is left to flush goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

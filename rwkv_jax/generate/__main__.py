"""Continue a prompt: `python -m rwkv_jax.generate --model=runs/tiny --prompt="def main("`."""

import sys

from rwkv_jax import command, files, interop, runs
from rwkv_jax.data import tokenizers
from rwkv_jax.generate import load_context, save_context, stream
from rwkv_jax.generate.chat import TEMPLATES, Conversation, chat, default_template
from rwkv_jax.generate.text import check_tokenizer


@command.reported(out_of_memory="convert the model to bfloat16 with python -m rwkv_jax.interop")
def main(argv=None) -> int:
    args = vars(_parser().parse_args(argv))
    return (_talk if args.pop("chat") else _continue)(**args)


def _talk(model, tokenizer, prompt, prompt_file, context, save_context_to, stop, template, seed, **settings) -> int:
    """Run a chat, which resumes the conversation of the context if one is given."""
    for name, given in (("prompt", prompt), ("prompt_file", prompt_file), ("save_context", save_context_to)):
        if given is not None:
            raise ValueError(f"--{name} with --chat, expected one or the other")
    if stop:
        raise ValueError("--stop with --chat, where a reply ends with its paragraph")
    model, params, tokenizer = _load(model, tokenizer)
    conversation = Conversation()
    if context is not None:
        context, text = load_context(context, model, params)
        conversation = Conversation(text or "", context)
    template = TEMPLATES[template or default_template(model)]
    chat(model, params, tokenizer, template, conversation, seed, **settings)
    return 0


def _load(name, tokenizer):
    path = interop.locate(name)
    model, params = runs.load(path, scan=False)
    tokenizer = tokenizers.for_model(path, model.vocab_size, tokenizer)
    check_tokenizer(tokenizer, model)
    tokenizers.warn_if_small(tokenizer.name, tokenizer.vocab_size, model.vocab_size)
    return model, params, tokenizer


def _continue(model, tokenizer, prompt, prompt_file, context, save_context_to, template, **settings) -> int:
    """Print the continuation of the prompt, and save the context even if printing is interrupted."""
    if template is not None:
        raise ValueError("--template is for --chat")
    prompt = _text(prompt, prompt_file, context)
    if save_context_to is not None:
        files.check_output(files.user_path(save_context_to))
    model, params, tokenizer = _load(model, tokenizer)
    before = ""
    if context is not None:
        context, before = load_context(context, model, params)
    texts = stream(model, params, prompt, tokenizer, context=context, **settings)
    try:
        for text in texts:
            print(text, end="", flush=True)
        print()
    except KeyboardInterrupt:  # the text so far is the only output
        print()
        return 130
    finally:
        if save_context_to is not None:
            # unknown if the loaded context was saved without its text
            text = None if before is None else before + prompt + tokenizer.decode(texts.tokens)
            save_context(save_context_to, texts.context, model, params, text)
    return 0


def _text(prompt, prompt_file, context) -> str:
    if prompt is None and prompt_file is None:
        if context is None:
            raise ValueError("expected --prompt, --prompt_file, --context or --chat")
        return ""
    if prompt is not None and prompt != "-":
        return prompt
    if prompt == "-":
        source, raw = "stdin", sys.stdin.buffer.read()
    else:
        source, raw = prompt_file, files.user_path(prompt_file).read_bytes()
    try:
        return raw.decode("utf-8-sig")  # without the byte order mark that editors prepend
    except UnicodeDecodeError as error:
        raise ValueError(f"{source}: expected UTF-8, {error}") from None


def _parser():
    parser = command.Parser(
        prog=command.program("rwkv_jax.generate"), description="Continue a prompt; only the continuation is printed."
    )
    add = parser.add_argument
    add("--model", required=True, help="a path or hub name that rwkv_jax.load reads")
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--prompt",
        type=command.unescaped,
        help=r"text to continue, \n, \t and \\ being one character each; -: standard input; empty: the beginning of a "
        "document",
    )
    source.add_argument("--prompt_file", help="a file with the text to continue")
    add("--chat", action="store_true", help="several turns on standard input, over one recurrent state")
    add("--template", choices=list(TEMPLATES), help="names of the speakers; default: by the model")
    add("--tokenizer", help="'bytes', 'world' or a tokenizer.json; default: the model's own")
    add("--context", help="a saved context, a chat or a tuned .pth to continue")
    add("--save_context", dest="save_context_to", help="file for the context after the continuation, with the text")
    add("--max_new_tokens", type=int, default=100, help="default: %(default)s")
    add(
        "--stop",
        type=command.unescaped,
        action="append",
        default=[],
        help=r"text that ends the continuation, \n, \t and \\ as in --prompt; may be given several times",
    )
    add("--seed", type=int, default=0, help="of the random draws; default: %(default)s")
    add("--temperature", type=float, default=1.0, help="0: always the likeliest token")
    add("--top_p", type=float, default=1.0, help="keep the likeliest tokens that together have this probability")
    add("--top_k", type=int, help="keep this many of the likeliest tokens")
    add("--min_p", type=float, help="keep tokens at least this many times as probable as the likeliest")
    add("--typical_p", type=float, help="as --top_p, but those first whose surprise is nearest to the entropy")
    add("--repetition_penalty", type=float, help="divides the logits of tokens in prompt and continuation; 1: off")
    add("--presence_penalty", type=float, help="subtracted from the logits of tokens in the continuation")
    add("--frequency_penalty", type=float, help="the same, once for each occurrence")
    add("--penalty_decay", type=float, default=1.0, help="factor on their counts at each token; default: %(default)s")
    return parser


if __name__ == "__main__":
    command.end(main())

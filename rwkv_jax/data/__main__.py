"""python -m rwkv_jax.data SOURCE [--tokenizer=world] [--write=PREFIX]: report the contents of a corpus."""

import hashlib
from functools import partial

import numpy as np

from rwkv_jax import command
from rwkv_jax.data import Corpus, Split, prepare, to_megatron
from rwkv_jax.data.corpus import SEPARATOR, SPLITS
from rwkv_jax.files import to_json


@command.reported()
def main(argv=None) -> None:
    parser = command.Parser(
        prog=command.program("rwkv_jax.data"),
        description="Tokenize a corpus, unless the cache holds it, and report for each split the tokens, documents, "
        "bytes per token, and copies of earlier documents, in the order train, valid, test.",
        epilog=r"\n, \t and \\ in --text and --prompt are a line break, a tab and a backslash.",
        allow_abbrev=False,
    )
    parser.add_argument("source", help="stdlib, a public corpus such as enwik8, or the path of text or tokens")
    parser.add_argument("--tokenizer", default="bytes", help="bytes, characters, world or a file (%(default)s)")
    template = partial(parser.add_argument, type=command.unescaped)
    template("--text", default="text", help="for JSONL: field or template of the text (%(default)s)")
    template("--prompt", default="", help="for JSONL: field or template of the prompt, which is not a target")
    parser.add_argument("--write", metavar="PREFIX", help="write the documents to PREFIX.bin and PREFIX.idx instead")
    parser.add_argument("--json", action="store_true", help="print one JSON object in one line")
    args = parser.parse_args(argv)
    if args.write and args.prompt:
        raise ValueError("--write with --prompt: Megatron files cannot mark tokens of a prompt")
    if args.write and args.json:
        raise ValueError("--write with --json, which reports the contents of a corpus: expected one or the other")
    if args.write:
        num_documents = to_megatron(args.source, args.tokenizer, args.write, args.text)
        print(f"{num_documents:,} documents written to {args.write}.bin and {args.write}.idx")
        return
    found = report(prepare(args.source, args.tokenizer, args.text, args.prompt))
    print(to_json(found) if args.json else _table(found))


def report(corpus: Corpus) -> dict:
    """Return name, tokenizer, vocabulary size and digest, and the counts of each split, as JSON values."""
    seen = set()
    about = {"name": corpus.name, "tokenizer": corpus.tokenizer, "vocab_size": corpus.vocab_size}
    return about | {"sha256": corpus.sha256} | {name: _counts(getattr(corpus, name), seen) for name in SPLITS}


def _counts(split: Split, seen: set[bytes]) -> dict:
    """Return the counts of a split, and add the digests of its documents to `seen`."""
    num_text = len(split.tokens) - int(np.sum(split.tokens[split.starts] == SEPARATOR))
    known = len(seen)
    for begin, end in zip(split.starts, [*split.starts[1:], len(split.tokens)], strict=True):
        seen.add(hashlib.sha256(split.tokens[begin:end]).digest())
    return {
        "tokens": len(split.tokens),
        "documents": len(split.starts),
        "bytes": split.num_bytes,
        "bytes_per_token": split.num_bytes / num_text if split.num_bytes and num_text else None,
        "predicted": len(split.tokens) if split.mask is None else int(np.count_nonzero(split.mask)),
        "copies": known + len(split.starts) - len(seen),
    }


def _table(found: dict) -> str:
    about = "{name}: tokenizer {tokenizer}, vocabulary of {vocab_size:,}, SHA-256 {sha256:.16}".format(**found)
    lines = [about, f"{'':<6}{'tokens':>16}{'documents':>12}{'bytes/token':>13}{'copies':>9}"]
    for name in SPLITS:
        row = found[name]
        rate = "-" if row["bytes_per_token"] is None else f"{row['bytes_per_token']:.3f}"
        part = "" if row["predicted"] == row["tokens"] else f"   {row['predicted']:,} to be predicted"
        lines.append(f"{name:<6}{row['tokens']:>16,}{row['documents']:>12,}{rate:>13}{row['copies']:>9,}{part}")
    return "\n".join(lines)


if __name__ == "__main__":
    command.end(main())

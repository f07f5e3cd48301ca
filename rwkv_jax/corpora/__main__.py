"""python -m rwkv_jax.corpora SOURCE [--tokenizer=world] [--write=PREFIX]: what a corpus holds."""

import argparse
import json
import os
import sys

from rwkv_jax import command
from rwkv_jax.corpora import build, report


@command.reported()
def main(argv=None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m rwkv_jax.corpora",
        description="Make the tokens of a corpus, where the cache lacks them, and tell what they are: by split, "
        "tokens, documents, bytes a token, and documents that repeat earlier ones, train first.",
        allow_abbrev=False,
    )
    parser.add_argument("source", help="stdlib, a public corpus such as enwik8, or the path of text or tokens")
    parser.add_argument("--tokenizer", default="bytes", help="bytes, characters, world or a file (%(default)s)")
    parser.add_argument("--text", default="text", help="of JSONL: field or template (%(default)s)")
    parser.add_argument("--prompt", default="", help="of JSONL: field or template of what is not to be predicted")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="that make tokens (%(default)s)")
    parser.add_argument("--write", metavar="PREFIX", help="write the documents to PREFIX.bin and PREFIX.idx instead")
    parser.add_argument("--json", action="store_true", help="print one JSON object in one line")
    args = parser.parse_args(argv)
    if args.processes < 1:
        raise ValueError(f"processes is {args.processes}, expected at least 1")
    if args.write and args.prompt:
        raise ValueError("--write with --prompt: Megatron files have no place for what is not to be predicted")
    if args.write:
        shape = (args.source, args.tokenizer, args.write, args.text)
        num_documents = build.to_megatron(*shape, processes=args.processes)
        print(f"{num_documents:,} documents written to {args.write}.bin and {args.write}.idx")
        return
    corpus = build.prepare(args.source, args.tokenizer, args.text, args.prompt, processes=args.processes)
    found = report.report(corpus)
    print(json.dumps(found) if args.json else report.readable(found))


if __name__ == "__main__":
    sys.exit(main())

"""Small corpora on disk, and the documents in the splits that `prepare` makes of them."""

import gzip
import json

import numpy as np
import tokenizers

from rwkv_jax.data import SEPARATOR


def prose(seed, lines=30):
    """Text without repeated lines."""
    letters = np.array(list("abcdefghijklmnopqrstuvwxyzäé€😀   "))
    return "\n".join("".join(row) for row in np.random.default_rng(seed).choice(letters, (lines, 40)))


def words(seed, number=200):
    letters = np.random.default_rng(seed).choice(list("abcdefgh"), (number, 5))
    return " ".join("".join(word) for word in letters)


def folder_of(path, texts):
    for name, text in texts.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def write_jsonl(path, records):
    path.parent.mkdir(exist_ok=True)
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    path.write_bytes(gzip.compress(lines.encode()) if path.suffix == ".gz" else lines.encode())
    return str(path)


def splits_of(corpus):
    return corpus.train, corpus.valid, corpus.test


def parts(split):
    """Bytes of each document of a split of bytes, without its separator."""
    cut = np.split(split.tokens.astype(np.uint8), split.starts[1:])
    return [bytes(part[1:] if part[0] == SEPARATOR else part) for part in cut]


def documents(split):
    """{name: bytes} of a split whose documents have names, each of which begins with a separator."""
    assert (split.tokens[split.starts] == SEPARATOR).all()
    texts = parts(split)
    assert sum(map(len, texts)) == split.num_bytes == len(split.tokens) - len(split.starts)
    return dict(zip(split.names, texts, strict=True))


def byte_level(path, text, vocab_size=300):
    """Path of a byte-level BPE tokenizer that is trained on `text`, with the two special tokens of NeoX."""
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>", "<|padding|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator([text] * 10, trainer)
    path.parent.mkdir(parents=True, exist_ok=True)
    library.save(str(path))
    return str(path)

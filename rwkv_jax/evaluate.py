"""Evaluation of a model on text: nats of every token given those before it.

    python -m rwkv_jax.evaluate --model=runs/tiny --data=held_out.txt

One primitive, `log_likelihoods`, and two protocols that apply it to a stream of tokens:

    windows         disjoint windows of the training length from an empty state: the same for every model
    best_practice   `carried`: whole documents through a recurrent state; or, with attention, `sliding`: windows half
                    a length apart, scored in their second half

A protocol returns the negative log-likelihood of each token, float32 nats [N] aligned with the stream, so that models
can be compared token by token. Entry 0 is NaN because nothing precedes it; no other is, unless the model's output is.
"""

import heapq
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import multihost_utils
from tqdm import tqdm

from rwkv_jax import command, data, files, interop, runs
from rwkv_jax.data import contents, tokenfiles, tokenizers

POSITIONS = 128  # logits [B, POSITIONS, V] are in memory at one time
SEGMENTS = (4, 32, 128, 512)  # lengths that `continuations` reads at one time: few, because each is compiled


def log_likelihoods(model, params, tokens_BT, state=None, *, reset_BT=None, valid_BT=None):
    """Return log p(tokens[:, t + 1] | tokens[:, : t + 1]) for every t, [B, T - 1], and the state after the last input.

    The inputs are the first T - 1 tokens; the last is only predicted, and begins the next call if the text continues.
    Masks and result are aligned with the inputs: entry t of the result is about the token after input t.

    Args:
        tokens_BT: ids in [0, V), T >= 2.
        state: before the first input; None: the empty state.
        reset_BT: [B, T - 1] True where a document starts: the state is reset before it.
        valid_BT: [B, T - 1] False where the input is padding. The result has no meaning there.

    Returns:
        log p in nats, float32 (float64 from a float64 model), and the state. The caller compiles this function.
    """
    log_p_BT, _, state = judged(model, params, tokens_BT, state, reset_BT=reset_BT, valid_BT=valid_BT)
    return log_p_BT, state


def judged(model, params, tokens_BT, state=None, *, reset_BT=None, valid_BT=None):
    """Return (log p, whether each token was the likeliest [B, T - 1], state), log p and state as `log_likelihoods`."""
    tokens_BT = tokens_BT.astype(jnp.int32)
    x_BTD, state = model.apply(
        {"params": params}, tokens_BT[:, :-1], state, reset_BT=reset_BT, valid_BT=valid_BT, method="hidden"
    )

    def score(x_and_target):
        x_BD, target_B = x_and_target
        log_p_BV = jax.nn.log_softmax(model.apply({"params": params}, x_BD, method="logits"))
        return jnp.take_along_axis(log_p_BV, target_B[:, None], axis=-1)[:, 0], log_p_BV.argmax(axis=-1) == target_B

    by_time = (x_BTD.swapaxes(0, 1), tokens_BT[:, 1:].T)
    log_p_TB, likeliest_TB = lax.map(score, by_time, batch_size=POSITIONS)
    return log_p_TB.T, likeliest_TB.T, state


_log_likelihoods = jax.jit(log_likelihoods, static_argnums=0)
_judged = jax.jit(judged, static_argnums=0)
_log_softmax = jax.jit(jax.nn.log_softmax)


def continuations(model, params, texts, logits_BV, state) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return, for each of B texts, (log p of every token given all before it, whether it is the likeliest), each [N].

    log p is in float32 nats, and its sum is the text's. At most 512 tokens are read at a time: memory does not grow
    with the length of the texts.

    Args:
        texts: B lists of ids in [0, V), of any lengths.
        logits_BV, state: those before the texts, with room in caches. Neither is changed.
    """
    lengths_B = np.array([len(text) for text in texts])
    if lengths_B.min() == 0:
        raise ValueError("nothing to score in an empty text, expected at least one token")
    longest = int(lengths_B.max())
    num_inputs = longest - 1  # the last token is only predicted
    segment = next((length for length in SEGMENTS if num_inputs <= length), SEGMENTS[-1])
    tokens_BN = np.zeros((len(texts), -(-num_inputs // segment) * segment + 1), np.int32)
    for row, text in zip(tokens_BN, texts, strict=True):
        row[: len(text)] = text
    first_B1 = tokens_BN[:, :1]
    log_p_BV = np.asarray(_log_softmax(logits_BV))
    log_p = [np.take_along_axis(log_p_BV, first_B1, axis=-1)]
    likeliest = [log_p_BV.argmax(axis=-1)[:, None] == first_B1]
    for first in range(0, num_inputs, segment):
        valid_BT = first + np.arange(segment) < lengths_B[:, None] - 1
        tokens_BT = tokens_BN[:, first : first + segment + 1]
        log_p_BT, likeliest_BT, state = _judged(model, params, tokens_BT, state, valid_BT=valid_BT)
        log_p.append(np.asarray(log_p_BT))
        likeliest.append(np.asarray(likeliest_BT))
    joined = zip(np.concatenate(log_p, axis=1), np.concatenate(likeliest, axis=1), lengths_B, strict=True)
    return [(row[:length], flags[:length]) for row, flags, length in joined]


def windows(model, params, tokens, seq_len: int, batch_size: int, state=None) -> np.ndarray:
    """Nats of each token [N], from disjoint windows of `seq_len` inputs, each from an empty state.

    Documents are ignored, as in training: a window may hold the end of one and the beginning of the next.
    `state`, leaves [batch_size, ...], replaces the empty state before every window: a tuned initial state.
    """
    _check(model, tokens, None, seq_len, batch_size)

    def batches():
        window_BT = np.arange(batch_size)[:, None] * seq_len + np.arange(seq_len)
        for begin in range(0, len(tokens) - 1, batch_size * seq_len):
            yield begin + window_BT, begin + window_BT < len(tokens) - 1, None

    return _nats(model, params, tokens, batches(), state, "windows")


def sliding(model, params, tokens, starts, seq_len: int, batch_size: int) -> np.ndarray:
    """Nats of each token [N], from windows that begin half of `seq_len` apart.

    The second half of each window is scored; of the first window, both halves are.
    Each token is predicted from at least half a window, or from all of its document, which begins at one of `starts`.
    """
    _check(model, tokens, starts, seq_len, batch_size)
    stride, num_inputs = (seq_len + 1) // 2, len(tokens) - 1
    num_windows = 1 + max(0, -(-(num_inputs - seq_len) // stride))

    def batches():
        for first in range(0, num_windows, batch_size):
            window_B1 = first + np.arange(batch_size)[:, None]
            at_BT = window_B1 * stride + np.arange(seq_len)
            counts_BT = (window_B1 == 0) | (np.arange(seq_len) >= seq_len - stride)
            yield at_BT, counts_BT & (at_BT < num_inputs), np.isin(at_BT, starts)

    return _nats(model, params, tokens, batches(), None, "sliding")


def carried(model, params, tokens, starts, seq_len: int, batch_size: int) -> np.ndarray:
    """Nats of each token [N], each predicted from all of its document, which begins at one of `starts`.

    Documents share `batch_size` rows (fewer, if there are fewer documents). The model reads them in segments of
    `seq_len` tokens and carries the state over. Raises ValueError for a model with attention.
    """
    _check(model, tokens, starts, seq_len, batch_size)
    if not model.recurrent:
        raise ValueError(f"layers are {model.layers}, expected none whose state grows with the text")
    starts, lengths = np.asarray(starts), np.diff(starts, append=len(tokens))
    rows = [(starts[documents], lengths[documents]) for documents in _balanced(lengths, min(batch_size, len(starts)))]

    def batches():
        for begin in range(0, max(row_lengths.sum() for _, row_lengths in rows), seq_len):
            at_BT = np.stack([_at(*row, begin + np.arange(seq_len)) for row in rows])
            counts_BT = (at_BT >= 0) & (at_BT < len(tokens) - 1)
            # Padding reads token 0 of the stream, a separator, which the last token of every document predicts.
            at_BT = np.maximum(at_BT, 0)
            yield at_BT, counts_BT, np.isin(at_BT, starts)

    return _nats(model, params, tokens, batches(), model.init_state(len(rows)), "carried", hand_on=True)


def best_practice(model, params, tokens, starts, seq_len: int, batch_size: int) -> np.ndarray:
    """Nats of each token [N] as the model predicts them best: `carried` without attention, else `sliding`."""
    protocol = carried if model.recurrent else sliding
    return protocol(model, params, tokens, starts, seq_len, batch_size)


def _check(model, tokens, starts, seq_len, batch_size):
    if not 1 <= min(seq_len, batch_size) <= max(seq_len, batch_size) < 2**31:
        raise ValueError(f"seq_len is {seq_len} and batch_size {batch_size}, expected at least 1, and below 2^31")
    if len(tokens) < 2:
        raise ValueError(f"nothing to predict in {len(tokens)} tokens, expected at least 2")
    if (largest := int(np.max(tokens))) >= model.vocab_size:
        raise ValueError(f"token {largest} is outside the model's vocabulary of {model.vocab_size}")
    if starts is not None and (len(starts) == 0 or starts[0] != 0 or np.any(tokens[starts] != data.SEPARATOR)):
        raise ValueError(f"expected token {data.SEPARATOR} at every start of a document, the first at 0")


def _nats(model, params, tokens, batches, state, name, hand_on=False) -> np.ndarray:
    """Score batches of (indices of the inputs in the stream [B, T], which of them count, where documents start).

    Each batch starts from `state`; with `hand_on`, from the state after the batch before it.
    """
    last = len(tokens) - 1
    nats_N = np.full(len(tokens), np.nan, np.float32)
    with tqdm(desc=name, total=last, unit="token", unit_scale=True, leave=False, disable=None) as bar:
        for at_BT, counts_BT, reset_BT in batches:
            read_BT = np.concatenate([at_BT, at_BT[:, -1:] + 1], axis=1)
            tokens_BT = tokens[np.minimum(read_BT, last)].astype(np.int32)
            loglik_BT, new = _log_likelihoods(model, params, tokens_BT, state, reset_BT=reset_BT)
            state = new if hand_on else state
            if not loglik_BT.is_fully_addressable:
                loglik_BT = multihost_utils.process_allgather(loglik_BT, tiled=True)
            nats_N[at_BT[counts_BT] + 1] = -np.asarray(loglik_BT)[counts_BT]
            bar.update(int(counts_BT.sum()))
    return nats_N


def _balanced(lengths, num_rows: int) -> list[list[int]]:
    """Distribute documents over rows, the longest first, each to the row with the fewest tokens so far."""
    rows = [(0, row, []) for row in range(num_rows)]
    for document in np.argsort(-lengths, kind="stable"):
        filled, row, documents = rows[0]
        documents.append(document)
        heapq.heapreplace(rows, (filled + int(lengths[document]), row, documents))
    return [documents for _, _, documents in rows]


def _at(starts, lengths, positions):
    """Return the stream indices of positions in a row of these documents, concatenated; -1 past its end."""
    ends = np.cumsum(lengths)
    document = np.minimum(np.searchsorted(ends, positions, side="right"), len(ends) - 1)
    return np.where(positions < ends[-1], positions - (ends - lengths - starts)[document], -1)


def perplexity(nats) -> float:
    """exp(mean of `nats`), per token, inf beyond 709 nats; ValueError where there are none."""
    if np.size(nats) == 0:
        raise ValueError("no tokens: expected at least one to take a perplexity of")
    with np.errstate(over="ignore"):
        return float(np.exp(np.mean(nats, dtype=np.float64)))


def bits_per_byte(nats, num_bytes) -> float:
    """Sum of `nats` / ln 2 / sum of `num_bytes`; entries may be tokens or documents. ValueError for 0 bytes."""
    if not (total := np.sum(num_bytes)):
        raise ValueError("0 bytes of text to divide by, expected at least one")
    return float(np.sum(nats, dtype=np.float64) / np.log(2) / total)


def per_document(nats_N, split: data.Split) -> tuple[np.ndarray, np.ndarray]:
    """Nats and bytes of each document, [D] float64, without those of the separators.

    A document gets bytes in proportion to its tokens: exact in sum, and for each document if a token is a byte.
    """
    if len(nats_N) != len(split.tokens):
        raise ValueError(f"{len(nats_N)} nats for a split of {len(split.tokens)} tokens")
    if not split.num_bytes:
        raise ValueError(f"the split has {split.num_bytes} bytes of text, expected their number, 1 or more")
    text_N = np.array(nats_N, np.float64)
    text_N[split.starts] = 0
    num_tokens = np.diff(split.starts, append=len(text_N)) - 1
    return np.add.reduceat(text_N, split.starts), split.num_bytes * num_tokens / num_tokens.sum()


def _held_out(path: str, tokenizer, max_tokens: int | None) -> data.Split:
    """Read the file, which may be a pipe, as one document, cut after `max_tokens` tokens of text."""
    path, pieces, missing, num_read = files.user_path(path), [], max_tokens or sys.maxsize, 0

    def blocks(file):
        nonlocal num_read
        while block := file.read(1 << 20):
            if not num_read:
                contents.expect_plain(path, block)
            num_read += len(block)
            yield block

    try:
        with path.open("rb") as file:
            for _, piece in tokenizer.encode_documents([blocks(file)]):
                pieces.append(piece[:missing])
                missing -= len(pieces[-1])
                if not missing:
                    break
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8, which tokenizer {tokenizer.name} needs: {error.reason}") from None
    if not pieces:
        raise ValueError(f"{path} is empty, expected text")
    text = np.concatenate(pieces)
    if tokenizer.name == "bytes":
        num_bytes = len(text)
    else:  # a tokenizer may normalise, so the file's own bytes are counted if all of it was read
        num_bytes = num_read if missing else len(tokenizer.decode(text).encode())
    if not num_bytes:
        raise ValueError(f"the first {len(text)} tokens of {path} have no text, expected a larger max_tokens")
    tokens = np.concatenate([[data.SEPARATOR], text]).astype(text.dtype)
    return data.Split(tokens, np.zeros(1, np.int64), (str(path),), num_bytes)


def _expect_text(path: Path) -> None:
    """Raise ValueError or OSError unless the path holds text; to be called before a model is loaded."""
    if path.is_dir() or tokenfiles.find(path):
        what = "is a folder" if path.is_dir() else "holds tokens"
        raise ValueError(f"{path} {what}, expected a file of text")
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file, expected text")
    contents.expect_plain(path)
    if path.is_file() and contents.is_json_lines(path):
        print(f"{path} holds JSON lines, read as text, with braces and names of fields", file=sys.stderr)


def _report(path, data, tokenizer, seq_len, batch_size, max_tokens) -> dict:
    _expect_text(files.user_path(data))
    folder = interop.locate(path)
    model, params = runs.load(folder)
    tokenizer = tokenizers.for_model(folder, model.vocab_size, tokenizer)
    seq_len = runs.trained_length(folder) if seq_len is None else seq_len
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"max_tokens is {max_tokens}, expected at least 1")
    split = _held_out(data, tokenizer, max_tokens)
    tokenizers.warn_if_small(tokenizer.name, tokenizer.vocab_size, model.vocab_size)

    def numbers(nats_N):
        text = np.delete(nats_N, split.starts)
        return {"bits_per_byte": bits_per_byte(text, split.num_bytes), "perplexity": perplexity(text)}

    shape = (seq_len, batch_size)
    what = {"model": path, "data": data, "tokenizer": tokenizer.name, "seq_len": seq_len}
    return what | {
        "tokens": len(split.tokens) - 1,
        "bytes": split.num_bytes,
        "windows": numbers(windows(model, params, split.tokens, *shape)),
        "best_practice": numbers(best_practice(model, params, split.tokens, split.starts, *shape)),
        "best_practice_is": "carried" if model.recurrent else "sliding",
    }


@command.reported(out_of_memory="lower --batch_size or --seq_len")
def main(argv=None) -> None:
    parser = command.Parser(
        prog=command.program("rwkv_jax.evaluate"),
        description="Report bits per byte and perplexity of held-out text: in windows of the training length from an "
        "empty state, and by best practice (state carried, or sliding windows if it grows with the text).",
    )
    parser.add_argument("--model", required=True, dest="path", help="a path or hub name that rwkv_jax.load reads")
    parser.add_argument("--data", required=True, help="a text file, all of it held out")
    parser.add_argument("--tokenizer", help="'bytes', 'world' or a tokenizer.json; default: the model's own")
    parser.add_argument("--seq_len", type=int, help="tokens of a window; default: the workdir's, or 1024")
    parser.add_argument("--batch_size", type=int, default=8, help="windows at a time (default: %(default)s)")
    parser.add_argument("--max_tokens", type=int, help="stop after this many tokens of the text")
    parser.add_argument("--json", action="store_true", help="print one JSON object in one line")
    args = vars(parser.parse_args(argv))
    as_json = args.pop("json")
    report = _report(**args)
    print(files.to_json(report) if as_json else _readable(report))


def _readable(report) -> str:
    lines = ["{data}: {tokens:,} tokens, {bytes:,} bytes".format(**report)]
    for name, row in (("windows", "windows"), (report["best_practice_is"], "best_practice")):
        level = "{bits_per_byte:8.4f} bits/byte   perplexity {perplexity:,.3f}".format(**report[row])
        lines.append(f"{name:<8} {level}")
    return "\n".join(lines)


if __name__ == "__main__":
    command.end(main())

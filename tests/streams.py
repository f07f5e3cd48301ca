"""A stream of documents, the nats that each protocol of `rwkv_jax.evaluate` must give it, and a fake model."""

import numpy as np

STARTS = np.array([0, 23, 24, 30, 101, 140])  # one document is empty, one is longer than several windows
LENGTH = 151
TOKENS = np.random.default_rng(2).integers(1, 256, LENGTH).astype(np.uint8)
TOKENS[STARTS] = 0


def windows_alone(nats_of, seq_len):
    """Nats of TOKENS[1:] by `nats_of(tokens)`, the nats of tokens[1:] given nothing else."""
    windows = [TOKENS[begin : begin + seq_len + 1] for begin in range(0, LENGTH - 1, seq_len)]
    return np.concatenate([nats_of(window) for window in windows])


def sliding_alone(nats_of, seq_len):
    """Each token from the beginning of its window, or of its document if that begins later."""
    expected, stride = [], (seq_len + 1) // 2
    for newest in range(LENGTH - 1):
        window = next(
            begin
            for begin in range(0, LENGTH - 1, stride)
            if begin <= newest < begin + seq_len and (begin == 0 or newest >= begin + seq_len - stride)
        )
        oldest = max(window, max(start for start in STARTS if start <= newest))
        assert newest + 1 - oldest >= seq_len / 2 or oldest in STARTS
        expected.append(nats_of(TOKENS[oldest : newest + 2])[-1])
    return np.array(expected)


def carried_alone(nats_of):
    """Each document, with its separator and that of the next document."""
    ends = [*STARTS[1:], LENGTH]
    return np.concatenate([nats_of(TOKENS[start : end + 1]) for start, end in zip(STARTS, ends, strict=True)])


class Loglik(np.ndarray):
    is_fully_addressable = True


class HashModel:
    """A model whose state is a hash of the tokens since the last reset, and whose nats depend on state and target.

    Any token that a protocol reads too often, not at all or in another place changes all later nats.
    """

    vocab_size, prime = 256, 1_000_003

    def __init__(self, recurrent=True):
        self.recurrent = recurrent
        self.layers = ("rwkv4",) if recurrent else ("attention",)
        self.calls = []  # shapes of the arguments of each call

    def init_state(self, batch):
        return np.zeros(batch, np.int64)

    def judged(self, params, tokens_BT, state=None, *, reset_BT=None, valid_BT=None):
        """Like `evaluate.judged`; padding in the input keeps the state, and its nats are undefined."""
        assert tokens_BT.dtype == np.int32 and params == {}
        assert all(mask is None or mask.shape == tokens_BT[:, 1:].shape for mask in (reset_BT, valid_BT))
        self.calls.append(tuple(None if x is None else x.shape for x in (tokens_BT, state, reset_BT, valid_BT)))
        state_B, nats = self.init_state(len(tokens_BT)) if state is None else state, []
        for t in range(tokens_BT.shape[1] - 1):
            if reset_BT is not None:
                state_B = np.where(reset_BT[:, t], 0, state_B)
            read_B = (31 * state_B + tokens_BT[:, t] + 1) % self.prime
            state_B = read_B if valid_BT is None else np.where(valid_BT[:, t], read_B, state_B)
            nats.append((257 * state_B + tokens_BT[:, t + 1]) % self.prime / self.prime)
        loglik_BT = -np.stack(nats, axis=1).astype(np.float32)
        return loglik_BT.view(Loglik), loglik_BT > -0.5, state_B

    def nats_of(self, tokens):
        """Nats of tokens[1:] given nothing else."""
        loglik_BT, *_ = type(self)().judged({}, np.array(tokens, np.int32)[None])
        return -np.asarray(loglik_BT[0])


def judged(model, *args, **masks):
    """Replaces `evaluate._judged`."""
    return model.judged(*args, **masks)


def log_likelihoods(model, *args, **masks):
    """Replaces `evaluate._log_likelihoods`."""
    loglik_BT, _, state = model.judged(*args, **masks)
    return loglik_BT, state

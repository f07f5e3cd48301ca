"""The causal trace: token-by-token passes, restored places, prompts and averages."""

import jax
import numpy as np
import pytest
from small import D, L, V, drawn, make

from experiments.trace import averages, facts, run, tracing
from rwkv_jax.data.tokenizers import ByteTokenizer

T, KINDS = 5, list(tracing.KINDS)


@pytest.fixture(scope="module")
def small():
    return drawn(make("rwkv4", scan=False))


@pytest.fixture(scope="module")
def prompt():
    return facts.padded([3], [4, 5], [6], 7, T + 1)  # one token of padding, then the separator


@pytest.fixture(scope="module")
def noise_NTD(prompt):
    noise = np.random.default_rng(0).standard_normal((2, T + 1, D)).astype(np.float32)
    return noise * prompt.subject_T[:, None]


@pytest.fixture(scope="module")
def seen(small, prompt, noise_NTD):
    return jax.tree.map(np.asarray, tracing.effects(*small, prompt, noise_NTD, 24))  # from 72 runs


@pytest.fixture(scope="module")
def read(small, prompt, noise_NTD):
    """The slow twin: the model in parallel over tokens from a state. The noise is stored in embeddings of its own.

    Ids from V on are the prompt's tokens with noise. Returns the distribution after the last token, and the state.
    """
    model, params = small
    embedding_VD = params["emb"]["embedding"]
    rows = np.concatenate([embedding_VD, noise_NTD[0] + embedding_VD[prompt.tokens_T]])
    noisy, wide = params | {"emb": {"embedding": rows}}, model.clone(vocab_size=V + T + 1)

    @jax.jit
    def apply(tokens_T, valid_T, state):
        x_BTD, state = wide.apply({"params": noisy}, tokens_T[None], state, valid_BT=valid_T[None], method="hidden")
        return jax.nn.softmax(model.apply({"params": params}, x_BTD[0, -1], method="logits")), state

    def read(tokens, state=None):
        padding = np.zeros(T + 1 - len(tokens), np.int32)
        valid_T = np.arange(T + 1) >= len(padding)
        return apply(np.concatenate([padding, tokens]), valid_T, model.init_state(1) if state is None else state)

    return read


def test_effects_of_a_clean_trace_equal_the_model_in_parallel(prompt, seen, read):
    p_V, _ = read(prompt.tokens_T[1:])
    np.testing.assert_allclose(seen.clean, p_V[prompt.answer], rtol=1e-5)
    assert abs(seen.corrupted / seen.clean - 1).min() > 1e-3  # the noise has an effect


def test_effects_of_a_restored_state_equal_a_state_replaced_between_calls(prompt, seen, read):
    noisy_T = np.where(prompt.subject_T, V + np.arange(T + 1), prompt.tokens_T)
    p_V, _ = read(noisy_T[1:])
    np.testing.assert_allclose(seen.corrupted[0], p_V[prompt.answer], rtol=1e-5)
    token = 3
    _, was = read(prompt.tokens_T[1 : token + 1])
    _, now = read(noisy_T[1 : token + 1])
    for layer in range(L):
        swapped = tuple(was[i] if i == layer else now[i] for i in range(L))
        p_V, _ = read(noisy_T[token + 1 :], swapped)
        np.testing.assert_allclose(seen.restored[0, KINDS.index("state"), token, layer], p_V[prompt.answer], rtol=1e-5)


def test_effects_of_restoring_places_that_no_token_reads_are_none(prompt, seen):
    by_kind = dict(zip(KINDS, seen.restored.swapaxes(0, 1), strict=True))
    nothing = np.broadcast_to(seen.corrupted[:, None], (2, L))
    np.testing.assert_array_equal(by_kind["state"][:, -1], nothing)  # no token follows
    np.testing.assert_array_equal(by_kind["both"][:, 0], nothing)  # padding
    np.testing.assert_allclose(by_kind["residual"][:, -1, -1], [seen.clean] * 2, rtol=1e-6)
    np.testing.assert_array_equal(by_kind["both"][:, :, -1][:, 1:-1], by_kind["state"][:, :, -1][:, 1:-1])
    assert (abs(by_kind["both"] - by_kind["residual"]).max((0, 2)) > 1e-6)[3:-1].all()


def test_trace_roles_give_each_token_one_role(prompt):
    R, name = averages.roles(prompt), averages.ROLES.index
    expected = ["before", "before", "first of subject", "last of subject", "last"]
    assert R.sum(0).tolist() == [0, 1, 1, 1, 1, 1] and R[:, 1:].argmax(0).tolist() == list(map(name, expected))
    by_role = averages.by_role(np.arange(2 * 6 * 1.0).reshape(2, 6, 1), R)
    assert by_role[:, name("before"), 0].tolist() == [1.5, 7.5] and np.isnan(by_role[:, name("after")]).all()


def test_other_tokens_are_as_many_as_the_subject_and_outside_it():
    prompt = facts.padded([3, 3], [4, 5], [6, 6], 7, 9)
    drawn = np.array([averages.other_tokens(prompt, np.random.default_rng(i)) for i in range(20)])
    assert (drawn.sum(1) == 2).all() and np.flatnonzero(drawn.any(0)).tolist() == [3, 4, 7, 8]


def test_trace_averages_agree_with_values_by_hand():
    assert averages.depth(np.array([1.0, 0, 1])) == 0.5 and averages.depth(np.array([-5.0, 0, 2])) == 1
    effect = np.zeros((4, len(KINDS), len(averages.ROLES), 2))  # [facts, kinds, roles, L]
    effect[:, KINDS.index("both"), averages.ROLES.index("last of subject"), 0] = 1
    effect[:, KINDS.index("both"), averages.ROLES.index("after")] = [[0, 0.5], [0, 1.5], [0, 1], [0, 1]]
    effect[:, KINDS.index("residual"), averages.ROLES.index("after"), 0] = 0.25
    assert averages.deeper(effect, seed=0, samples=50) == [1, 1, 1]
    mean, low, _ = averages.by_state(effect)  # halves of 0.25, 1.25, 0.75, 0.75
    assert mean == 0.375 and low == pytest.approx(0.375 - 3.182446 * np.std([1, 5, 3, 3], ddof=1) / 8 / 2, abs=1e-5)
    effect[0, :, averages.ROLES.index("after")] = np.nan  # a prompt that ends soon after its subject
    assert averages.by_state(effect)[0] == pytest.approx((1.25 + 0.75 + 0.75) / 6, abs=1e-5)
    known, unknown = averages.over_facts([[1, np.nan], [3, 2]])
    assert known[0] == 2 and unknown is None


def test_trace_world_has_one_answer_for_each_subject_and_relation():
    world = facts.world(subjects=20, vocab_size=64, seed=1)
    prompts = facts.everything(world)
    answers = prompts.answer.reshape(20 * facts.RELATIONS, facts.TEMPLATES)
    assert (answers == answers[:, :1]).all()
    texts = {tuple(t[v].tolist()) for t, v in zip(prompts.tokens_T, prompts.valid_T, strict=True)}
    assert len(texts) == len(prompts.answer) and {len(s) for s in world.subjects} == {2, 3}
    words = {w for texts in (world.before, *world.after) for text in texts for w in text}
    assert not words & {t for s in world.subjects for t in s} and not words & set(world.objects_SR.ravel().tolist())


def test_rows_of_prompts_begin_at_the_separator_and_count_answers_alone():
    prompts = facts.stacked([facts.padded([3], [4], [5], 6, 5), facts.padded([3, 3], [4], [5], 6, 5)])
    rows = run.rows_of(prompts)
    assert rows["tokens"].tolist() == [[0, 0, 3, 4, 5, 6], [0, 3, 3, 4, 5, 6]]
    assert rows["mask"].tolist() == [[False] * 4 + [True]] * 2
    assert rows["reset"].argmax(1).tolist() == [1, 0] and rows["reset"].sum(1).tolist() == [1, 1]


def test_facts_from_file_gives_padded_prompts_or_an_error(tmp_path):
    path = tmp_path / "facts.json"

    def read(text):
        path.write_text(text)
        return facts.from_file(str(path), ByteTokenizer())

    prompts = read('[{"subject": "ab", "prompt": "x ab is", "attribute": "cd"}]')
    assert bytes(prompts.tokens_T[0].tolist()) == b"\0x ab is" and prompts.answer.tolist() == [ord(" ")]
    # the space before the subject belongs to it, as it does to a word's token in BPE
    assert bytes(prompts.tokens_T[0][prompts.subject_T[0]].tolist()) == b" ab"
    with pytest.raises(ValueError, match="expected a JSON list"):
        read('[{"subject": "a"}]')
    with pytest.raises(ValueError, match="fact 0: 'zz' is not a sequence of whole tokens"):
        read('[{"subject": "zz", "prompt": "x ab is", "attribute": "cd"}]')
    with pytest.raises(ValueError, match="--model and --facts together"):
        run.cells(run.PRESETS["smoke"], None, model="x.pth")

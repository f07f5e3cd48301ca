"""Every form of `ops.wkv6` and `ops.wkv7` against their recurrences, written token by token in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from judge import error_ratio, worst_ratio
from operators import Sized, check, check_rounded, masks_of, run

from experiments.precision.judge_matrices import exact5, exact6, exact7
from experiments.precision.matrices import allowed
from rwkv_jax.models.rwkv7 import STRONGEST
from rwkv_jax.ops import wkv6, wkv7
from rwkv_jax.ops.chunks import inverse
from rwkv_jax.ops.wkv6 import FORMS

T, H, K, V = 37, 2, 4, 3
# One row a regime: no masks; documents that begin at ends of chunks of 16; padding everywhere; nothing but padding.
MASKS = masks_of(["a" * T, "a" * 15 + "AA" + "a" * 14 + "AAaaAA", "A.a..aaa" * 4 + ".A.A.", "." * T])
ROWS = len(MASKS["reset_BT"])
CASES = ("constant decay", "wkv6", "wkv7", "wkv7, repeated keys")


def recurrence6(r, w, k, v, u, state, reset_BT, valid_BT):
    def token(state, x):
        r, w, k, v, reset, valid = x
        past = jnp.where((reset & valid)[:, None, None, None], 0, state)
        kv = jnp.einsum("bhk,bhv->bhkv", k, v)
        y = jnp.einsum("bhk,bhkv->bhv", r, past + u[None, ..., None] * kv)
        new = jnp.exp(w)[..., None] * past + kv
        return jnp.where(valid[:, None, None, None], new, state), jnp.where(valid[:, None, None], y, 0)

    return _over_time(token, state, (r, jnp.broadcast_to(w, r.shape), k, v, reset_BT, valid_BT))


def recurrence7(r, w, k, v, a, b, state, reset_BT, valid_BT):
    def token(state, x):
        r, w, k, v, a, b, reset, valid = x
        past = jnp.where((reset & valid)[:, None, None, None], 0, state)
        found = jnp.einsum("bhk,bhkv->bhv", a, past)
        new = jnp.exp(w)[..., None] * past + jnp.einsum("bhk,bhv->bhkv", b, found) + jnp.einsum("bhk,bhv->bhkv", k, v)
        y = jnp.einsum("bhk,bhkv->bhv", r, new)
        return jnp.where(valid[:, None, None, None], new, state), jnp.where(valid[:, None, None], y, 0)

    return _over_time(token, state, (r, w, k, v, a, b, reset_BT, valid_BT))


def _over_time(token, state, operands_BT):
    state, y_TBHV = jax.lax.scan(token, state, [x.swapaxes(0, 1) for x in operands_BT])
    return y_TBHV.swapaxes(0, 1), state


@functools.cache
def case(name, tokens=T):
    """(operator, operands, state, dy) in float32; channels forget nothing, everything at once, or in between; one
    token has no key."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.standard_normal(shape, np.float32)
    r, k, v, dy = normal(ROWS, tokens, H, K), normal(ROWS, tokens, H, K), *normal(2, ROWS, tokens, H, V)
    k[:, 3:4] = 0
    state = normal(ROWS, H, K, V)
    if not name.startswith("wkv7"):
        w = -(np.float32(10.0) ** rng.uniform(-4, 1.3, (ROWS, tokens, H, K)).astype(np.float32))
        w[..., 0], w[:, ::5, :, 1] = 0, -np.inf
        w = np.float32([[-1e-4, -0.1, -20, -np.inf], [0, -1e-3, -1, -5]]) if name == "constant decay" else w
        return wkv6, (r, w, k, v, normal(H, K)), state, dy
    kappa = normal(ROWS, tokens, H, K)
    w, rate = STRONGEST / (1 + np.exp(-5 * normal(ROWS, tokens, H, K))), rng.random((ROWS, tokens, H, K)).round(1)
    if name == "wkv7, repeated keys":
        kappa, rate = 0.05 * kappa + normal(H, K), np.full_like(kappa, 0.999)
        w = np.stack([np.full_like(w[..., 0], x) for x in (-1e-3, STRONGEST, 0, -20)], axis=-1)
    kappa /= np.linalg.norm(kappa, axis=-1, keepdims=True)
    a, b = -kappa, kappa * np.float32(rate)
    return wkv7, (r, np.float32(w), k, v, a, b), state, dy


@functools.cache
def expected(name, tokens=T, masked=False):
    """Results of `run` in float64, by the recurrence; `masked` uses `MASKS`."""
    op, operands, state, dy = case(name, tokens)
    recurrence = recurrence6 if op is wkv6 else recurrence7
    plain = lambda *args, impl, reset_BT, valid_BT: recurrence(*args, reset_BT, valid_BT)
    none = {"reset_BT": np.zeros((ROWS, tokens), bool), "valid_BT": np.ones((ROWS, tokens), bool)}
    with jax.enable_x64(True):
        wide = jax.tree.map(np.float64, (operands, state, dy))
        return jax.device_get(run(plain, None, (tokens,), *wide, MASKS if masked else none))


def heads_last(name, dtype):
    """(the judge of a `case`, its arguments): [T, K, B H]; arrays with an axis of time are rounded to `dtype`."""
    op, operands, state, dy = case(name)
    over_time = lambda x: np.asarray(x.astype(dtype), np.float32).transpose(1, 3, 0, 2).reshape(T, x.shape[3], -1)
    for_all = lambda x: np.tile(x.T, ROWS)
    operands = [over_time(x) if x.ndim == 4 else for_all(x) for x in operands]
    state = state.transpose(2, 3, 0, 1).reshape(K, V, -1)
    judge = exact7 if op is wkv7 else exact5 if name == "constant decay" else exact6
    return judge, (*operands, state, over_time(dy), np.zeros_like(state))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, jnp.float32) for name in CASES), ("constant decay", jnp.bfloat16), ("wkv7", jnp.bfloat16)],
)
def test_wkv6_and_wkv7_are_within_their_stated_bounds(name, dtype, form):
    """Checks every element, in two calls; experiments/precision has inputs of 100,000 tokens."""
    op, operands, state, dy = case(name)
    nothing = {"reset_BT": np.zeros((ROWS, T), bool), "valid_BT": np.ones((ROWS, T), bool)}
    narrow = [x.astype(dtype) if x.ndim == 4 else x for x in operands]
    dy = dy.astype(dtype).astype(np.float32)
    y, after, (grads, dstate) = jax.device_get(run(op, form, (21, 16), narrow, state, dy, nothing))
    names = "rwkvab" if op is wkv7 else "rwkvu"
    judge, given = heads_last(name, dtype)
    exact = judge(*given)
    for found, result in zip((y, after, *grads, dstate), ("y", "final", *names, "state"), strict=True):
        want = Sized(*(np.moveaxis(x, -1, 0) for x in exact[result]))  # heads first
        bound = allowed(form, result, *given)[:, None]
        if found.ndim == 2:  # for all rows
            want = Sized(*(x.reshape(ROWS, H, K) for x in want)).over_rows(bound.reshape(ROWS, H, 1))
            check(found, want, 1)
        else:
            found = found if result in ("final", "state") else found.swapaxes(1, 2)
            (check if found.dtype == np.float32 else check_rounded)(found.reshape(want.value.shape), want, bound)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", CASES)
def test_wkv6_and_wkv7_follow_the_recurrence_over_masks_and_splits(name, form):
    op, operands, state, dy = case(name)
    y, after, (grads, dstate) = run(op, form, (21, 16), operands, state, dy, MASKS)
    want_y, want_after, (want_grads, want_dstate) = expected(name, masked=True)
    assert worst_ratio(y, want_y, axis=2) < 1e-6 and worst_ratio(after, want_after, axis=1) < 1e-6
    np.testing.assert_array_equal(after[3], state[3])
    assert not np.asarray(y)[~MASKS["valid_BT"]].any()
    for i, (grad, want) in enumerate(zip((*grads, dstate), (*want_grads, want_dstate), strict=True)):
        assert error_ratio(grad, want) < 2e-6, i
        if np.ndim(grad) == 4 and len(grad[0]) == T:
            assert not np.asarray(grad)[~MASKS["valid_BT"]].any(), i


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["constant decay", "wkv7"])
def test_wkv6_and_wkv7_accumulate_bfloat16_in_float32(name, form):
    op, operands, state, dy = case(name)
    narrow = [x.astype(jnp.bfloat16) if x.ndim == 4 else x for x in operands]
    wide = [x.astype(np.float32) for x in narrow]
    cotangent = np.asarray(dy.astype(jnp.bfloat16), np.float32)
    y, after, (grads, _) = run(op, form, (21, 16), narrow, state, cotangent, MASKS)
    want_y, want_after, (want_grads, _) = run(op, form, (21, 16), wide, state, cotangent, MASKS)
    assert y.dtype == jnp.bfloat16 and after.dtype == jnp.float32
    assert [x.dtype for x in grads] == [x.dtype for x in narrow]
    assert error_ratio(after, want_after) < 1e-6
    for x, want in zip((y, *grads), (want_y, *want_grads), strict=True):
        rounding = jnp.finfo(x.dtype).eps / 2 * np.abs(want)  # a single rounding, at the end
        assert (np.abs(np.float32(x) - want) <= 1.01 * rounding + 2e-6 * np.abs(want).max()).all()


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [1, 2, 15, 16, 17, 64, 1000])
@pytest.mark.parametrize("name", CASES)
def test_wkv6_and_wkv7_follow_the_recurrence_at_any_length(name, tokens):
    op, operands, state, dy = case(name, tokens)
    want = jax.tree.leaves(expected(name, tokens))
    # the scan rounds exp(w), by the same amount in each step where w is constant
    for form, limit in {"scan": 2e-6 + 1e-8 * tokens, "chunked": 1e-6}.items():
        for found, its in zip(jax.tree.leaves(run(op, form, (tokens,), operands, state, dy)), want, strict=True):
            assert error_ratio(found, its) < limit


# Sines as inputs, 4 channels, 7 tokens, loss sum(y) + sum(state): y_T, sum(state), dw_3, sum(dstate); da_3
SINES = {
    wkv6: (
        [0.4417743, 2.8966940, 1.1079502, -2.3039432],
        -0.5324780,
        [0.0118831, -0.0817861, 0.1561657, -0.0043606],
        -2.5709046,
    ),
    wkv7: (
        [0.4758018, 1.2072567, 0.1700777, -1.1162655],
        0.3841573,
        [0.0350847, 0.0084402, -0.0081345, -0.2706683],
        -1.8901654,
        [0.1380035, 0.0062943, 0.0364153, 0.1582225],
    ),
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("op", SINES)
def test_wkv6_and_wkv7_have_the_numbers_of_an_independent_program(op, form):
    t, j = np.arange(7)[:, None], np.arange(4)[None]
    sines = lambda s: np.sin(1 + s + 0.7 * t + 1.3 * j)[None, :, None]
    unit = sines(3) / np.linalg.norm(sines(3), axis=-1, keepdims=True)
    of_sigmoid = lambda x: 1 / (1 + np.exp(-x))
    if op is wkv6:
        operands = sines(0), -np.exp(sines(6)), sines(1), sines(2), sines(5)[0, 0]
    else:
        w = STRONGEST * of_sigmoid(sines(6))
        operands = sines(0), w, sines(1), sines(2), -unit, unit * of_sigmoid(sines(4))
    state = np.sin(8 + 0.7 * np.arange(4)[:, None] + 1.3 * j)[None, None]

    def results(operands, state):
        y, after = op(*operands, state, impl=form)
        return y.sum() + after.sum(), (y, after)

    gradients = jax.jit(jax.grad(results, argnums=(0, 1), has_aux=True))
    (grads, dstate), (y, after) = jax.device_get(gradients(operands, state))
    last, total, dw, dstate_sum, *da = SINES[op]
    np.testing.assert_allclose(y[0, -1, 0], last, atol=1e-7)
    np.testing.assert_allclose(after.sum(), total, atol=1e-7)
    np.testing.assert_allclose(grads[1][0, 3, 0], dw, atol=1e-7)
    np.testing.assert_allclose(dstate.sum(), dstate_sum, atol=1e-7)
    for want in da:
        np.testing.assert_allclose(grads[4][0, 3, 0], want, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "tokens", "plain", "trained"),
    [
        ("wkv6", 17, "chunked", "chunked"),
        ("wkv7", 17, "scan", "chunked"),
        ("wkv6", 1, "scan", "scan"),
        ("wkv7", 1, "scan", "scan"),
    ],
)
def test_wkv6_and_wkv7_on_a_cpu_take_the_suited_form_for_length_and_pass(name, tokens, plain, trained):
    op, operands, state, _ = case(name, tokens)
    value = lambda impl: lambda *args: op(*args, impl=impl)[0]
    grads = lambda impl: jax.grad(lambda *args: value(impl)(*args).sum())
    text = lambda f: jax.jit(f).lower(*operands, state).as_text()
    for program, form in ((value, plain), (grads, trained)):
        (other,) = set(FORMS) - {form}
        assert text(program(None)) == text(program(form)) != text(program(other))


def test_chunks_inverse_is_exact_for_repeated_keys():
    C = 64
    rng = np.random.default_rng(0)
    key = rng.standard_normal(8) + 0.05 * rng.standard_normal((C, 8))
    key /= np.linalg.norm(key, axis=-1, keepdims=True)
    m = np.tril(-0.999 * key @ key.T, -1)
    found = jax.jit(inverse)(np.float32(m)[None, None])[0, 0]
    assert error_ratio(found, np.linalg.inv(np.eye(C) - np.float32(m))) < 1e-6


def test_wkv6_and_wkv7_name_arguments_that_do_not_fit():
    x, v = np.zeros((1, 2, H, K), np.float32), np.zeros((1, 2, H, V), np.float32)
    u, state = np.zeros((H, K), np.float32), np.zeros((1, H, V, K), np.float32)
    with pytest.raises(ValueError, match="impl is 'associative', expected None or one of scan, chunked"):
        wkv6(x, x, x, v, u, impl="associative")
    with pytest.raises(ValueError, match=r"u is \(4,\), expected \(2, 4\)"):
        wkv6(x, x, x, v, u[0])
    with pytest.raises(ValueError, match=r"state is \(1, 2, 3, 4\), expected \(1, 2, 4, 3\)"):
        wkv7(x, x, x, v, x, x, state)
    with pytest.raises(ValueError, match=r"v is \(1, 1, 2, 3\), expected \(1, 2, 2, 3\)"):
        wkv7(x, x, x, v[:, :1], x, x)
    with pytest.raises(ValueError, match=r"expected \[B, T, H, K\]"):
        wkv6(x[0], x[0], x[0], v[0], u)


def test_wkv6_and_wkv7_without_tokens_leave_the_state_unchanged():
    state = np.ones((1, H, K, V), np.float32)
    x, v, u = np.zeros((1, 0, H, K), np.float32), np.zeros((1, 0, H, V), np.float32), np.zeros((H, K), np.float32)
    for y, after in (wkv6(x, x, x, v, u, state), wkv7(x, x, x, v, x, x, state)):
        assert y.shape == v.shape
        np.testing.assert_array_equal(after, state)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("B, heads, size", [(0, H, K), (1, 0, K), (1, H, 0)])
def test_wkv6_and_wkv7_accept_axes_of_no_elements(form, B, heads, size):
    x, v = (jax.ShapeDtypeStruct((B, 5, heads, n), jnp.float32) for n in (size, V))
    u = jax.ShapeDtypeStruct((heads, size), jnp.float32)
    for op, operands in ((wkv6, (x, x, x, v, u)), (wkv7, (x, x, x, v, x, x))):
        loss = lambda *xs, op=op: sum(y.sum() for y in op(*xs, impl=form))
        grads = jax.eval_shape(jax.grad(loss, argnums=tuple(range(len(operands)))), *operands)
        assert [g.shape for g in grads] == [x.shape for x in operands]

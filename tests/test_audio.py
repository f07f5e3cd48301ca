"""Endless audio: the sound and its bytes, and that a continuation goes on from its state."""

import wave

import jax
import numpy as np
import pytest

import rwkv_jax
from experiments.audio import music, run

RATE = 2000


def test_a_seed_is_its_music():
    sound = music.music(3, 3 * RATE, RATE)
    assert (music.music(3, 3 * RATE, RATE) == sound).all() and (music.music(4, 3 * RATE, RATE) != sound).any()
    assert np.abs(sound).max() == pytest.approx(music.LOUDEST)
    assert 0 not in music.encoded(sound)  # the separator's byte


def test_bytes_are_the_sound_within_half_a_step():
    sound = np.linspace(-1, 1, 4001)
    back = music.decoded(music.encoded(sound))
    slope = (1 + music.MU * np.abs(sound)) * np.log1p(music.MU) / music.MU  # of the decoder, d sound / d curve
    assert (np.abs(back - sound) <= 1.03 * slope / music.MU + 1e-6).all()
    assert (music.encoded([-1.0, 1.0]) == [0, 255]).all()
    assert (music.encoded(music.decoded(np.arange(256))) == np.arange(256)).all()


def test_a_note_is_where_its_pitch_says():
    assert music.pitch(7) == pytest.approx(2 * music.ROOT) and music.pitch(4) == pytest.approx(196, abs=0.1)  # G3
    tone = np.sin(2 * np.pi * 250 * np.arange(2 * RATE) / RATE)
    decibels = music.spectrogram(tone, columns=5, highest=100)
    assert decibels.shape == (100, 5) and (decibels.argmax(axis=0) == 250 / RATE * 512).all()
    assert decibels.max() == 0 and decibels.min() == -60


def test_a_sound_file_is_read_back(tmp_path):
    sound = music.music(0, RATE, RATE)
    music.write_wav(tmp_path / "a.wav", sound, RATE)
    with wave.open(str(tmp_path / "a.wav")) as file:
        assert file.getframerate() == RATE and file.getnchannels() == 1
        back = np.frombuffer(file.readframes(RATE), "<i2")
    np.testing.assert_allclose(back / 32767, sound, atol=1 / 32767)
    assert [path.name for path in tmp_path.iterdir()] == ["a.wav"]


@pytest.fixture(scope="module")
def model():
    return rwkv_jax.build("rwkv4", vocab_size=256, num_layers=1, dim=8)


@pytest.fixture(scope="module")
def start(model):
    return jax.jit(model.init)(jax.random.key(0), np.zeros((1, 1), np.int32))["params"]


def test_the_state_after_a_continuation_has_read_prompt_and_continuation(model, start):
    prompt, rng = np.arange(100, 108, dtype=np.uint8), np.random.default_rng(0)
    params = jax.tree.map(lambda x: x + np.float32(0.1) * rng.normal(size=x.shape).astype(np.float32), start)
    drawn, before, after, _ = run.continuation(model, params, prompt, 24, seed=1, piece=8)
    again, *_ = run.continuation(model, params, prompt, 24, seed=1, piece=8)
    other, *_ = run.continuation(model, params, prompt, 24, seed=2, piece=8)
    assert (drawn == again).all() and (drawn != other).any() and len(set(drawn.tolist())) > 5
    read, _ = run._read(model, params, np.concatenate([prompt, drawn]).astype(np.int32)[None])
    num = lambda state: np.stack([entry.wkv.num * np.exp(entry.wkv.log_scale) for entry in state])
    np.testing.assert_allclose(num(after), num(read), rtol=1e-3, atol=1e-4)
    assert np.abs(num(before) - num(read)).max() > 1e-2


def test_draws_follow_the_model(model, start):
    """A model whose head knows two bytes alone draws these, by their odds."""
    params = jax.tree.map(np.zeros_like, start)
    params["ln_out"]["bias"] = np.ones(8, np.float32)
    params["head"]["kernel"][:, 7], params["head"]["kernel"][:, 200] = 40 / 8, (40 + np.log(3)) / 8
    drawn, *_ = run.continuation(model, params, np.zeros(8, np.uint8), 2000, seed=0, piece=1000)
    assert set(drawn.tolist()) == {7, 200}
    assert (drawn == 200).mean() == pytest.approx(0.75, abs=0.04)


def test_digits_are_decibels():
    decibels = np.array([[-60.0, 0.0, -30.0]])
    (row,) = run.digits(decibels)
    assert row[:2] == "0z"
    np.testing.assert_allclose([int(digit, 36) / 35 * 60 - 60 for digit in row], decibels[0], atol=1)

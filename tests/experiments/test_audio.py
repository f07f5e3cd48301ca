"""Endless audio: the sound and its bytes, and continuations from the recurrent state."""

import wave

import jax
import numpy as np
import pytest
from small import drawn

import rwkv_jax
from experiments.audio import music, run

RATE = 2000


def test_music_depends_on_the_seed_alone():
    sound = music.music(3, 3 * RATE, RATE)
    assert (music.music(3, 3 * RATE, RATE) == sound).all() and (music.music(4, 3 * RATE, RATE) != sound).any()
    assert np.abs(sound).max() == pytest.approx(music.LOUDEST)
    assert 0 not in music.encoded(sound)  # the separator's byte


def test_encoded_bytes_are_the_sound_within_half_a_step():
    sound = np.linspace(-1, 1, 4001)
    back = music.decoded(music.encoded(sound))
    slope = (1 + music.MU * np.abs(sound)) * np.log1p(music.MU) / music.MU  # of the decoder, d sound / d curve
    assert (np.abs(back - sound) <= 1.03 * slope / music.MU + 1e-6).all()
    assert (music.encoded([-1.0, 1.0]) == [0, 255]).all()
    assert (music.encoded(music.decoded(np.arange(256))) == np.arange(256)).all()


def test_spectrogram_shows_a_tone_at_its_pitch():
    assert music.pitch(7) == pytest.approx(2 * music.ROOT) and music.pitch(4) == pytest.approx(196, abs=0.1)  # G3
    tone = np.sin(2 * np.pi * 250 * np.arange(2 * RATE) / RATE)
    decibels = music.spectrogram(tone, columns=5, highest=100)
    assert decibels.shape == (100, 5) and (decibels.argmax(axis=0) == 250 / RATE * 512).all()
    assert decibels.max() == 0 and decibels.min() == -60


def test_wav_file_reads_back_the_sound(tmp_path):
    sound = music.music(0, RATE, RATE)
    music.write_wav(tmp_path / "a.wav", sound, RATE)
    with wave.open(str(tmp_path / "a.wav")) as file:
        assert file.getframerate() == RATE and file.getnchannels() == 1
        back = np.frombuffer(file.readframes(RATE), "<i2")
    np.testing.assert_allclose(back / 32767, sound, atol=1 / 32767)
    assert [path.name for path in tmp_path.iterdir()] == ["a.wav"]


@pytest.fixture(scope="module")
def case():
    return drawn(rwkv_jax.build("rwkv4", vocab_size=256, num_layers=1, dim=8))


def test_continuation_state_has_read_prompt_and_continuation(case):
    prompt = np.arange(100, 108, dtype=np.uint8)
    continued, before, after, _ = run.continuation(*case, prompt, 24, seed=1, piece=8)
    again, *_ = run.continuation(*case, prompt, 24, seed=1, piece=8)
    other, *_ = run.continuation(*case, prompt, 24, seed=2, piece=8)
    assert (continued == again).all() and (continued != other).any() and len(set(continued.tolist())) > 5
    read, _ = run._read(*case, np.concatenate([prompt, continued]).astype(np.int32)[None])
    num = lambda state: np.stack([np.asarray(e.wkv.num) * np.exp(np.asarray(e.wkv.log_scale)) for e in state])
    np.testing.assert_allclose(num(after), num(read), rtol=1e-3, atol=1e-4)
    assert np.abs(num(before) - num(read)).max() > 1e-2


def test_continuation_draws_by_the_probabilities_of_the_model(case):
    """A model whose head knows two bytes alone draws these, by their odds."""
    model, params = case
    params = jax.tree.map(np.zeros_like, params)
    params["ln_out"]["bias"] = np.ones(8, np.float32)
    params["head"]["kernel"][:, 7], params["head"]["kernel"][:, 200] = 40 / 8, (40 + np.log(3)) / 8
    continued, *_ = run.continuation(model, params, np.zeros(8, np.uint8), 2000, seed=0, piece=8)
    assert set(continued.tolist()) == {7, 200}
    assert (continued == 200).mean() == pytest.approx(0.75, abs=0.04)


def test_digits_encode_decibels():
    decibels = np.array([[-60.0, 0.0, -30.0]])
    (row,) = run.digits(decibels)
    assert row[:2] == "0z"
    np.testing.assert_allclose([int(digit, 36) / 35 * 60 - 60 for digit in row], decibels[0], atol=1)

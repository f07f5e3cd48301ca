"""Music from a score that a seed draws, and its samples as bytes: what the model reads and writes."""

import wave
from pathlib import Path

import numpy as np

BEAT = 0.25  # seconds of a note of the arpeggio; a bar has eight
SCALE = np.array([0, 2, 4, 5, 7, 9, 11])  # semitones of the major scale above its root
CHORDS = (0, 3, 4, 5, 1)  # degrees on which triads stand: I, IV, V, vi, ii
PATTERNS = ((0, 1, 2, 3, 2, 1, 0, 1), (0, 2, 1, 3, 0, 2, 1, 3), (3, 2, 1, 0, 1, 2, 3, 2), (0, 1, 2, 1, 3, 2, 1, 2))
ROOT = 130.8  # Hz: C3
LOUDEST = 0.8
MU = 255


def music(seed: int, num_samples: int, rate: int) -> np.ndarray:
    """[num_samples] floats in [-1, 1]: a bass note and a broken triad in every bar, chord and pattern drawn anew."""
    rng = np.random.default_rng(seed)
    step = round(BEAT * rate)
    sound_T = np.zeros(num_samples + 8 * step)
    for bar in range(0, num_samples, 8 * step):
        degree, pattern = rng.choice(CHORDS), PATTERNS[rng.integers(len(PATTERNS))]
        notes = [pitch(degree + i) for i in (0, 2, 4, 7)]
        _add(sound_T, bar, note(notes[0] / 2, 8 * step, rate, fade=1.0))
        for beat, i in enumerate(pattern):
            _add(sound_T, bar + beat * step, note(2 * notes[i], 2 * step, rate, fade=0.2))
    return LOUDEST * sound_T[:num_samples] / np.abs(sound_T[:num_samples]).max()


def pitch(degree: int) -> float:
    """Hz of a degree of the scale on `ROOT`."""
    octave, place = divmod(int(degree), len(SCALE))
    return ROOT * 2 ** (octave + SCALE[place] / 12)


def note(hz: float, num_samples: int, rate: int, fade: float) -> np.ndarray:
    """A plucked tone of three partials below half the rate, down to 1 / e after `fade` seconds."""
    seconds_T = np.arange(num_samples) / rate
    partials = [np.sin(2 * np.pi * i * hz * seconds_T) / i**2 for i in (1, 2, 3) if i * hz < rate / 2]
    return sum(partials) * np.exp(-seconds_T / fade) * np.minimum(seconds_T / 0.005, 1)


def _add(sound_T, start, note_T) -> None:
    part = sound_T[start : start + len(note_T)]
    part += note_T[: len(part)]


def encoded(sound_T) -> np.ndarray:
    """mu-law bytes (ITU-T G.711's curve, without its bit layout): 0 for -1, 255 for 1."""
    curve_T = np.sign(sound_T) * np.log1p(MU * np.abs(sound_T)) / np.log1p(MU)
    return np.round((curve_T + 1) / 2 * MU).astype(np.uint8)


def decoded(bytes_T) -> np.ndarray:
    """Samples in [-1, 1] of mu-law bytes."""
    curve_T = np.asarray(bytes_T, np.float64) / MU * 2 - 1
    return np.sign(curve_T) * np.expm1(np.abs(curve_T) * np.log1p(MU)) / MU


def write_wav(path: Path, sound_T, rate: int) -> None:
    """16-bit mono PCM."""
    beside = path.with_suffix(".partial")
    with wave.open(str(beside), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(np.round(np.clip(sound_T, -1, 1) * 32767).astype("<i2").tobytes())
    beside.replace(path)


def spectrogram(sound_T, columns: int, highest: int, window: int = 512, span: float = 60.0) -> np.ndarray:
    """[highest, columns] decibels from -span to 0, of the loudest: short-time spectra, the lowest `highest` bins."""
    starts = np.linspace(0, len(sound_T) - window, columns).round().astype(int)
    frames = np.stack([sound_T[s : s + window] for s in starts]) * np.hanning(window)
    power = np.abs(np.fft.rfft(frames, axis=1))[:, :highest].T ** 2
    return np.clip(10 * np.log10(power / power.max() + 1e-12), -span, 0)

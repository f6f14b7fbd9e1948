"""Recognise ten words of synthetic speech: espeak-ng speaks them (on Debian: ``apt-get install espeak-ng``).

    python examples/spoken_words.py [--trainer.max_steps=800 and the like]

Everything is written under ``runs/spoken-words``, which a new run replaces; the words stay in ``runs/speech``. The
voices of the validation and test data are not heard in training.

Letters: N sounds, S samples of one.
"""

from __future__ import annotations

import shutil
import subprocess
import wave
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from comparison import LastSearch, command_line, conclude, contenders, fit, measure, start
from lightning import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, default_collate
from transformers.audio_utils import mel_filter_bank

CONFIG = Path(__file__).with_suffix(".yaml")
RUN = Path("runs/spoken-words")
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# espeak-ng's variants of a voice; each belongs to one split.
VOICES = {"train": ("m1", "m2", "m3", "m4", "f1", "f2", "f3"), "val": ("m5", "m6", "f4"), "test": ("m7", "m8", "f5")}
ACCENTS = ("en-us", "en-gb", "en-gb-scotland")
WORDS_A_MINUTE = (140, 190)
RATE = 22050
NUM_SAMPLES = RATE  # one second
NUM_MELS = 40
NUM_FFT = 512


class Recogniser(LightningModule):
    """A convolutional network over log-mel features, trained by Adam at a constant learning rate.

    Args:
        width: Channels.
        learning_rate: Adam's.
    """

    window: Tensor
    mels: Tensor

    def __init__(self, width: int = 64, learning_rate: float = 3e-3) -> None:
        super().__init__()
        self.learning_rate = learning_rate
        mels = mel_filter_bank(NUM_FFT // 2 + 1, NUM_MELS, 50.0, RATE / 2, RATE)
        self.register_buffer("mels", torch.from_numpy(mels).float(), persistent=False)
        self.register_buffer("window", torch.hann_window(NUM_FFT), persistent=False)
        self.net = nn.Sequential(
            *block(NUM_MELS, width),
            *block(width, width),
            *block(width, width),
            nn.AdaptiveAvgPool1d(1),
            nn.Flatten(),
            nn.Linear(width, len(WORDS)),
        )

    def forward(self, waves: Tensor) -> Tensor:
        """Return the logits ``(N, 10)`` of ``(N, S)`` sounds."""
        spectra = torch.stft(waves, NUM_FFT, NUM_FFT // 2, window=self.window, return_complex=True).abs().square()
        features = (spectra.transpose(1, 2) @ self.mels).clamp(min=1e-3).log().transpose(1, 2)
        logits: Tensor = self.net(features)
        return logits

    def loss(self, batch: list[Tensor]) -> Tensor:
        """Return the mean cross-entropy in nats."""
        waves, labels = batch
        return F.cross_entropy(self(waves), labels)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), self.learning_rate)


def block(num_in: int, num_out: int) -> list[nn.Module]:
    """Return a convolution over time that halves it, its norm and what bends it."""
    return [nn.Conv1d(num_in, num_out, 5, stride=2, padding=2), nn.GroupNorm(8, num_out), nn.ReLU()]


class Sounds(LightningDataModule):
    """Ten classes of sounds under noise, so that they are not too easy.

    Args:
        batch_size: Sounds a batch; 180 must be an even number of them, so that a sound is always in the same half.
        noise: Standard deviation of the noise, in units of the sound's own.
        num_passes: Passes over the validation and test sounds, each with other noise.
    """

    def __init__(self, batch_size: int = 30, noise: float = 1.0, num_passes: int = 8) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.noise = noise
        self.num_passes = num_passes

    def sounds(self, split: str) -> tuple[Tensor, Tensor]:
        """Return a split's sounds ``(N, S)``, each of unit power, and their labels ``(N,)``."""
        raise NotImplementedError

    def setup(self, stage: str) -> None:
        self.train = TensorDataset(*self.sounds("train"))
        self.val, self.test = self.frozen("val", seed=1), self.frozen("test", seed=2)

    def frozen(self, split: str, seed: int) -> TensorDataset:
        """Return passes over a split that are the same in every run, a sound always in the same half of the batches."""
        generator = torch.Generator().manual_seed(seed)
        sounds, labels = self.sounds(split)
        order = torch.randperm(len(labels), generator=generator)
        sounds, labels = sounds[order].repeat(self.num_passes, 1), labels[order].repeat(self.num_passes)
        return TensorDataset(disturbed(sounds, self.noise, generator), labels)

    def disturb(self, samples: list[tuple[Tensor, ...]]) -> list[Tensor]:
        """Return a training batch, under other noise each time."""
        sounds, labels = default_collate(samples)
        return [disturbed(sounds, self.noise), labels]

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.train, self.batch_size, shuffle=True, drop_last=True, collate_fn=self.disturb)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.val, self.batch_size)

    def test_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.test, self.batch_size)


class Speech(Sounds):
    """Ten words, spoken by espeak-ng in 13 voices, three accents and two speeds.

    Args:
        batch_size: Words a batch.
        noise: Standard deviation of the noise, in units of the speech's own.
        num_passes: Passes over the validation and test words, each with other noise.
        cache: Folder in which synthesised words are kept.
    """

    def __init__(
        self, batch_size: int = 30, noise: float = 1.0, num_passes: int = 8, cache: str = "runs/speech"
    ) -> None:
        super().__init__(batch_size, noise, num_passes)
        self.cache = Path(cache)

    def sounds(self, split: str) -> tuple[Tensor, Tensor]:
        self.cache.mkdir(parents=True, exist_ok=True)
        spoken = list(product(VOICES[split], ACCENTS, WORDS_A_MINUTE, range(len(WORDS))))
        with ThreadPoolExecutor(2) as pool:
            waves = list(pool.map(lambda s: speak(WORDS[s[3]], f"{s[1]}+{s[0]}", s[2], self.cache), spoken))
        return torch.stack(waves), torch.tensor([s[3] for s in spoken])


class Tones(Sounds):
    """Ten chords, for trying the example where there is no espeak-ng. They are tones, not speech.

    Args:
        batch_size: Chords a batch.
        noise: Standard deviation of the noise, in units of the chord's own.
        num_passes: Passes over the validation and test chords, each with other noise.
    """

    def sounds(self, split: str) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(len(VOICES[split]) + len(split))
        labels = torch.arange(180) % len(WORDS)
        # Each sound is detuned by up to 6 %, as a voice is higher or lower.
        pitches = 200 * 1.2**labels * (0.94 + 0.12 * torch.rand(len(labels), generator=generator))
        seconds = torch.arange(NUM_SAMPLES) / RATE
        waves = sum((2 * torch.pi * k * pitches[:, None] * seconds).sin() for k in (1, 2, 3))
        assert isinstance(waves, Tensor)
        return unit_power(waves), labels


def disturbed(sounds: Tensor, noise: float, generator: torch.Generator | None = None) -> Tensor:
    """Return ``(N, S)`` sounds, each moved in time by up to 0.2 s, under noise."""
    most = RATE // 5
    windows = F.pad(sounds, (most, most)).unfold(1, NUM_SAMPLES, 1)
    starts = torch.randint(2 * most + 1, (len(sounds),), generator=generator)
    return windows[torch.arange(len(sounds)), starts] + noise * torch.randn(sounds.shape, generator=generator)


def speak(word: str, voice: str, words_a_minute: int, cache: Path) -> Tensor:
    """Return a synthesised word ``(S,)`` of unit power, in the middle of a second.

    Raises:
        SystemExit: There is no espeak-ng.
    """
    path = cache / f"{word}-{voice}-{words_a_minute}.wav"
    if not path.is_file():
        program = shutil.which("espeak-ng")
        if program is None:
            raise SystemExit(
                "error: this example's words are synthesised by espeak-ng, which is not installed. On Debian: "
                "apt-get install espeak-ng"
            )
        partial = path.with_suffix(".part")
        command = [program, "-v", voice, "-s", str(words_a_minute), "-w", str(partial), word]
        subprocess.run(command, check=True, capture_output=True)
        partial.rename(path)
    with wave.open(str(path)) as file:
        samples = np.frombuffer(file.readframes(file.getnframes()), dtype=np.int16)
    wave_S = torch.from_numpy(samples.astype(np.float32))[:NUM_SAMPLES]
    before = (NUM_SAMPLES - len(wave_S)) // 2
    return unit_power(F.pad(wave_S, (before, NUM_SAMPLES - len(wave_S) - before)))


def unit_power(waves: Tensor) -> Tensor:
    """Return sounds ``(..., S)`` whose root mean square is 1."""
    return waves / waves.square().mean(-1, keepdim=True).sqrt()


def main(overrides: Sequence[str] = ()) -> None:
    start(RUN)
    cli = fit(CONFIG, overrides)
    ours, pair = (LastSearch.under(RUN / name, cli.model) for name in ("merges", "merges-pair"))

    def accuracy(module: Recogniser) -> float:
        hits = [(module(x).argmax(1) == y).float().mean() for x, y in cli.datamodule.test_dataloader()]
        return float(torch.stack(hits).mean())

    measured = {name: measure(cli, w, extras={"accuracy": accuracy}) for name, w in contenders(ours, pair).items()}
    conclude("Cross-entropy in nats", measured, ours, pair, RUN)


if __name__ == "__main__":
    main(command_line())

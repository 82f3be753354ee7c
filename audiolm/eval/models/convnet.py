"""Convolutional classifier of log-mels, for speakers and for generated sound (paper IV-C, IV-D).

Blocks of a convolution along time and one along frequency, each with ReLU and batch norm, then pooling by 2 on both.  The
paper's six blocks have up to 512 channels; these have fewer and a stride in the first, so that a CPU core trains one in a
minute.  Logits are means over time: training uses crops, scoring whole sounds of any length.
`trained` keeps its networks in a folder (safetensors + JSON), named by a hash of sounds and settings.
Shapes: wav_T; mel_BTF; logits_BC.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save
from torch import nn

from audiolm import rng, store
from audiolm.models.mel import HOP, clip_mel
from audiolm.tokenizers.base import SAMPLE_RATE

FORMAT = 1
GAIN = 0.7  # nats that a crop is made louder or softer at most (6 dB), so that loudness is no cue
MASK_T, MASK_F = 0.2, 0.2  # largest masked share of a crop (SpecAugment, 1904.08779)
EVERY = 20  # steps between reports


@dataclass(frozen=True)
class Settings:
    """Settings of a network and its training."""

    crop_s: float = 1.0
    channels: tuple[int, ...] = (16, 32, 64, 64, 128)
    mels: int = 80
    steps: int = 400
    batch: int = 32
    lr: float = 2e-3
    dropout: float = 0.2
    seed: int = 0


class ConvNet(nn.Module):
    """mel_BTF -> logits_BC."""

    def __init__(self, classes: int, settings: Settings):
        super().__init__()
        blocks, last = [], 1
        for width in settings.channels:
            stride = 2 if last == 1 else 1
            blocks += [nn.Conv2d(last, width, (3, 1), (stride, 1), (1, 0)), nn.ReLU(), nn.BatchNorm2d(width),
                       nn.Conv2d(width, width, (1, 3), (1, stride), (0, 1)), nn.ReLU(), nn.BatchNorm2d(width),
                       nn.MaxPool2d(2, ceil_mode=True)]
            last = width
        # this layout is three times as fast on a CPU as the default
        self.blocks = nn.Sequential(*blocks).to(memory_format=torch.channels_last)
        self.dropout, self.head = nn.Dropout(settings.dropout), nn.Linear(last, classes)
        self.register_buffer("mean_F", torch.zeros(settings.mels))
        self.register_buffer("std_F", torch.ones(settings.mels))

    def forward(self, mel_BTF: torch.Tensor) -> torch.Tensor:
        return self.logits((mel_BTF - self.mean_F) / self.std_F)

    def logits(self, x_BTF: torch.Tensor) -> torch.Tensor:
        """logits_BC of normalised mels."""
        return self.head(self.dropout(self.blocks(x_BTF[:, None].contiguous(memory_format=torch.channels_last)).mean((2, 3))))


@torch.inference_mode()
def log_probs(net: ConvNet, wav_T: np.ndarray) -> np.ndarray:
    """(C,) log-probabilities of a whole sound."""
    return net(clip_mel(wav_T, len(net.mean_F))[None].to(net.mean_F.device)).log_softmax(1)[0].cpu().numpy()


def trained(folder: str, wavs: Sequence[np.ndarray], labels: Sequence[int], names: Sequence[str], settings: Settings,
            device: str = "cpu", progress: Callable[[int, int, str], None] | None = None) -> tuple[ConvNet, str]:
    """(network, its folder): a classifier of wavs[i] as names[labels[i]], loaded from `folder` where it was trained before.

    Raises ValueError where a name has no sound.
    """
    if silent := sorted(set(range(len(names))) - set(labels)):
        raise ValueError(f"{names[silent[0]]!r} has no sound to learn from: give some, or leave the name out")
    # The hash covers all that decides the weights, so a folder never serves another set of sounds.
    about = json.dumps([FORMAT, asdict(settings), list(map(int, labels)), list(names)])
    digest = hashlib.blake2b(about.encode(), digest_size=16)
    for wav in wavs:
        digest.update(hashlib.blake2b(np.ascontiguousarray(wav, np.float32).tobytes(), digest_size=16).digest())
    path = store.join(folder, digest.hexdigest())
    if not store.exists(store.join(path, "config.json")):
        save_net(path, fit(wavs, labels, len(names), settings, device, progress), names, settings)
    return load_net(path, device)[0], path


def fit(wavs: Sequence[np.ndarray], labels: Sequence[int], classes: int, settings: Settings, device: str = "cpu",
        progress: Callable[[int, int, str], None] | None = None) -> ConvNet:
    """A trained network. Each row of a batch is a class, one of its sounds and a crop of it, drawn from (seed, step)."""
    mels = [clip_mel(wav, settings.mels) for wav in wavs]
    of_class = [[i for i, label in enumerate(labels) if label == c] for c in range(classes)]
    frames = round(settings.crop_s * SAMPLE_RATE / HOP)
    # A generator of its own, so that training here leaves the caller's random state alone.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rng.derive(settings.seed, "conv net"))
        net = ConvNet(classes, settings)
        # bands are normalised by the training sounds; the network keeps both numbers
        std_F, mean_F = torch.std_mean(torch.cat(mels), 0)
        net.mean_F.copy_(mean_F)
        net.std_F.copy_(std_F.clamp_min(1e-3))
        net.to(device).train()
        adam = torch.optim.AdamW(net.parameters(), lr=settings.lr, weight_decay=0.01)
        ramp = torch.optim.lr_scheduler.OneCycleLR(adam, settings.lr, total_steps=settings.steps + 1, pct_start=0.2)
        for step in range(settings.steps):
            g = rng.generator(settings.seed, "conv net", step)
            label_B = g.integers(classes, size=settings.batch)
            x_BTF = torch.stack([_crop(mels[g.choice(of_class[c])], frames, g) for c in label_B])
            x_BTF = _masked((x_BTF - mean_F) / net.std_F.cpu(), g)
            loss = F.cross_entropy(net.logits(x_BTF.to(device)), torch.from_numpy(label_B).to(device))
            adam.zero_grad()
            loss.backward()
            adam.step()
            ramp.step()
            if progress and (step + 1) % EVERY == 0:
                progress(step + 1, settings.steps, f"steps, loss {loss.item():.3f}")
    return net.eval()


def _crop(mel_TF: torch.Tensor, frames: int, g: np.random.Generator) -> torch.Tensor:
    """A random crop at another loudness; a shorter sound is repeated."""
    if len(mel_TF) < frames:
        mel_TF = mel_TF.repeat(-(-frames // len(mel_TF)), 1)
    start = g.integers(len(mel_TF) - frames + 1)
    return mel_TF[start:start + frames] + float(g.uniform(-GAIN, GAIN))


def _masked(x_BTF: torch.Tensor, g: np.random.Generator) -> torch.Tensor:
    for x_TF in x_BTF:  # one stretch of time and one of frequency a row, set to the mean (0 after normalisation)
        for axis, share in ((0, MASK_T), (1, MASK_F)):
            size = x_TF.shape[axis]
            width = int(g.integers(int(share * size) + 1))
            x_TF.narrow(axis, int(g.integers(size - width + 1)), width).zero_()
    return x_BTF


def save_net(path: str, net: ConvNet, names: Sequence[str], settings: Settings) -> None:
    store.put(store.join(path, "model.safetensors"), save({k: v.cpu().contiguous() for k, v in net.state_dict().items()}))
    store.put_json(store.join(path, "config.json"), {"kind": "convnet", "format": FORMAT, "sample_rate": SAMPLE_RATE,
                                                     "classes": list(names), "settings": asdict(settings)})


def load_net(path: str, device: str = "cpu") -> tuple[ConvNet, list[str]]:
    """(the network, its classes' names). Raises FileNotFoundError where there is none, ValueError for another format."""
    about = store.get_json(store.join(path, "config.json"))
    if about is None:
        raise FileNotFoundError(f"{path} holds no config.json: give the folder of a trained classifier")
    if (about.get("kind"), about.get("format")) != ("convnet", FORMAT):
        raise ValueError(f"{path} holds a {about.get('kind')!r} of format {about.get('format')}, expected a convnet of format "
                         f"{FORMAT}: train it again")
    settings = Settings(**{**about["settings"], "channels": tuple(about["settings"]["channels"])})
    net = ConvNet(len(about["classes"]), settings)
    with tempfile.TemporaryDirectory() as folder:
        net.load_state_dict(load_file(store.local_copy(store.join(path, "model.safetensors"), folder)))
    return net.to(device).eval(), about["classes"]

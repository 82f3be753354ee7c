"""Semantic tokens: encoder features at one layer, z-scored per dimension, then the nearest centroid (paper III-B).

ONE self-describing artefact, {kmeans build}/export/: model.safetensors (`encoder.*`, `zscore.mean`, `zscore.std`,
`centroids`) and config.json (format, family, encoder sizes, layer and its convention, sample rate, k, sha256 of the
weights, golden tokens).  Whatever does not match is refused on load.  Legend: wav_BT float32 at 16 kHz, lengths_B true
samples, mel_BTF at 100 Hz, features_BTD and codes_T1 at 25 Hz.
"""

from __future__ import annotations

import hashlib
import json
import math

import torch
from safetensors.torch import load, save

from audiolm import store
from audiolm.models import kmeans
from audiolm.models.masked import LAYER_CONVENTION, Encoder, EncoderSizes
from audiolm.models.mel import log_mel
from audiolm.tokenizers.base import SAMPLE_RATE, SEMANTIC_HOP, TokenSpec, padded_samples

FORMAT = "audiolm-semantic-1"
FAMILY = "masked-conformer"
GOLDEN_S = 2.0
SURE = 1e-3  # golden frames nearer to a tie than this may differ between processors


class ArtefactError(ValueError):
    """An export that is incomplete, altered, or of another kind; the text names the path, the field and the fix."""


def mel_of(wav_BT: torch.Tensor, lengths_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """mel_BTF (100 Hz) and frames_B (25 Hz): audio past a row's length counts as silence, rows end on whole frames."""
    lengths_B = lengths_B.to(wav_BT.device)
    target = padded_samples(int(lengths_B.max()))
    wav_BT = torch.nn.functional.pad(wav_BT[:, :target].float(), (0, max(0, target - wav_BT.shape[1])))
    inside_BT = torch.arange(target, device=wav_BT.device)[None] < lengths_B[:, None]
    frames_B = ((lengths_B + SEMANTIC_HOP - 1) // SEMANTIC_HOP).clamp_min(1)
    return log_mel(wav_BT.masked_fill(~inside_BT, 0.0)), frames_B


def golden_clip() -> torch.Tensor:
    """wav_BT (1, GOLDEN_S): a gliding voice-like tone that changes vowel, from a formula alone."""
    t = torch.arange(int(GOLDEN_S * SAMPLE_RATE), dtype=torch.float64) / SAMPLE_RATE
    pitch = 110.0 + 40.0 * torch.sin(2 * math.pi * 0.7 * t)
    phase = 2 * math.pi * torch.cumsum(pitch / SAMPLE_RATE, 0)
    formant = 900.0 + 500.0 * torch.sin(2 * math.pi * 1.3 * t)
    voice = sum(torch.exp(-(((n * pitch - formant) / 350.0) ** 2)) * torch.sin(n * phase) for n in range(1, 24))
    hiss = torch.sin(1e4 * torch.sin(1e4 * t)) * (torch.sin(2 * math.pi * 2.1 * t) > 0.8)
    return (0.1 * voice + 0.05 * hiss).float()[None]


class SemanticTokenizer:
    """Frozen. `encode` gives tokens, `features` what was clustered (for ABX); both in float32 unless moved."""

    def __init__(self, encoder: Encoder, layer: int, mean_D: torch.Tensor, std_D: torch.Tensor,
                 centroids_KD: torch.Tensor, digest: str, device: str = "cpu"):
        self.device = torch.device(device)
        self.encoder, self.layer, self.hash = encoder.eval().requires_grad_(False).to(self.device), layer, digest
        self.mean_D, self.std_D = mean_D.to(self.device), std_D.to(self.device)
        self.centroids_KD = centroids_KD.to(self.device)
        self.spec = TokenSpec("semantic", SAMPLE_RATE, SEMANTIC_HOP, 1, len(centroids_KD))

    @torch.no_grad()
    def features(self, wav_BT: torch.Tensor, lengths_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Z-scored features_BTD (float32, on the tokenizer's device) and frames_B."""
        mel_BTF, frames_B = mel_of(wav_BT.to(self.device), lengths_B)
        x_BTD = self.encoder(mel_BTF, frames_B, None, self.layer)
        return (x_BTD.float() - self.mean_D) / self.std_D, frames_B

    def encode(self, wav_BT: torch.Tensor, lengths_B: torch.Tensor) -> list[torch.Tensor]:
        """codes_T1 (int64, on the CPU) of each row, T = padded_samples(length) / 640."""
        x_BTD, frames_B = self.features(wav_BT, lengths_B)
        codes_BT = kmeans.assign(x_BTD.flatten(0, 1), self.centroids_KD).view(x_BTD.shape[:2]).cpu()
        return [row[:n, None] for row, n in zip(codes_BT, frames_B.tolist(), strict=True)]


def read_export(build: str) -> tuple[dict[str, torch.Tensor], dict, str]:
    """(weights, config, digest) of {build}/export; the digest is of the bytes of both files. Raises ArtefactError."""
    data = []
    for name in ("model.safetensors", "config.json"):
        path = store.join(build, "export", name)
        try:
            data.append(store.get(path))
        except FileNotFoundError as e:
            raise ArtefactError(f"{path} is missing: the step that leaves it has not finished") from e
    weights, config = data[0], json.loads(data[1])
    expected = config.get("weights_sha256")
    if expected is not None and hashlib.sha256(weights).hexdigest() != expected:
        raise ArtefactError(f"{build}/export: model.safetensors is not the file that config.json describes (sha256 "
                            f"{expected[:16]}...); run the step that left it again")
    return load(weights), config, hashlib.sha256(data[0] + data[1]).hexdigest()[:16]


def load_encoder(build: str) -> tuple[Encoder, dict]:
    """The encoder of a masked model's export, in eval mode, and its config."""
    weights, config, _ = read_export(build)
    _require(build, config, "family", FAMILY)
    encoder = Encoder(EncoderSizes(**config["encoder"]))
    _load(build, encoder, weights)
    return encoder.eval(), config


def save_semantic(build: str, encoder: Encoder, layer: int, mean_D: torch.Tensor, std_D: torch.Tensor,
                  centroids_KD: torch.Tensor, source: dict) -> None:
    """Writes the artefact; blocks above `layer` are left out. `source` (plain JSON) says where it came from."""
    sizes = EncoderSizes(**{**encoder.sizes.to_json(), "layers": layer, "dropout": 0.0})
    kept = Encoder(sizes)
    state = encoder.state_dict()
    kept.load_state_dict({name: state[name] for name in kept.state_dict()})
    tokenizer = SemanticTokenizer(kept, layer, mean_D, std_D, centroids_KD, "")
    tokens, sure = _golden(tokenizer)
    weights = {f"encoder.{name}": value for name, value in kept.state_dict().items()}
    weights |= {"zscore.mean": mean_D, "zscore.std": std_D, "centroids": centroids_KD}
    data = save({name: value.detach().float().cpu().contiguous() for name, value in weights.items()})
    config = {
        "format": FORMAT, "family": FAMILY, "encoder": sizes.to_json(), "layer": layer,
        "layer_convention": LAYER_CONVENTION, "sample_rate": SAMPLE_RATE, "hop": SEMANTIC_HOP, "k": len(centroids_KD),
        "weights_sha256": hashlib.sha256(data).hexdigest(), "source": source,
        "golden": {"clip": f"golden_clip, {GOLDEN_S} s", "tokens": tokens.tolist(), "sure": sure.int().tolist()},
    }
    store.put(store.join(build, "export", "model.safetensors"), data)
    store.put_json(store.join(build, "export", "config.json"), config)


def load_semantic(kmeans_path: str, device: str = "cpu") -> SemanticTokenizer:
    """The tokenizer of a finished kmeans build. Raises ArtefactError where anything does not match."""
    weights, config, digest = read_export(kmeans_path)
    for field, value in (("format", FORMAT), ("family", FAMILY), ("layer_convention", LAYER_CONVENTION),
                         ("sample_rate", SAMPLE_RATE), ("hop", SEMANTIC_HOP)):
        _require(kmeans_path, config, field, value)
    sizes, layer, centroids = EncoderSizes(**config["encoder"]), config["layer"], weights["centroids"]
    if not 1 <= layer <= sizes.layers:
        raise ArtefactError(f"{kmeans_path}: layer {layer} is not one of the encoder's {sizes.layers} blocks")
    if centroids.shape != (config["k"], sizes.dim):
        raise ArtefactError(f"{kmeans_path}: centroids are {tuple(centroids.shape)}, config says k = {config['k']} "
                            f"and dim = {sizes.dim}; run the kmeans step again (--force kmeans)")
    encoder = Encoder(sizes)
    _load(kmeans_path, encoder, weights)
    parts = (layer, weights["zscore.mean"], weights["zscore.std"], centroids, digest)
    tokenizer = SemanticTokenizer(encoder, *parts)
    tokens, _ = _golden(tokenizer)
    golden = torch.tensor(config["golden"]["tokens"])
    sure = torch.tensor(config["golden"]["sure"], dtype=torch.bool)
    if golden.shape != tokens.shape or not torch.equal(tokens[sure], golden[sure]):
        wrong = "another number" if golden.shape != tokens.shape else f"{int((tokens != golden)[sure].sum())}"
        raise ArtefactError(f"{kmeans_path}: {wrong} of the {len(golden)} golden tokens differ: weights, layer, "
                            "z-score or centroids do not belong together; run the kmeans step again (--force kmeans)")
    return tokenizer if device == "cpu" else SemanticTokenizer(encoder, *parts, device)


def _golden(tokenizer: SemanticTokenizer) -> tuple[torch.Tensor, torch.Tensor]:
    wav_BT = golden_clip()
    x_BTD, _ = tokenizer.features(wav_BT, torch.tensor([wav_BT.shape[1]]))
    return (kmeans.assign(x_BTD[0], tokenizer.centroids_KD),
            kmeans.margins(x_BTD[0], tokenizer.centroids_KD) > SURE)


def _require(build: str, config: dict, field: str, value) -> None:
    if config.get(field) != value:
        raise ArtefactError(f"{build}/export/config.json: {field} is {config.get(field)!r}, this code reads {value!r}; "
                            "run the step that left it again, or use the version of audiolm that wrote it")


def _load(build: str, encoder: Encoder, weights: dict[str, torch.Tensor]) -> None:
    state = {n.removeprefix("encoder."): w for n, w in weights.items() if n.startswith("encoder.")}
    try:
        encoder.load_state_dict(state)
    except RuntimeError as e:
        raise ArtefactError(f"{build}/export: the weights do not fit the encoder in config.json: {e}") from e

"""Semantic tokens: encoder features, z-scored, then the nearest centroid (2209.03143, III-B).

One self-describing export, {kmeans build}/export/. model.safetensors holds `encoder.*` with the
input's statistics, `zscore.mean`, `zscore.std` and `centroids`. config.json holds format, family,
encoder sizes, layer and its convention, sample rate, k, window, the weights' sha256 and golden
tokens. Loading refuses parts that do not belong together.
Legend: wav_BT float32 at 16 kHz, lengths_B true samples, features_BTD and codes_T1 at 25 Hz.
"""

from __future__ import annotations

import copy
import math

import torch

from audiolm.models import kmeans
from audiolm.models.conformer import LAYER_CONVENTION, Encoder, EncoderSizes
from audiolm.models.transfer import send
from audiolm.tokenizers import hf_encoder
from audiolm.tokenizers.artifact import MASKED_FORMAT, ArtifactError, read_export, write_export
from audiolm.tokenizers.base import SAMPLE_RATE, SEMANTIC_HOP, TokenSpec
from audiolm.tokenizers.extractor import FAMILY, ConformerExtractor, Extractor, Window, frames_of, windowed
from audiolm.tokenizers.start import require_unchanged

FORMAT = "audiolm-semantic-2"
GOLDEN_S = 2.0  # 50 tokens: enough to notice a wrong layer or z-score, and quick on a CPU
SURE = 1e-3  # golden frames nearer to a tie than this may differ between processors


def golden_clip() -> torch.Tensor:
    """wav_BT (1, GOLDEN_S): a gliding voice-like tone that changes vowel, from a formula alone.

    It crosses many centroids and needs no file. Its tokens, kept in the export, are encoded again
    on every load.
    """
    t = torch.arange(int(GOLDEN_S * SAMPLE_RATE), dtype=torch.float64) / SAMPLE_RATE
    pitch = 110.0 + 40.0 * torch.sin(2 * math.pi * 0.7 * t)
    phase = 2 * math.pi * torch.cumsum(pitch / SAMPLE_RATE, 0)
    formant = 900.0 + 500.0 * torch.sin(2 * math.pi * 1.3 * t)
    # Harmonics up to the 23rd under a moving formant, then bursts of hiss.
    voice = sum(torch.exp(-(((n * pitch - formant) / 350.0) ** 2)) * torch.sin(n * phase) for n in range(1, 24))
    hiss = torch.sin(1e4 * torch.sin(1e4 * t)) * (torch.sin(2 * math.pi * 2.1 * t) > 0.8)
    return (0.1 * voice + 0.05 * hiss).float()[None]


class SemanticTokenizer:
    """A frozen Tokenizer of one level.

    `encode` gives tokens, `features` the vectors that are clustered (for ABX).
    """

    def __init__(self, extractor: Extractor, layer: int, mean_D: torch.Tensor, std_D: torch.Tensor,
                 centroids_KD: torch.Tensor, window: Window, digest: str, device: str = "cpu",
                 dtype: torch.dtype = torch.float32):
        self.device = torch.device(device)
        self.extractor, self.layer, self.window, self.hash = extractor.to(self.device, dtype), layer, window, digest
        self.mean_D, self.std_D = mean_D.to(self.device), std_D.to(self.device)
        self.centroids_KD = centroids_KD.to(self.device)
        self.spec = TokenSpec("semantic", SAMPLE_RATE, SEMANTIC_HOP, 1, len(centroids_KD))

    @torch.no_grad()
    def features(self, wav_BT: torch.Tensor, lengths_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Z-scored features_BTD (float32, on the tokenizer's device) and frames_B."""
        (x_BTD,), frames_B = windowed(self.extractor, send(wav_BT, self.device), lengths_B, [self.layer], self.window)
        # The statistics of the fit, not of this clip: tokens of a clip do not depend on what else
        # it contains.
        return (x_BTD - self.mean_D) / self.std_D, frames_B

    def encode(self, wav_BT: torch.Tensor, lengths_B: torch.Tensor) -> list[torch.Tensor]:
        """codes_T1 (int64, on the CPU) of each row, T = padded_samples(length) / 640."""
        codes_BT, _ = self.codes(wav_BT, lengths_B)
        return [row[:n, None] for row, n in zip(codes_BT.cpu(), frames_of(lengths_B), strict=True)]

    def codes(self, wav_BT: torch.Tensor, lengths_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """codes_BT and frames_B, on the tokenizer's device. Ignore codes past a row's frames.
        """
        x_BTD, frames_B = self.features(wav_BT, lengths_B)
        return kmeans.assign(x_BTD.flatten(0, 1), self.centroids_KD).view(x_BTD.shape[:2]), frames_B


def load_extractor(build: str, device: str = "cpu") -> Extractor:
    """The encoder of a masked model's or a tokenizer's export. Raises ArtifactError.
    """
    weights, config, _ = read_export(build)
    _require(build, config, "format", FORMAT if config.get("format") == FORMAT else MASKED_FORMAT)
    _require(build, config, "sample_rate", SAMPLE_RATE)
    return _extractor(build, weights, config).to(device)


def save_semantic(build: str, extractor: Extractor, layer: int, mean_D: torch.Tensor, std_D: torch.Tensor,
                  centroids_KD: torch.Tensor, window: Window, source: dict) -> None:
    """Writes the export without the blocks above `layer`.

    `source` (plain JSON) says how the centroids were fitted.
    """
    # Golden tokens come from the truncated encoder, which is the one that loading rebuilds.
    kept = extractor.truncated(layer)
    tokens, sure = _golden(SemanticTokenizer(kept, layer, mean_D, std_D, centroids_KD, window, ""))
    weights = {f"encoder.{name}": value for name, value in kept.state().items()}
    weights |= {"zscore.mean": mean_D, "zscore.std": std_D, "centroids": centroids_KD}
    write_export(build, {name: value.float() for name, value in weights.items()}, {
        "format": FORMAT, **kept.to_json(), "layer": layer, "sample_rate": SAMPLE_RATE, "hop": SEMANTIC_HOP,
        "k": len(centroids_KD), "window_frames": window.frames, "overlap_frames": window.overlap, "source": source,
        "golden": {"clip": f"golden_clip, {GOLDEN_S} s", "tokens": tokens.tolist(), "sure": sure.int().tolist()},
    })


def take_over(config: dict, inputs: dict, out) -> dict:
    """Step fn: config {"start": StartWeights} -> facts. Leaves a trained tokenizer's export as it is.

    Raises ArtifactError where it is not the planned one any more, or does not load.
    """
    start = config["start"]
    tokenizer = load_semantic(start.uri)
    require_unchanged(start, tokenizer.hash)
    weights, about, _ = read_export(start.uri)
    out.check()
    write_export(out.path, weights, {name: value for name, value in about.items() if name != "weights_sha256"})
    return {"k": tokenizer.spec.vocab, "layer": tokenizer.layer, "digest": start.digest}


def load_semantic(kmeans_path: str, device: str = "cpu", dtype: str = "float32") -> SemanticTokenizer:
    """The tokenizer of a finished kmeans build.

    The encoder computes in `dtype` (float32 or bfloat16).

    Raises ArtifactError where format, rate, shapes or golden tokens do not match.
    """
    weights, config, digest = read_export(kmeans_path)
    for field, value in (("format", FORMAT), ("sample_rate", SAMPLE_RATE), ("hop", SEMANTIC_HOP)):
        _require(kmeans_path, config, field, value)
    missing = [f for f in ("layer", "k", "window_frames", "overlap_frames", "golden") if f not in config]
    missing += [name for name in ("zscore.mean", "zscore.std", "centroids") if name not in weights]
    if missing:
        raise ArtifactError(f"{kmeans_path}/export lacks {', '.join(missing)}; run the kmeans step again (--force kmeans)")
    extractor = _extractor(kmeans_path, weights, config)
    layer, k, dim = config["layer"], config["k"], extractor.dim
    if not 1 <= layer <= extractor.layers:
        raise ArtifactError(f"{kmeans_path}: layer {layer} is not one of the encoder's {extractor.layers} blocks")
    for name, shape in (("zscore.mean", (dim,)), ("zscore.std", (dim,)), ("centroids", (k, dim))):
        if weights[name].shape != shape:
            raise ArtifactError(f"{kmeans_path}: {name} has shape {tuple(weights[name].shape)}, config says k = {k} and dim = "
                                f"{dim}; run the kmeans step again (--force kmeans)")
    window = Window(config["window_frames"], config["overlap_frames"])
    parts = (layer, weights["zscore.mean"], weights["zscore.std"], weights["centroids"], window, digest)
    # Golden tokens are checked in float32 on the CPU, as they were made, and then the encoder
    # moves.
    tokenizer = SemanticTokenizer(extractor, *parts)
    tokens, _ = _golden(tokenizer)
    golden = torch.tensor(config["golden"]["tokens"])
    sure = torch.tensor(config["golden"]["sure"], dtype=torch.bool)
    if golden.shape != tokens.shape or not torch.equal(tokens[sure], golden[sure]):
        wrong = "another number" if golden.shape != tokens.shape else f"{int((tokens != golden)[sure].sum())}"
        raise ArtifactError(f"{kmeans_path}: {wrong} of the {len(golden)} golden tokens differ: weights, layer, "
                            "z-score or centroids do not belong together; run the kmeans step again (--force kmeans)")
    return SemanticTokenizer(extractor, *parts, device, getattr(torch, dtype))


def _golden(tokenizer: SemanticTokenizer) -> tuple[torch.Tensor, torch.Tensor]:
    """codes_T of the golden clip, and True where the nearest centroid is clearly the nearest.
    """
    wav_BT = golden_clip()
    x_BTD, _ = tokenizer.features(wav_BT, torch.tensor([wav_BT.shape[1]]))
    return (kmeans.assign(x_BTD[0], tokenizer.centroids_KD),
            kmeans.margins(x_BTD[0], tokenizer.centroids_KD) > SURE)


def _require(build: str, config: dict, field: str, value) -> None:
    if config.get(field) != value:
        raise ArtifactError(f"{build}/export/config.json: {field} is {config.get(field)!r}, this code reads {value!r}; "
                            "run the step that left it again, or use the version of audiolm that wrote it")


def _extractor(build: str, weights: dict[str, torch.Tensor], config: dict) -> Extractor:
    family = config.get("family")
    if family == FAMILY:
        _require(build, config, "layer_convention", LAYER_CONVENTION)
    try:
        return extractor_from_export(config, {name.removeprefix("encoder."): value for name, value in weights.items()
                                              if name.startswith("encoder.")})
    except ArtifactError:
        raise
    except (KeyError, TypeError, ValueError, RuntimeError) as e:
        raise ArtifactError(f"{build}/export: the weights do not fit the encoder in config.json (family {family!r}): "
                            f"{e}") from e


def extractor_from_export(config: dict, weights: dict[str, torch.Tensor]) -> Extractor:
    """The extractor of `to_json` and `state`; in float32 on the CPU.

    Raises KeyError, RuntimeError or ValueError where they do not fit.
    """
    if config["family"] == FAMILY:
        encoder = Encoder(EncoderSizes(**config["encoder"]))
        encoder.load_state_dict(weights)
        return ConformerExtractor(encoder)
    return hf_encoder.from_export(copy.deepcopy(config), weights)

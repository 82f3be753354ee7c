"""More levels of semantic tokens by residual k-means (2209.03143, Table I).

Level 1 is the tokenizer's own; each further level clusters what the levels before it leave. The
step `residual` fits them on frames sampled as `kmeans` samples them. {build}/export:
model.safetensors (`codebooks`, (levels - 1, K, D) float32) and config.json with the digest of the
kmeans export, without which it is refused.
Legend: wav_BT float32 at 16 kHz, lengths_B true samples, codes_TQ at 25 Hz, N frames, L levels, D
dimensions.
"""

from __future__ import annotations

import torch

from audiolm import rng
from audiolm.config.semantic import ResidualConfig
from audiolm.data.parallel import cluster_device
from audiolm.data.sources import roots
from audiolm.models import kmeans
from audiolm.tokenizers import kmeans_fit
from audiolm.tokenizers.artifact import ArtifactError, read_export, write_export
from audiolm.tokenizers.base import SAMPLE_RATE, SEMANTIC_HOP, TokenSpec
from audiolm.tokenizers.extractor import frames_of
from audiolm.tokenizers.semantic import SemanticTokenizer, load_semantic

FORMAT = "audiolm-residual-1"


class ResidualTokenizer:
    """A frozen Tokenizer with 1 + len(codebooks) levels. `hash_of(1)` is the plain tokenizer's."""

    def __init__(self, tokenizer: SemanticTokenizer, codebooks_LKD: torch.Tensor | None = None, digest: str | None = None):
        # Level 1 first, then the fitted ones: codes of any prefix of the levels decode.
        first_1KD = tokenizer.centroids_KD[None]
        self.tokenizer, self.residual_hash = tokenizer, digest
        self.books_LKD = first_1KD if codebooks_LKD is None else torch.cat([first_1KD, codebooks_LKD.to(first_1KD)])
        levels, k, _ = self.books_LKD.shape
        self.spec = TokenSpec("semantic", SAMPLE_RATE, SEMANTIC_HOP, levels, k)
        self.hash = self.hash_of(levels)

    def hash_of(self, levels: int) -> str:
        """The hash of the first `levels` levels; of level 1 it is the plain tokenizer's.
        """
        return self.tokenizer.hash if levels == 1 else f"{self.tokenizer.hash}+{self.residual_hash}"

    @torch.no_grad()
    def codes(self, wav_BT: torch.Tensor, lengths_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """codes_BTQ and frames_B, on the tokenizer's device. Ignore codes past a row's frames.
        """
        x_BTD, frames_B = self.tokenizer.features(wav_BT, lengths_B)
        return quantize(x_BTD.flatten(0, 1), self.books_LKD).view(*x_BTD.shape[:2], -1), frames_B

    def encode(self, wav_BT: torch.Tensor, lengths_B: torch.Tensor) -> list[torch.Tensor]:
        """codes_TQ (int64, on the CPU) of each row, T = padded_samples(length) / 640."""
        codes_BTQ, _ = self.codes(wav_BT, lengths_B)
        return [row[:n] for row, n in zip(codes_BTQ.cpu(), frames_of(lengths_B), strict=True)]

    def vectors_of(self, codes_TQ: torch.Tensor, levels: int | None = None) -> torch.Tensor:
        """(T, D) float32 on the CPU: the sum of the centroids of the first `levels` levels (None:
        all).
        """
        codes_TQ = codes_TQ[:, :levels]
        return sum(book_KD[code_T] for book_KD, code_T in zip(self.books_LKD.cpu(), codes_TQ.cpu().T, strict=False))


def quantize(x_ND: torch.Tensor, books_LKD: torch.Tensor) -> torch.Tensor:
    """codes_NL (int64): level by level, the nearest centroid to what the levels before it leave."""
    codes, rest_ND = [], x_ND
    for book_KD in books_LKD:
        code_N = kmeans.assign(rest_ND, book_KD)
        codes.append(code_N)
        rest_ND = rest_ND - book_KD[code_N]
    return torch.stack(codes, 1)


def load_residual(kmeans_path: str, residual_path: str | None = None, device: str = "cpu") -> ResidualTokenizer:
    """The tokenizer of a finished kmeans build, with a residual build's levels where one is given.

    Raises ArtifactError where they do not belong together.
    """
    tokenizer = load_semantic(kmeans_path, device)
    if residual_path is None:
        return ResidualTokenizer(tokenizer)
    weights, config, digest = read_export(residual_path)
    if config.get("format") != FORMAT:
        raise ArtifactError(f"{residual_path}/export/config.json: format is {config.get('format')!r}, this code reads "
                            f"{FORMAT!r}; give the path of a residual build, or run its step again (--force residual)")
    if config["kmeans"] != tokenizer.hash:
        raise ArtifactError(f"{residual_path}: its levels go on from the tokenizer {config['kmeans']}, {kmeans_path} is "
                            f"{tokenizer.hash}; give the kmeans build it was fitted on, or fit it again (--force residual)")
    books_LKD = weights["codebooks"]
    if books_LKD.shape != (config["levels"] - 1, *tokenizer.centroids_KD.shape):
        raise ArtifactError(f"{residual_path}: codebooks are {tuple(books_LKD.shape)}, expected {config['levels'] - 1} of "
                            f"{tuple(tokenizer.centroids_KD.shape)}; run its step again (--force residual)")
    return ResidualTokenizer(tokenizer, books_LKD, digest)


def fit_residual(config: dict, inputs: dict, out) -> dict:
    """Step fn: config {"residual", "where", "corpus", "seed", "cluster"}, inputs: manifest, kmeans
    -> facts: frames, levels, k and explained/qNN, the share of the features' variance that the
    levels up to NN hold.
    """
    settings, where, cluster = config["residual"], config["where"], config["cluster"]
    path = inputs["kmeans"].path
    tokenizer = load_semantic(path)
    source = kmeans_fit.FeatureSource(path, tokenizer.layer, tokenizer.window, inputs["manifest"].path, where,
                                      roots(config["corpus"]), config["seed"], cluster_device(cluster, out.inline))
    numbers = kmeans_fit.sample_features(source, settings.max_frames, out, cluster)
    return kmeans_fit.run_fit(fit_levels, (source, settings, numbers, out.path), source.device, out, cluster)


def fit_levels(source: kmeans_fit.FeatureSource, settings: ResidualConfig, numbers: list[int], out_path: str,
               report: kmeans_fit.Report) -> dict:
    """Fits levels 2 .. settings.levels on the files of features; leaves the export, returns the
    facts.
    """
    tokenizer = load_semantic(source.model)
    book_KD = tokenizer.centroids_KD.to(source.device)
    rests = kmeans_fit.read_features(out_path, numbers)
    for i, x_ND in enumerate(rests):  # shard by shard: the features are in memory once
        rests[i] = kmeans_fit.scaled(x_ND, tokenizer.mean_D, tokenizer.std_D).to(source.device)
    total, frames = _energy(rests), sum(map(len, rests))
    # One progress over all levels: `before` counts the iterations of the levels already fitted.
    tell = kmeans_fit.throttled(report, (settings.levels - 1) * settings.iterations, frames)
    books, facts = [], {"frames": frames, "levels": settings.levels, "k": len(book_KD)}
    for level in range(1, settings.levels + 1):
        if level > 1:  # level 1 has the tokenizer's own centroids, so its codes are the plain tokens
            before = (level - 2) * settings.iterations
            found = kmeans.fit(rests, len(book_KD), rng.derive(source.seed, "residual", level), settings.iterations,
                               on_iteration=lambda run, done, inertia, before=before: tell(before + done, inertia))
            book_KD = found.centroids.to(source.device)
            books.append(book_KD.cpu())
        for x_ND in rests:  # in place: the next level clusters what this one leaves
            x_ND -= book_KD[kmeans.assign(x_ND, book_KD)]
        facts[f"explained/q{level - 1:02d}"] = 1.0 - _energy(rests) / total
    write_export(out_path, {"codebooks": torch.stack(books)}, {
        "format": FORMAT, "levels": settings.levels, "k": len(book_KD), "kmeans": tokenizer.hash,
        "source": {"frames": frames, "seed": source.seed}})
    return facts


def _energy(shards: list[torch.Tensor]) -> float:
    """The sum of squares, in float64; after the z-score it is the variance times frames."""
    return sum(float(x.double().square().sum()) for x in shards)

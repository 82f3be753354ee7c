"""More levels of semantic tokens: k-means of what the levels before leave of the z-scored features (paper Table I).

Level 1 is the tokenizer's own.  The step `residual` fits the others, level after level, on frames sampled as `kmeans`
samples them, and leaves {build}/export: model.safetensors (`codebooks`, (levels - 1, K, D) float32) and config.json with
the digest of the kmeans artefact, without which it is refused.  Legend: wav_BT float32 at 16 kHz, lengths_B true samples,
codes_TQ at 25 Hz, N frames, L levels, D dimensions.
"""

from __future__ import annotations

import hashlib
import time
from functools import partial

import torch
from safetensors.torch import load, save

from audiolm import rng, store
from audiolm.config.semantic import ResidualConfig
from audiolm.data.clips import Clip, read_clips
from audiolm.data.parallel import cluster_device, parallel_map
from audiolm.data.sources import roots
from audiolm.models import kmeans
from audiolm.tokenizers import kmeans_fit
from audiolm.tokenizers.artifact import ArtifactError, read_export
from audiolm.tokenizers.base import SAMPLE_RATE, SEMANTIC_HOP, TokenSpec
from audiolm.tokenizers.semantic import SemanticTokenizer, load_semantic

FORMAT = "audiolm-residual-1"


class ResidualTokenizer:
    """Frozen; a Tokenizer with 1 + len(codebooks) levels. `hash_of(1)` is the plain tokenizer's."""

    def __init__(self, tokenizer: SemanticTokenizer, codebooks_LKD: torch.Tensor | None = None, digest: str | None = None):
        first_1KD = tokenizer.centroids_KD[None]
        self.tokenizer, self.residual_hash = tokenizer, digest
        self.books_LKD = first_1KD if codebooks_LKD is None else torch.cat([first_1KD, codebooks_LKD.to(first_1KD)])
        levels, k, _ = self.books_LKD.shape
        self.spec = TokenSpec("semantic", SAMPLE_RATE, SEMANTIC_HOP, levels, k)
        self.hash = self.hash_of(levels)

    def hash_of(self, levels: int) -> str:
        """The identity of the first `levels` levels."""
        return self.tokenizer.hash if levels == 1 else f"{self.tokenizer.hash}+{self.residual_hash}"

    @torch.no_grad()
    def codes(self, wav_BT: torch.Tensor, lengths_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """codes_BTQ and frames_B, where the tokenizer is; codes past a row's frames mean nothing."""
        x_BTD, frames_B = self.tokenizer.features(wav_BT, lengths_B)
        return quantize(x_BTD.flatten(0, 1), self.books_LKD).view(*x_BTD.shape[:2], -1), frames_B

    def encode(self, wav_BT: torch.Tensor, lengths_B: torch.Tensor) -> list[torch.Tensor]:
        """codes_TQ (int64, on the CPU) of each row, T = padded_samples(length) / 640."""
        codes_BTQ, frames_B = self.codes(wav_BT, lengths_B)
        return [row[:n] for row, n in zip(codes_BTQ.cpu(), frames_B.tolist(), strict=True)]

    def vectors_of(self, codes_TQ: torch.Tensor, levels: int | None = None) -> torch.Tensor:
        """(T, D) float32 on the CPU: the sum of the centroids of the first `levels` of the codes' levels (None: all)."""
        codes_TQ = codes_TQ[:, :levels]
        return sum(book_KD[code_T] for book_KD, code_T in zip(self.books_LKD.cpu(), codes_TQ.cpu().T, strict=False))


def quantize(x_ND: torch.Tensor, books_LKD: torch.Tensor) -> torch.Tensor:
    """codes_NL (int64): the nearest centroid of what the levels before it leave."""
    codes, rest_ND = [], x_ND
    for book_KD in books_LKD:
        code_N = kmeans.assign(rest_ND, book_KD)
        codes.append(code_N)
        rest_ND = rest_ND - book_KD[code_N]
    return torch.stack(codes, 1)


def load_residual(kmeans_path: str, residual_path: str | None = None, device: str = "cpu") -> ResidualTokenizer:
    """The tokenizer of a finished kmeans build, with the levels of a residual build of it where one is given. Raises
    ArtefactError where they do not belong together."""
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
    """Step fn: config {"residual", "where", "corpus", "seed", "cluster"}, inputs: manifest, kmeans -> facts: frames, levels, k
    and explained/qNN, the share of the features' variance that the levels up to NN hold."""
    settings, where, cluster, seed = config["residual"], config["where"], config["cluster"], config["seed"]
    path = inputs["kmeans"].path
    shards: dict[int, list[Clip]] = {}
    for clip in read_clips(inputs["manifest"].path, "train", where):
        shards.setdefault(clip.shard, []).append(clip)
    if not shards:
        raise ValueError(f"residual k-means needs train clips and the manifest has none for where = {where.source}: widen it")
    tokenizer, numbers, device = load_semantic(path), sorted(shards), cluster_device(cluster, out.inline)
    frames = [sum(kmeans_fit.frames_in(c) for c in shards[n]) for n in numbers]
    items = [(path, tokenizer.layer, tokenizer.window, shards[n], roots(config["corpus"]), n, quota, seed, out.path, device)
             for n, quota in zip(numbers, kmeans_fit.quotas_of(frames, settings.max_frames), strict=True)]
    parallel_map(kmeans_fit.sample_shard, items, out=out, cluster=cluster, unit="audio s", gpu=device == "cuda",
            sizes=[f * SEMANTIC_HOP / SAMPLE_RATE for f in frames])
    out.check()
    note = store.join(out.path, "iterations.json")
    store.remove(note)
    shown = kmeans_fit.Iterations(out, partial(store.get_json, note))
    say = shown.show if out.inline else partial(store.put_json, note)
    facts = parallel_map(fit_levels, [(path, settings, numbers, seed, out.path, device, say)], out=shown, cluster=cluster,
                    unit="fits", gpu=device == "cuda")[0]
    store.remove(note)
    return facts


def fit_levels(kmeans_path: str, settings: ResidualConfig, numbers: list[int], seed: int, out_path: str, device: str, say) -> dict:
    """Codebooks of levels 2 .. settings.levels from the files of features; leaves the artefact, returns the facts. `say` hears
    [iterations done, of, inertia per frame]."""
    tokenizer = load_semantic(kmeans_path)
    mean_D, std_D, book_KD = tokenizer.mean_D, tokenizer.std_D, tokenizer.centroids_KD.to(device)
    rests = [load(store.get(kmeans_fit.features_file(out_path, n)))["features"] for n in numbers]
    kmeans.check_finite(rests, numbers)
    for i, x_ND in enumerate(rests):  # shard by shard: the features are held once
        rests[i] = kmeans_fit.scaled(x_ND, mean_D, std_D).to(device)
    total, frames, told = _energy(rests), sum(map(len, rests)), time.monotonic()
    of = (settings.levels - 1) * settings.iterations
    books, facts = [], {"frames": frames, "levels": settings.levels, "k": len(book_KD)}
    for level in range(1, settings.levels + 1):
        def tell(run: int, done: int, inertia: float, before: int = (level - 2) * settings.iterations) -> None:
            nonlocal told
            if time.monotonic() - told > kmeans_fit.SHOW_S:
                told = time.monotonic()
                say([before + done, of, inertia / frames])

        if level > 1:
            found = kmeans.fit(rests, len(book_KD), rng.derive(seed, "residual", level), settings.iterations,
                               on_iteration=tell)
            book_KD = found.centroids.to(device)
            books.append(book_KD.cpu())
        for x_ND in rests:
            x_ND -= book_KD[kmeans.assign(x_ND, book_KD)]
        facts[f"explained/q{level - 1:02d}"] = 1.0 - _energy(rests) / total
    data = save({"codebooks": torch.stack(books)})
    store.put(store.join(out_path, "export", "model.safetensors"), data)
    store.put_json(store.join(out_path, "export", "config.json"), {
        "format": FORMAT, "levels": settings.levels, "k": len(book_KD), "kmeans": tokenizer.hash,
        "weights_sha256": hashlib.sha256(data).hexdigest(), "source": {"frames": frames, "seed": seed}})
    return facts


def _energy(shards: list[torch.Tensor]) -> float:
    return sum(float(x.double().square().sum()) for x in shards)

"""The steps `semantic_tokens` and `acoustic_tokens`: clips to tokens, one task a shard.

A task forms batches by a rule of the shard alone, decodes the next batch while one is encoded, and
writes one file; a finished file with the same metadata is skipped. Clips are encoded whole (the
semantic tokenizer cuts long ones into windows), and codes_TQ of a clip has padded_samples(n) / hop
frames. Copies at other speeds (tokens.speeds) have batches of their own, so that they change no
clip's tokens. Facts count them in `copies` and the seconds alone. A collapsed tokenizer (fewer than
two codes in use) is an error.
A clip whose file is gone, or is not what the manifest saw, is rejected: the shard's footer names it,
silence stands in its row, and no language model reads it. The others have the tokens that they would
have without it.
"""

from __future__ import annotations

import functools
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from audiolm import store
from audiolm.data import tokens
from audiolm.data.audio_check import file_hash
from audiolm.data.clips import Clip, read_clip, token_clips
from audiolm.data.manifest import read_listing
from audiolm.data.parallel import cluster_device, parallel_map
from audiolm.data.parquet import DamagedFile, read_table
from audiolm.data.sources import locate, roots
from audiolm.tokenizers.base import ACOUSTIC_HOP, SAMPLE_RATE, SEMANTIC_HOP, TokenSpec, pad_rows, padded_samples
from audiolm.tokenizers.encode_facts import TOKENIZER, facts_of, rejected_facts, shard_facts

READERS = 4  # threads that decode audio, which runs outside the GIL
HOP = {"semantic": SEMANTIC_HOP, "acoustic": ACOUSTIC_HOP}


@dataclass(frozen=True)
class EncodeJob:
    """Settings that all shards' tasks of a step share."""

    which: str  # "semantic" or "acoustic"
    tokenizer: str  # the tokenizer's build
    folders: dict[str, str]  # source name -> root of its audio
    manifest: str  # id of the manifest's build
    shards: int
    out_path: str
    batch_s: float
    device: str
    dtype: str = "float32"
    speeds: Sequence[float] = ()


Hashes = dict[tuple[str, str], str]  # (origin, uri) -> content_hash, as the manifest saw the file


def encode_tokens(config: dict[str, Any], inputs: dict[str, Any], out: Any) -> dict[str, Any]:
    """Step function. config: which ("semantic" or "acoustic"), tokens, corpus, cluster, seed;
    inputs: manifest and the tokenizer's artifact. Writes shard files into out.path; returns counts,
    speed and code usage per level.

    Raises tokens.TokenError for frames that break the contract, for a collapsed tokenizer and for more rejected clips than
    corpus.max_rejected allows.
    """
    which, cluster, settings = config["which"], config["cluster"], config["tokens"]
    by_shard: dict[int, list[Clip]] = {}
    for clip in token_clips(inputs["manifest"].path, settings.speeds):
        by_shard.setdefault(clip.shard, []).append(clip)
    if sorted(by_shard) != list(range(len(by_shard))):
        raise tokens.TokenError(f"the manifest's shards are {sorted(by_shard)[:10]}..., expected 0, 1, 2, ...")
    # Codecs run in float32, without TF32 and not compiled, as for a prompt later: rounded latents get other codes.
    job = EncodeJob(which, inputs[TOKENIZER[which]].path, roots(config["corpus"]), inputs["manifest"].build, len(by_shard),
                    out.path, settings.batch_s, cluster_device(cluster, out.inline),
                    settings.dtype if which == "semantic" else "float32", settings.speeds)
    listing = read_listing(inputs["manifest"].path)
    hashes = [{(c.origin, p.uri): listing[c.origin, p.uri]["hash"] for c in by_shard[k] for p in c.parts}
              for k in sorted(by_shard)]
    began = time.monotonic()
    sizes = [sum(c.seconds for c in by_shard[k]) for k in sorted(by_shard)]
    parts = parallel_map(encode_shard, [(job, by_shard[k], k, hashes[k]) for k in sorted(by_shard)], out=out, cluster=cluster,
                         unit="audio s", sizes=sizes, gpu=cluster.gpus_a_task if job.device == "cuda" else 0)
    return {**facts_of(which, parts, sizes, time.monotonic() - began), **rejected_facts(parts, config["corpus"])}


def encode_shard(job: EncodeJob, clips: list[Clip], shard: int, hashes: Hashes) -> dict[str, Any]:
    """One task: `clips` of a shard, and its copies behind them, to its file, unless it is there.

    Returns the counts of `encode_facts.shard_facts`, and the rejected clips with the reasons. A file with rejected ones is no
    finished one.
    """
    tokenizer, which = load_tokenizer(job.which, job.tokenizer, job.device, job.dtype), job.which
    spec: TokenSpec = tokenizer.spec
    if spec.sample_rate != SAMPLE_RATE or spec.hop != HOP[which]:
        raise tokens.TokenError(f"{which} tokenizer {spec.name!r} has {spec.sample_rate} Hz and hop {spec.hop}, "
                                f"expected {SAMPLE_RATE} and {HOP[which]} (25 and 50 frames a second)")
    # Everything that can change a token is in the file's metadata, so a file is skipped only where
    # all of it is equal.
    meta = {"which": which, "spec": spec.to_json(), "hash": tokenizer.hash, "manifest": job.manifest, "shards": job.shards,
            "speeds": list(job.speeds), "device": job.device, "dtype": job.dtype,
            "versions": {"torch": torch.__version__, "numpy": np.__version__}}
    path = store.join(job.out_path, tokens.shard_name(shard))
    done = _is_done(path, {**meta, "shard": shard, "clips": len(clips), "rejected": []})
    rejected: dict[str, str] = {}  # clip id -> reason
    if not done:
        codes = []
        read = functools.partial(_read_unchanged, roots=job.folders, hashes=hashes, rejected=rejected)
        for speed in (1, *job.speeds):
            same = [c for c in clips if c.speed == speed]
            codes += encode_clips(same, tokenizer, read, job.batch_s, job.device)
        store.put(path, tokens.shard_bytes([c.id for c in clips], codes, meta, shard, which == "semantic", sorted(rejected)))
    own = sum(c.speed == 1 for c in clips)
    return {**shard_facts(path, spec, which, own), "copies": len(clips) - own, "skipped": int(done), "rejected": rejected}


def _read_unchanged(clip: Clip, roots: dict[str, str], hashes: Hashes, rejected: dict[str, str]) -> np.ndarray:
    """wav_T of a clip whose files are what the manifest saw; else silence as long, and the reason in `rejected`."""
    try:
        for uri in dict.fromkeys(p.uri for p in clip.parts):
            path = locate(roots[clip.origin], uri)
            if file_hash(path) != hashes[clip.origin, uri]:
                raise ValueError(f"{path} is no longer what the manifest saw")
        return read_clip(clip, roots)
    except FileNotFoundError:
        rejected[clip.id] = f"{path} is gone"
    except ValueError as e:
        rejected[clip.id] = str(e)
    return np.zeros(clip.samples, np.float32)


def encode_clips(clips: list[Clip], tokenizer: Any, read: Callable[[Clip], np.ndarray], batch_s: float,
                 device: str) -> list[np.ndarray]:
    """codes_TQ of each clip, in the clips' order; `read` gives its wav_T, in threads."""
    codes: list[np.ndarray | None] = [None] * len(clips)
    batches = plan_batches([c.samples for c in clips], batch_s)
    readers = READERS if device == "cpu" else max(READERS, os.cpu_count() or 1)  # a GPU encodes faster than four threads decode
    for batch, wavs in zip(batches, _read_ahead(batches, clips, read, readers), strict=True):
        # Check each clip against the contract: one frame off would shift all tokens after it in the
        # stages.
        encoded = encode_batch(wavs, tokenizer)
        for i, wav, codes_TQ in zip(batch, wavs, encoded, strict=True):
            expected = padded_samples(len(wav)) // tokenizer.spec.hop
            if tuple(codes_TQ.shape) != (expected, tokenizer.spec.n_q):
                raise tokens.TokenError(
                    f"clip {clips[i].id}: tokenizer {tokenizer.spec.name!r} gave shape {tuple(codes_TQ.shape)} "
                    f"for {len(wav)} samples, expected {(expected, tokenizer.spec.n_q)} (padded_samples / hop, n_q)")
            codes[i] = codes_TQ.numpy()
    return codes


def encode_batch(wavs: Sequence[np.ndarray], tokenizer: Any) -> list[torch.Tensor]:
    """codes_TQ (on the CPU) of each wav_T, encoded as one batch; the tokenizer itself moves the audio to its device."""
    with torch.inference_mode():
        return tokenizer.encode(*pad_rows(wavs))


def _read_ahead(batches: list[list[int]], clips: list[Clip], read: Callable[[Clip], np.ndarray],
                readers: int) -> Iterator[list[np.ndarray]]:
    """The wavs of each batch; `readers` threads decode the next one while the caller encodes."""
    with ThreadPoolExecutor(readers) as pool:
        ahead: deque[list] = deque()
        for i, _ in enumerate(batches):
            for batch in batches[i + len(ahead):i + 2]:  # two batches are in memory, this one and the next
                ahead.append([pool.submit(read, clips[j]) for j in batch])
            yield [wav.result() for wav in ahead.popleft()]


def plan_batches(samples: list[int], batch_s: float) -> list[list[int]]:
    """Clips by length into batches of at most batch_s padded seconds (at least one clip each).

    Sorting by length keeps padding small; the index breaks ties, so the batches depend on the shard
    alone.
    """
    batches: list[list[int]] = []
    for i in sorted(range(len(samples)), key=lambda i: (samples[i], i)):
        length_s = padded_samples(samples[i]) / SAMPLE_RATE  # the longest so far
        if not batches or (len(batches[-1]) + 1) * length_s > batch_s:
            batches.append([])
        batches[-1].append(i)
    return batches


@functools.lru_cache(maxsize=1)  # a worker process encodes many shards
def load_tokenizer(which: str, path: str, device: str, dtype: str = "float32") -> Any:
    """The Tokenizer of a finished kmeans ("semantic") or codec ("acoustic") build."""
    if which == "semantic":
        from audiolm.tokenizers.semantic import load_semantic
        return load_semantic(path, device, dtype)
    from audiolm.tokenizers.acoustic import load_codec
    return load_codec(path, device)


def _is_done(path: str, expected: dict[str, Any]) -> bool:
    """True for a whole file with this metadata."""
    try:
        found = tokens.read_meta(path)
        read_table(path)
    except (FileNotFoundError, DamagedFile, tokens.TokenError):
        return False
    return all(found.get(k) == v for k, v in expected.items())

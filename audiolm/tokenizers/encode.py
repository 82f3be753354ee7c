"""The steps `semantic_tokens` and `acoustic_tokens`: clips to tokens, one task a shard.

A task reads its shard's clips, forms batches by a rule of the shard alone, decodes the next batch
while one is encoded, and writes one file. Of files that an interrupted attempt left, one listing and
their footers are read: a shard whose metadata is the same gets no task. The driver folds results as
they come into the facts and the store's index, written last. Clips are encoded whole (the
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
from audiolm.data.clip_table import shard_sizes
from audiolm.data.clips import Clip, read_clip, shard_clips
from audiolm.data.parallel import cluster_device, parallel_each, parallel_map, thread_map
from audiolm.data.parquet import DamagedFile
from audiolm.data.sources import locate, roots
from audiolm.data.token_index import NAME, IndexBuilder, ShardRecord
from audiolm.tokenizers.base import ACOUSTIC_HOP, SAMPLE_RATE, SEMANTIC_HOP, TokenSpec, pad_rows, padded_samples
from audiolm.tokenizers.encode_facts import TOKENIZER, EncodeFacts

READERS = 4  # threads that decode audio, which runs outside the GIL
HOP = {"semantic": SEMANTIC_HOP, "acoustic": ACOUSTIC_HOP}


@dataclass(frozen=True)
class EncodeJob:
    """Settings that all shards' tasks of a step share."""

    which: str  # "semantic" or "acoustic"
    tokenizer: str  # the tokenizer's build
    folders: dict[str, str]  # source name -> root of its audio
    manifest_path: str
    manifest: str  # id of the manifest's build
    shards: int
    out_path: str
    batch_s: float
    device: str
    dtype: str = "float32"
    speeds: Sequence[float] = ()


def encode_tokens(config: dict[str, Any], inputs: dict[str, Any], out: Any) -> dict[str, Any]:
    """Step function. config: which ("semantic" or "acoustic"), tokens, corpus, cluster, seed;
    inputs: manifest and the tokenizer's artifact. Writes shard files and their index into out.path;
    returns counts, speed and code usage per level.

    Raises tokens.TokenError for frames that break the contract, for a collapsed tokenizer and, once they are found, for more
    rejected clips than corpus.max_rejected allows of all rows.
    """
    which, cluster, settings, manifest = config["which"], config["cluster"], config["tokens"], inputs["manifest"]
    rows_S, seconds_S = shard_sizes(manifest.path, settings.speeds)
    # Codecs run in float32, without TF32 and not compiled, as for a prompt later: rounded latents get other codes.
    job = EncodeJob(which, inputs[TOKENIZER[which]].path, roots(config["corpus"]), manifest.path, manifest.build, len(rows_S),
                    out.path, settings.batch_s, cluster_device(cluster, out.inline),
                    settings.dtype if which == "semantic" else "float32", settings.speeds)
    how = {"out": out, "cluster": cluster, "gpu": cluster.gpus_a_task if job.device == "cuda" else 0}
    began, index = time.monotonic(), IndexBuilder(rows_S, dedup=which == "semantic")
    facts = EncodeFacts(which, int(rows_S.sum()), config["corpus"])

    def take(record: ShardRecord, rejected: dict[str, str]) -> None:
        index.add(record)
        facts.add(record, rejected)

    found = tokens.listing(out.path)
    if found:
        # One task says what a shard's metadata is now: it needs the tokenizer, and its node's libraries count.
        meta = parallel_map(shard_meta, [(job,)], unit="tokenizers", **how)[0]
        for record in finished_shards(out, rows_S, found, meta):
            take(record, {})
    todo = np.flatnonzero(~index.done_S).tolist()
    encoded_s = float(seconds_S[todo].sum())
    parallel_each(encode_shard, [(job, k) for k in todo], lambda i, result: take(*result), unit="audio s",
                  sizes=seconds_S[todo].tolist(), before=float(seconds_S.sum()) - encoded_s, **how)
    total = facts.facts(len(rows_S), len(rows_S) - len(todo), float(seconds_S.sum()), encoded_s, time.monotonic() - began)
    out.check()  # a worker that lost its lease writes nothing
    store.put(store.join(out.path, NAME), index.to_bytes())
    return total


def finished_shards(out: Any, rows_S: np.ndarray, found: dict[str, int], meta: dict[str, Any]) -> Iterator[ShardRecord]:
    """The files in a step's folder that are finished shards with this metadata; of each its footer is read, by threads.

    `found`: sizes by name. A file with rejected clips is no finished one. Raises LeaseLost as the step's `check`.
    """
    def read(k: int) -> ShardRecord | None:
        path = store.join(out.path, name := tokens.shard_name(k))
        try:
            record = tokens.read_record(path, found[name])
        except (FileNotFoundError, DamagedFile, tokens.TokenError):
            return None
        same = record.meta == meta and record.shard == k and record.clips == rows_S[k]
        return record if same and not record.rejected else None

    for record in thread_map(read, [k for k in range(len(rows_S)) if tokens.shard_name(k) in found]):
        out.check()
        if record:
            yield record


def shard_meta(job: EncodeJob) -> dict[str, Any]:
    """The metadata that all shards of a step share; all that can change a token is in it. Runs in a task."""
    tokenizer = load_tokenizer(job.which, job.tokenizer, job.device, job.dtype)
    spec: TokenSpec = tokenizer.spec
    if spec.sample_rate != SAMPLE_RATE or spec.hop != HOP[job.which]:
        raise tokens.TokenError(f"{job.which} tokenizer {spec.name!r} has {spec.sample_rate} Hz and hop {spec.hop}, "
                                f"expected {SAMPLE_RATE} and {HOP[job.which]} (25 and 50 frames a second)")
    return {"which": job.which, "spec": spec.to_json(), "hash": tokenizer.hash, "manifest": job.manifest, "shards": job.shards,
            "speeds": list(job.speeds), "device": job.device, "dtype": job.dtype,
            "versions": {"torch": torch.__version__, "numpy": np.__version__}}


def encode_shard(job: EncodeJob, shard: int) -> tuple[ShardRecord, dict[str, str]]:
    """One task: the clips of a shard, and their copies behind them, to its file.

    Returns what the index and the facts need of it, and the rejected clips with the reasons.
    """
    meta, rejected = shard_meta(job), {}  # clip id -> reason
    tokenizer = load_tokenizer(job.which, job.tokenizer, job.device, job.dtype)
    clips, codes = shard_clips(job.manifest_path, shard, job.speeds), []
    read = functools.partial(_read_unchanged, roots=job.folders, rejected=rejected)
    for speed in (1, *job.speeds):
        same = [c for c in clips if c.speed == speed]
        codes += encode_clips(same, tokenizer, read, job.batch_s, job.device)
    data = tokens.shard_bytes([c.id for c in clips], codes, meta, shard, job.which == "semantic", sorted(rejected),
                              sum(c.speed != 1 for c in clips))
    path = store.join(job.out_path, tokens.shard_name(shard))
    store.put(path, data)
    return tokens.record_of(data, path), rejected


def _read_unchanged(clip: Clip, roots: dict[str, str], rejected: dict[str, str]) -> np.ndarray:
    """wav_T of a clip whose files are what the manifest saw; else silence as long, and the reason in `rejected`."""
    try:
        for uri, digest in {p.uri: p.hash for p in clip.parts}.items():
            path = locate(roots[clip.origin], uri)
            if not digest:
                raise ValueError(f"the manifest has no hash of {path}: build it anew with --force manifest")
            if file_hash(path) != digest:
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


"""The same speech as loose files and as webdataset tars on an S3 server here: equal manifests and tokens, and their times.

    python tests/bench/sources.py                1 GB of utterances, 100 MB a tar, on SeaweedFS (`weed`, as the tests use)
    python tests/bench/sources.py --mb 100

Utterances are the quickstart corpus's, each at a gain of its own, as 16-bit WAV.  One process does all, so the times are those
of one worker.  The tokens are those of the published codec speech-16k.
"""

from __future__ import annotations

import argparse
import io
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import soundfile as sf

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from audiolm import store  # noqa: E402
from audiolm.config.corpus import CorpusConfig  # noqa: E402
from audiolm.config.run import ClusterConfig  # noqa: E402
from audiolm.config.tokens import TokensConfig  # noqa: E402
from audiolm.data.clips import read_clips  # noqa: E402
from audiolm.data.manifest import build_manifest  # noqa: E402
from audiolm.tokenizers import encode  # noqa: E402
from tests.worlds.basics import RecordingOut  # noqa: E402
from tests.worlds.servers import seaweedfs  # noqa: E402


def utterances(mb: float) -> Iterator[tuple[str, bytes]]:
    """(SPEAKER/CHAPTER/NAME.wav, its bytes), in order of the names, `mb` MB in all."""
    files = sorted((ROOT / "workflows/quickstart/flac").glob("*/*/*/*.flac"))
    wavs = [(p.parts[-3], p.parts[-2], sf.read(p, dtype="float32")[0]) for p in files]
    left = mb * 1e6
    for i in range(10**6):
        speaker, chapter, wav_T = wavs[i % len(wavs)]
        sink = io.BytesIO()
        sf.write(sink, wav_T * (1 - i / 1e5), 16_000, format="WAV", subtype="PCM_16")
        yield f"{speaker}/{chapter}/{i:06d}.wav", sink.getvalue()
        left -= len(sink.getvalue())
        if left <= 0:
            return


def upload(root: str, mb: float, tar_mb: float) -> int:
    """Writes every utterance to loose/ and to a tar of tars/; returns their number."""
    sink, tar, n, held = io.BytesIO(), None, 0, 0

    def close() -> None:
        nonlocal sink, tar, held
        if tar:
            tar.close()
            store.put(f"{root}/tars/shard-{n:06d}.tar", sink.getvalue())
        sink, tar, held = io.BytesIO(), None, 0

    for name, data in utterances(mb):
        store.put(f"{root}/loose/{name}", data)
        tar = tar or tarfile.open(fileobj=sink, mode="w")
        info = tarfile.TarInfo(name)
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
        n, held = n + 1, held + len(data)
        if held >= tar_mb * 1e6:
            close()
    close()
    return n


def manifest_and_tokens(source: dict, folder: str, codec: str) -> SimpleNamespace:
    """Both steps on one source, in this process: their seconds, the clips, the digests by clip and the shards' bytes."""
    corpus = CorpusConfig(name="bench", sources=[{"name": "speech", "speaker": "grandparent", **source}], shard_s=600.0)
    began = time.perf_counter()
    build_manifest({"corpus": corpus, "seed": 0, "cluster": ClusterConfig()}, {}, RecordingOut(f"{folder}/manifest"))
    listed_s = time.perf_counter() - began
    inputs = {n: SimpleNamespace(path=p, build=f"{n}.0001") for n, p in (("manifest", f"{folder}/manifest"), ("codec", codec))}
    config = {"which": "acoustic", "tokens": TokensConfig(), "corpus": corpus, "seed": 0,
              "cluster": ClusterConfig(device="cpu")}
    began = time.perf_counter()
    encode.encode_tokens(config, inputs, RecordingOut(f"{folder}/tokens"))
    tokens_s = time.perf_counter() - began
    clips = read_clips(f"{folder}/manifest")
    digests = [[p.hash for p in c.parts] for c in clips]
    shards = {n: store.get(f"{folder}/tokens/{n}") for n in store.names(f"{folder}/tokens") if n.startswith("shard-")}
    clips = [replace(c, parts=tuple(replace(p, uri="") for p in c.parts)) for c in clips]
    return SimpleNamespace(manifest_s=listed_s, tokens_s=tokens_s, clips=clips, digests=digests, shards=shards)


def compare(root: str, folder: str, mb: float, tar_mb: float) -> dict[str, SimpleNamespace]:
    """Both layouts of `mb` MB below the S3 folder `root`, measured. Raises AssertionError where they differ."""
    n, codec = upload(root, mb, tar_mb), str(ROOT / "audiolm/pretrained/speech-16k")
    print(f"{n} utterances, {mb:.0f} MB, tars of {tar_mb:.0f} MB", flush=True)
    done = {}
    for name, kind in (("loose", "folder"), ("tars", "webdataset")):
        done[name] = manifest_and_tokens({"kind": kind, "root": f"{root}/{name}"}, f"{folder}/{name}", codec)
        print(f"{name:6} manifest {done[name].manifest_s:7.1f} s, tokens {done[name].tokens_s:7.1f} s", flush=True)
    a, b = done["loose"], done["tars"]
    assert sum(len(c.parts) for c in a.clips) == n and a.shards
    assert a.clips == b.clips and a.digests == b.digests and a.shards == b.shards
    hours = sum(c.seconds for c in a.clips) / 3600
    print(f"equal: {len(a.clips)} clips of {hours:.2f} h, their digests and splits, {len(a.shards)} shards of tokens")
    return done


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--mb", type=float, default=1000.0)
    p.add_argument("--tar-mb", type=float, default=100.0)
    args = p.parse_args()
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, seaweedfs(Path(folder)):
        compare("s3://tests/bench", folder, args.mb, args.tar_mb)


if __name__ == "__main__":
    main()

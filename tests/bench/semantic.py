"""How fast semantic tokens are made here, in seconds of audio per second; nothing is asserted.

    python tests/bench/semantic.py                            CPU, one thread: the Conformer of workflows/speech.yaml
    python tests/bench/semantic.py --model hubert             a random HuBERT-base (needs transformers)
    python tests/bench/semantic.py --device cuda --dtype bfloat16 --model hubert --hours 8

"model alone": features and tokens of batches that lie on the device.  "files in, Parquet out": FLAC files on a local disk
through the step's own task, a shard after the other.  Random weights and noise that is shaped like speech in length only;
best of --repeats.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from audiolm import rng  # noqa: E402
from audiolm.config.load import load_config  # noqa: E402
from audiolm.data.clips import Clip, Part
from audiolm.models.conformer import Encoder, EncoderSizes
from audiolm.tokenizers import encode  # noqa: E402
from audiolm.tokenizers.extractor import ConformerExtractor, Extractor, window_of
from audiolm.tokenizers.semantic import load_semantic, save_semantic

RATE = 16_000
ROOT = Path(__file__).resolve().parents[2]


def extractor(kind: str, folder: Path) -> tuple[Extractor, int]:
    """The model with random weights and the layer that is clustered."""
    torch.manual_seed(0)
    if kind == "conformer":
        m = load_config(str(ROOT / "workflows" / "speech.yaml")).semantic.model
        return ConformerExtractor(Encoder(EncoderSizes(m.dim, m.layers, m.heads, m.ff, m.conv_kernel))), m.layers * 3 // 4
    from transformers import HubertConfig, HubertModel

    from audiolm.tokenizers.hf_encoder import load_pretrained_encoder

    HubertModel(HubertConfig()).save_pretrained(folder)
    return load_pretrained_encoder(str(folder)), 9


def corpus(folder: Path, hours: float, shard_s: float) -> list[list[Clip]]:
    """FLAC files of 2 to 16 s, by shard."""
    clips, total, g = [], 0.0, rng.generator(0, "bench")
    noise = (0.1 * g.normal(size=20 * RATE)).astype(np.float32)
    while total < hours * 3600:
        n = int(g.uniform(2, 16) * RATE)
        soundfile.write(folder / f"{len(clips)}.flac", noise[:n], RATE)
        name = str(len(clips))
        part = Part(id=name, uri=f"{name}.flac", start=0, frames=n, offset=0, text="")
        clips.append(Clip(id=name, origin="s", source="s", speaker=name, split="train", sample_rate=RATE, frames=n,
                          parts=(part,), shard=int(total / shard_s), row=len(clips)))
        total += n / RATE
    return [[c for c in clips if c.shard == k] for k in range(clips[-1].shard + 1)]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--model", choices=("conformer", "hubert"), default="conformer")
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    p.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    p.add_argument("--k", type=int, default=1024)
    p.add_argument("--hours", type=float, default=0.05, help="of audio in files")
    p.add_argument("--shard-s", type=float, default=1800.0, help="audio seconds of a shard (corpus.shard_s of speech.yaml)")
    p.add_argument("--batch-s", type=float, default=120.0, help="padded audio seconds encoded at once (tokens.batch_s)")
    p.add_argument("--repeats", type=int, default=3)
    args = p.parse_args()
    if args.device == "cpu":
        torch.set_num_threads(1)
    sync = torch.cuda.synchronize if args.device == "cuda" else lambda: None
    with tempfile.TemporaryDirectory() as temp:
        folder = Path(temp)
        (folder / "audio").mkdir()
        model, layer = extractor(args.model, folder / "model")
        save_semantic(str(folder / "kmeans"), model, layer, torch.zeros(model.dim), torch.ones(model.dim),
                      torch.randn(args.k, model.dim), window_of(16.0, 2.0), {})
        tokenizer = load_semantic(str(folder / "kmeans"), args.device, args.dtype)
        rows = max(1, int(args.batch_s // 15))
        wav_BT = 0.1 * torch.randn(rows, 15 * RATE, device=args.device)
        lengths_B = torch.full((rows,), 15 * RATE)
        took = []
        for _ in range(args.repeats + 1):
            sync()
            began = time.perf_counter()
            tokenizer.encode(wav_BT, lengths_B)
            sync()
            took.append(time.perf_counter() - began)
        what = f"{args.model}, layer {layer}, K = {args.k}, {args.dtype}, {args.device}"
        print(f"model alone ({what}): {rows * 15 / min(took[1:]):,.0f} x real time, {rows} x 15 s", flush=True)
        shards = corpus(folder / "audio", args.hours, args.shard_s)
        audio_s, best = sum(c.seconds for clips in shards for c in clips), 0.0
        encode.load_tokenizer("semantic", str(folder / "kmeans"), args.device, args.dtype)
        for i in range(args.repeats):
            began = time.perf_counter()
            for k, clips in enumerate(shards):
                job = encode.EncodeJob("semantic", str(folder / "kmeans"), {"s": str(folder / "audio")}, "m", len(shards),
                                       str(folder / f"out-{i}"), args.batch_s, args.device, args.dtype)
                encode.encode_shard(job, clips, k)
            best = max(best, audio_s / (time.perf_counter() - began))
        print(f"files in, Parquet out: {best:,.0f} x real time ({best:,.0f} audio hours an hour), "
              f"{sum(map(len, shards))} files, {audio_s / 3600:.2f} h in {len(shards)} shards")


if __name__ == "__main__":
    main()

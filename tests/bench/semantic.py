"""How fast semantic tokens are made here, in seconds of audio per second; nothing is asserted.

    python tests/bench/semantic.py                            CPU, one thread: the Conformer of workflows/speech.yaml
    python tests/bench/semantic.py --model hubert             a random HuBERT-base (needs transformers)
    python tests/bench/semantic.py --device cuda --dtype bfloat16 --model hubert --hours 8

"model alone": batches of audio in the CPU's memory to tokens there, by the function that the step calls.  "files in, Parquet
out": FLAC files on a local disk through the step's own task, a shard after the other.  Random weights and noise that is
shaped like speech in length only; best of --repeats.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from audiolm import rng  # noqa: E402
from audiolm.config.load import load_config  # noqa: E402
from audiolm.data.audio_check import file_hash
from audiolm.data.clips import Clip, Part, clips_parquet
from audiolm.models.conformer import Encoder, EncoderSizes
from audiolm.tokenizers import encode  # noqa: E402
from audiolm.tokenizers.extractor import ConformerExtractor, Extractor, window_of
from audiolm.tokenizers.semantic import load_semantic, save_semantic
from tests.bench.figures import Figure  # noqa: E402
from tests.bench.timing import best  # noqa: E402

RATE = 16_000
ROOT = Path(__file__).resolve().parents[2]
NAMES = {"conformer": "Conformer", "hubert": "HuBERT-base"}


def extractor(kind: str, folder: Path, tiny: bool) -> tuple[Extractor, int]:
    """The model with random weights and the layer that is clustered."""
    torch.manual_seed(0)
    if kind == "conformer":
        m = load_config(str(ROOT / "workflows" / "speech.yaml")).semantic.model
        sizes = EncoderSizes(32, 4, 2, 64) if tiny else EncoderSizes(m.dim, m.layers, m.heads, m.ff, m.conv_kernel)
        return ConformerExtractor(Encoder(sizes)), sizes.layers * 3 // 4
    from transformers import HubertConfig, HubertModel

    from audiolm.tokenizers.hf_encoder import load_pretrained_encoder

    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64, "conv_dim": (8,) * 7,
             "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2} if tiny else {}
    config = HubertConfig(**sizes)
    HubertModel(config).save_pretrained(folder)
    return load_pretrained_encoder(str(folder)), config.num_hidden_layers * 3 // 4


def corpus(folder: Path, hours: float, shard_s: float) -> list[list[Clip]]:
    """FLAC files of 2 to 16 s, by shard."""
    import soundfile

    clips, total, g = [], 0.0, rng.generator(0, "bench")
    noise = (0.1 * g.normal(size=20 * RATE)).astype(np.float32)
    while total < hours * 3600:
        n = int(g.uniform(2, 16) * RATE)
        soundfile.write(folder / f"{len(clips)}.flac", noise[:n], RATE)
        name = str(len(clips))
        part = Part(id=name, uri=f"{name}.flac", start=0, frames=n, offset=0, text="", hash=file_hash(f"{folder}/{name}.flac"))
        clips.append(Clip(id=name, origin="s", source="s", speaker=name, split="train", sample_rate=RATE, frames=n,
                          parts=(part,), shard=int(total / shard_s), row=len(clips)))
        total += n / RATE
    return [[c for c in clips if c.shard == k] for k in range(clips[-1].shard + 1)]


def rates(kind: str, device: str, dtype: str, k: int, hours: float, shard_s: float, batch_s: float,
          repeats: int, tiny: bool = False) -> Iterator[Figure]:
    """The model alone, and from files to Parquet by the token step's own task, a shard after the other."""
    with tempfile.TemporaryDirectory() as temp:
        folder = Path(temp)
        (folder / "audio").mkdir()
        model, layer = extractor(kind, folder / "model", tiny)
        save_semantic(str(folder / "kmeans"), model, layer, torch.zeros(model.dim), torch.ones(model.dim),
                      torch.randn(k, model.dim), window_of(16.0, 2.0), {})
        tokenizer = load_semantic(str(folder / "kmeans"), device, dtype)
        rows = max(1, int(batch_s // 15))
        wavs = list((0.1 * torch.randn(rows, 15 * RATE)).numpy())
        took = best(lambda: encode.encode_batch(wavs, tokenizer), repeats, device, warm=1)
        yield Figure(f"encode {NAMES[kind]}", rows * 15 / took, "x real time")
        shards = corpus(folder / "audio", hours, shard_s)
        audio_s, fastest = sum(c.seconds for clips in shards for c in clips), 0.0
        (folder / "clips.parquet").write_bytes(clips_parquet([c for clips in shards for c in clips]))
        encode.load_tokenizer("semantic", str(folder / "kmeans"), device, dtype)
        for i in range(repeats):
            began = time.perf_counter()
            for shard in range(len(shards)):
                job = encode.EncodeJob("semantic", str(folder / "kmeans"), {"s": str(folder / "audio")}, temp, "m", len(shards),
                                       str(folder / f"out-{i}"), batch_s, device, dtype)
                encode.encode_shard(job, shard)
            fastest = max(fastest, audio_s / (time.perf_counter() - began))
        yield Figure(f"encode {NAMES[kind]}, files to Parquet", fastest, "x real time")


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
    for figure in rates(args.model, args.device, args.dtype, args.k, args.hours, args.shard_s, args.batch_s, args.repeats):
        print(figure, flush=True)


if __name__ == "__main__":
    main()

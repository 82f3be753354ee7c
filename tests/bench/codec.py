"""How fast the codec encodes and trains here, in seconds of audio per second; nothing is asserted.

    python tests/bench/codec.py                 one CPU thread: encode and decode of both families, and a training step
    python tests/bench/codec.py --device cuda   bfloat16, compiled: encode, and a training step with all discriminators

Each figure is the best of --repeats; random audio.  audiolm-pytorch's SoundStream runs beside ours where it is installed.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from audiolm.config.codec import CodecConfig  # noqa: E402
from audiolm.config.load import load_config  # noqa: E402
from audiolm.models.soundstream import SoundStream, SoundStreamSizes, fold
from audiolm.models.spectral.codec import SpectralCodec  # noqa: E402
from audiolm.train.engine import make_engine  # noqa: E402
from audiolm.train.objectives.base import Context  # noqa: E402
from audiolm.train.objectives.codec import CodecObjective  # noqa: E402
from audiolm.train.objectives.spectral import SpectralObjective, spectral_codec  # noqa: E402
from tests.bench.timing import best  # noqa: E402

RATE = 16_000
SPEECH = str(Path(__file__).resolve().parents[2] / "workflows" / "speech.yaml")


def say(what: str, audio_s: float, seconds: float) -> None:
    print(f"{what:68} {audio_s / seconds:10,.1f} x real time", flush=True)


def half(device: str):
    return torch.autocast(device, torch.bfloat16) if device == "cuda" else contextlib.nullcontext()


def soundstream(channels: int) -> SoundStream:
    sizes = CodecConfig(enc_channels=channels, dec_channels=channels)
    return fold(SoundStream(SoundStreamSizes(sizes.strides, channels, channels, sizes.dim, sizes.n_q, sizes.vocab)))


def spectral() -> SpectralCodec:
    """At the sizes of speech.yaml; statistics and codes are of noise, which costs the same."""
    model = spectral_codec(load_config(SPEECH).codec)
    x_MD = model.initialise(model.frames(0.1 * torch.randn(1, 60 * RATE)).flatten(0, 1))
    model.quantizer.initialise(x_MD, seed=0, reduce=lambda x: x)
    return model


@torch.inference_mode()
def coding(model: SoundStream | SpectralCodec, what: str, rows: int, seconds: float, repeats: int, device: str) -> None:
    model = model.eval().to(device)
    if device == "cuda":
        model.encoder.compile()
        model.decoder.compile()
    wav_BT = 0.1 * torch.randn(rows, round(seconds * RATE), device=device)
    with half(device):
        codes_BTQ = model.encode(wav_BT)
        name = f"{what}, {model.quantizer.n_q} x {model.quantizer.vocab}, {rows} x {seconds:g} s"
        say(f"encode  {name}", rows * seconds, best(lambda: model.encode(wav_BT), repeats, device))
        say(f"decode  {name}", rows * seconds, best(lambda: model.decode(codes_BTQ), repeats, device))


class _Noise:
    """Crops without a disk: what is timed is the step."""

    def __init__(self, rows: int, crop: int):
        self.crop, self.wav_BT = crop, 0.1 * torch.randn(rows, crop)

    def batch(self, step, rows):
        return self.wav_BT[:len(rows)], torch.full((len(rows),), self.crop)


def training(codec: CodecConfig, what: str, rows: int, engine: str, repeats: int, device: str) -> None:
    """A full step: generator, all discriminators, optimizers, codebooks, moving average.

    Balanced, the fastest one: between two measurements of the norms.
    """
    fast = device == "cuda" or codec.family == "spectral"  # a CPU's bfloat16 is slow in SoundStream's convolutions
    train = codec.train.model_copy(update={"batch": rows, "engine": engine, "dtype": "bfloat16" if fast else "float32"})
    codec = codec.model_copy(update={"train": train, "quantize_from": 0,
                                     "disc": codec.disc.model_copy(update={"start_step": 0})})
    crop = round(codec.crop_s * RATE)
    ctx = Context(0, 1, torch.device(device), 0, compile=device == "cuda")
    kind = SpectralObjective if codec.family == "spectral" else CodecObjective
    objective = kind(codec, _Noise(rows, crop), torch.zeros(1, crop), ctx)
    engines = {name: make_engine(module, codec.train, ctx) for name, module in objective.modules.items()}
    for each in engines.values():
        each.set_lr(1e-4)
    step = iter(range(10**9))

    def work() -> None:
        now = next(step)
        objective.train_step(engines, [objective.load(now, range(rows))], now)

    d = codec.disc
    name = (f"width {codec.spectral.width}, {rows} x {codec.crop_s} s, {engine}" if codec.family == "spectral" else
            f"C = {codec.enc_channels}, {rows} x {codec.crop_s} s, {len(d.periods)} + {len(d.windows)} judges, {engine}")
    say(f"train   {what}, {name}", rows * codec.crop_s, best(work, repeats, device))


@torch.inference_mode()
def peer(rows: int, seconds: float, repeats: int, device: str) -> None:
    try:
        from audiolm_pytorch import SoundStream as Theirs
    except (ImportError, OSError) as e:  # OSError: its torchaudio does not fit this torch
        print(f"no row of audiolm-pytorch: {type(e).__name__}: {e}")
        return
    model = Theirs(codebook_size=1024, rq_num_quantizers=12, strides=(2, 4, 5, 8), target_sample_hz=RATE).eval().to(device)
    wav_BT = 0.1 * torch.randn(rows, round(seconds * RATE), device=device)
    with half(device):
        took = best(lambda: model(wav_BT, return_codes_only=True), repeats, device)
    say(f"encode  audiolm-pytorch's SoundStream, {rows} x {seconds:g} s", rows * seconds, took)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    p.add_argument("--repeats", type=int, default=5)
    p.add_argument("--engines", nargs="+", choices=("torch", "deepspeed"), default=["torch", "deepspeed"])
    p.add_argument("--threads", type=int, default=1, help="of the CPU")
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    gpu = args.device == "cuda"
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name() if gpu else f'{args.threads} CPU thread(s)'}", flush=True)
    for channels in (32, 16) if gpu else (32, 16, 8):
        coding(soundstream(channels), f"C = {channels}", 64 if gpu else 1, 10.0, args.repeats, args.device)
    coding(spectral(), "spectral", 64 if gpu else 1, 10.0, args.repeats, args.device)
    peer(32 if gpu else 1, 10.0, args.repeats, args.device)
    small = {} if gpu else {"enc_channels": 8, "dec_channels": 8, "dim": 64}
    for what, codec in (("defaults", CodecConfig().model_copy(update=small)), ("speech.yaml", load_config(SPEECH).codec)):
        for engine in args.engines:
            training(codec, what, 64 if gpu else 8, engine, args.repeats, args.device)


if __name__ == "__main__":
    main()

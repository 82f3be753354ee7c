"""How fast the codec encodes and trains here, in seconds of audio per second; nothing is asserted.

    python tests/bench/codec.py                 one CPU thread: encode and decode of both families, and a training step
    python tests/bench/codec.py --device cuda   the same, the training step in bfloat16, compiled, with all discriminators

Codes and sound are made by the functions that the token steps and generation call, on exports: in float32 without TF32, not
compiled, from audio in the CPU's memory to codes there.  Each figure is the best of --repeats; random audio.
audiolm-pytorch's SoundStream runs beside ours where it is installed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from audiolm.config.codec import CodecConfig  # noqa: E402
from audiolm.config.load import load_config  # noqa: E402
from audiolm.models.precision import no_tf32  # noqa: E402
from audiolm.models.soundstream import SoundStream, SoundStreamSizes, fold
from audiolm.models.spectral.codec import SpectralCodec, SpectralSizes  # noqa: E402
from audiolm.tokenizers.acoustic import AcousticTokenizer, load_codec  # noqa: E402
from audiolm.tokenizers.artifact import write_export  # noqa: E402
from audiolm.tokenizers.encode import encode_batch  # noqa: E402
from audiolm.train.engine import make_engine  # noqa: E402
from audiolm.train.objectives.base import Context  # noqa: E402
from audiolm.train.objectives.codec import CodecObjective  # noqa: E402
from audiolm.train.objectives.spectral import SpectralObjective, spectral_codec  # noqa: E402
from tests.bench.figures import Figure  # noqa: E402
from tests.bench.timing import best  # noqa: E402

RATE = 16_000
SPEECH = str(Path(__file__).resolve().parents[2] / "workflows" / "speech.yaml")


UNIT = "x real time"


def exported(model: SoundStream | SpectralCodec, sizes: dict, device: str) -> AcousticTokenizer:
    """The model as later steps load it."""
    with tempfile.TemporaryDirectory() as folder:
        write_export(folder, model.state_dict(), {"kind": model.kind, "sample_rate": RATE, **sizes})
        return load_codec(folder, device)


def soundstream(channels: int, device: str) -> AcousticTokenizer:
    c = CodecConfig(enc_channels=channels, dec_channels=channels)
    sizes = SoundStreamSizes(c.strides, channels, channels, c.dim, c.n_q, c.vocab)
    names = ("strides", "enc_channels", "dec_channels", "dim", "n_q", "vocab", "quantizer", "code_dim")
    return exported(fold(SoundStream(sizes)), {name: getattr(sizes, name) for name in names}, device)


def spectral(device: str, config: CodecConfig | None = None) -> AcousticTokenizer:
    """By default of the sizes of speech.yaml; statistics and codes are of noise, which costs the same."""
    model = spectral_codec(config or load_config(SPEECH).codec)
    x_MD = model.initialise(model.frames(0.1 * torch.randn(1, 60 * RATE)).flatten(0, 1))
    model.quantizer.initialise(x_MD, seed=0, reduce=lambda x: x)
    return exported(model, {name: getattr(model.sizes, name) for name in SpectralSizes.EXPORTED}, device)


def coding(codec: AcousticTokenizer, what: str, rows: int, seconds: float, repeats: int, device: str) -> list[Figure]:
    """Encoding by the function of the token steps, and decoding, of a batch."""
    wavs = list((0.1 * torch.randn(rows, round(seconds * RATE))).numpy())
    codes_BTQ = torch.stack(encode_batch(wavs, codec))
    took = {"encode": best(lambda: encode_batch(wavs, codec), repeats, device),
            "decode": best(lambda: codec.decode(codes_BTQ), repeats, device)}
    return [Figure(f"{do} codec, {what}", rows * seconds / took_s, UNIT) for do, took_s in took.items()]


class _Noise:
    """Crops without a disk: what is timed is the step."""

    def __init__(self, rows: int, crop: int):
        self.crop, self.wav_BT = crop, 0.1 * torch.randn(rows, crop)

    def batch(self, step, rows):
        return self.wav_BT[:len(rows)], torch.full((len(rows),), self.crop)


def training(codec: CodecConfig, what: str, rows: int, engine: str, repeats: int, device: str) -> Figure:
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

    return Figure(f"train codec, {what}, {engine}", rows * codec.crop_s / best(work, repeats, device), "audio-s/s")


@torch.inference_mode()
def peer(rows: int, seconds: float, repeats: int, device: str) -> None:
    try:
        from audiolm_pytorch import SoundStream as Theirs
    except (ImportError, OSError) as e:  # OSError: its torchaudio does not fit this torch
        print(f"no row of audiolm-pytorch: {type(e).__name__}: {e}")
        return
    model = Theirs(codebook_size=1024, rq_num_quantizers=12, strides=(2, 4, 5, 8), target_sample_hz=RATE).eval().to(device)
    wav_BT = 0.1 * torch.randn(rows, round(seconds * RATE), device=device)
    with no_tf32():
        took = best(lambda: model(wav_BT, return_codes_only=True), repeats, device)
    print(Figure("encode audiolm-pytorch's SoundStream", rows * seconds / took, UNIT))


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
        print(*coding(soundstream(channels, args.device), f"C = {channels}", 64 if gpu else 1, 10.0, args.repeats, args.device),
              sep="\n", flush=True)
    print(*coding(spectral(args.device), "spectral", 64 if gpu else 1, 10.0, args.repeats, args.device), sep="\n", flush=True)
    peer(32 if gpu else 1, 10.0, args.repeats, args.device)
    small = {} if gpu else {"enc_channels": 8, "dec_channels": 8, "dim": 64}
    soundstreams = CodecConfig().model_copy(update=small)
    for what, codec in ((f"C = {soundstreams.enc_channels}", soundstreams), ("spectral", load_config(SPEECH).codec)):
        for engine in args.engines:
            print(training(codec, what, 64 if gpu else 8, engine, args.repeats, args.device), flush=True)


if __name__ == "__main__":
    main()

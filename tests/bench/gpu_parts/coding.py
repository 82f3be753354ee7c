"""Part (d): the codec and the semantic encoders, from sound to tokens and from files to Parquet, and the codec's training."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from audiolm.config.codec import CodecConfig
from audiolm.config.load import load_config
from tests.bench import semantic
from tests.bench.codec import SPEECH, coding, soundstream, spectral, training
from tests.bench.figures import Figure


def items(device: str, tiny: bool) -> dict[str, Callable[[], Iterator[Figure]]]:
    channels, rows, seconds, repeats = (2, 2, 1.0, 1) if tiny else (32, 64, 10.0, 5)
    wide, mel = CodecConfig(), load_config(SPEECH).codec
    if tiny:
        judges = wide.disc.model_copy(update={"periods": (2,), "windows": (512,), "channels": 2})
        codes = {"dim": 16, "n_q": 2, "vocab": 32, "crop_s": 0.5}
        wide = wide.model_copy(update={**codes, "enc_channels": 2, "dec_channels": 2, "disc": judges})
        mel = mel.model_copy(update={**codes, "spectral": mel.spectral.model_copy(update={"width": 16})})
    hours, batch_s, dtype = (0.005, 30.0, "float32") if tiny else (4.0, 480.0, "bfloat16")

    def encoder(kind: str) -> Iterator[Figure]:
        return semantic.rates(kind, device, dtype, 1024, hours, 3600.0, batch_s, repeats, tiny)

    def train(what: str, config: CodecConfig) -> list[Figure]:
        return [training(config, what, rows, "torch", repeats, device)]

    return {"SoundStream": lambda: coding(soundstream(channels, device), f"C = {channels}", rows, seconds, repeats, device),
            "HuBERT": lambda: encoder("hubert"),
            "SoundStream training": lambda: train(f"C = {channels}", wide),
            "spectral codec": lambda: coding(spectral(device, mel), "spectral", rows, seconds, repeats, device),
            "spectral codec training": lambda: train("spectral", mel),
            "Conformer": lambda: encoder("conformer")}

"""EnCodec, DAC and Mimi in transformers' format behind the Codec protocol (base.Codec).

The step `import_codec` copies a model (hf.py) into its build, where export/config.json holds kind,
levels used and transformers' own config.
Shapes: wav_BT float32 at spec.sample_rate, lengths_B true samples, codes_TQ int64 of one clip on
the CPU, codes_BTQ of a batch (1: one clip).
Sources: EnCodec 2210.13438, DAC 2306.06546, Mimi 2410.00037.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from audiolm.models.precision import no_tf32
from audiolm.models.transfer import send
from audiolm.tokenizers import hf
from audiolm.tokenizers.artifact import CONFIG, ArtifactError, write_export
from audiolm.tokenizers.base import (
    ACOUSTIC_HOP,
    SAMPLE_RATE,
    TokenSpec,
    check_codes,
    check_finite,
    clip_lengths,
    code_vectors,
    padded_samples,
)

CLASSES = {"encodec": ("EncodecConfig", "EncodecModel"), "dac": ("DacConfig", "DacModel"),
           "mimi": ("MimiConfig", "MimiModel")}
# Frames of real sound on either side of a piece cut out of long audio: 1 s at 50 Hz, more than
# DAC's receptive field. EnCodec's LSTM and Mimi's attention look back without end, so a piece there
# comes near the whole, not equal to it.
HISTORY = LOOKAHEAD = 50
UNUSED = ("inited", "cluster_size", "embed_avg", "initialized")  # codebook buffers that only training reads


class PretrainedCodec:
    """A frozen Codec, in float32.

    Clips are encoded one by one: these models take no lengths, and another clip's padding would
    change the codes.
    """

    def __init__(self, model, kind: str, n_q: int, digest: str, device: str = "cpu"):
        self.model, self.kind, self.hash = model.to(device).eval().requires_grad_(False), kind, digest
        self.device = torch.device(device)
        self.history, self.lookahead = HISTORY, LOOKAHEAD
        rate, hop, _, vocab = _sizes(kind, model.config)
        self.spec = TokenSpec(kind, rate, hop, n_q, vocab)

    def encode(self, wav_BT, lengths_B) -> list:
        """codes_TQ (int64, on the CPU) of each clip: T = padded_samples(length) / 320 where the
        model has the pipeline's rate and hop, else ceil(length / hop), at least 1; zeros fill the
        last frame.

        Raises ValueError for wav_BT of another shape, lengths beyond it and samples that are no
        numbers.
        """
        codes, hop = [], self.spec.hop
        with torch.inference_mode(), no_tf32():
            for wav_T, n in zip(wav_BT, clip_lengths(wav_BT, lengths_B), strict=True):
                frames = _frames(self.spec, n)
                wav_11T = torch.zeros(1, 1, frames * hop, device=wav_T.device)  # the last frame is filled with zeros
                wav_11T[0, 0, :n] = wav_T[:n].float()
                check_finite(wav_11T)
                codes_1QT = _encode(self.kind, self.model, send(wav_11T, self.device), self.spec.n_q)
                codes.append(codes_1QT[0, :self.spec.n_q, :frames].T.long())
        # One copy a batch: after each clip's the device would wait for the next clip.
        joined_TQ = torch.cat(codes).cpu()
        return [codes_TQ.clone() for codes_TQ in joined_TQ.split([len(c) for c in codes])]

    def decode(self, codes_BTQ):
        """wav_BT float32 on the CPU, T = frames x hop, of any prefix of the levels.

        DAC leaves samples off the end where a stride is odd (8 with its 16 kHz model); they are
        zeros here.

        Raises ValueError for codes of another shape or outside 0 .. vocab - 1.
        """
        check_codes(codes_BTQ, self.spec)
        wav_BT = torch.zeros(len(codes_BTQ), codes_BTQ.shape[1] * self.spec.hop)
        if codes_BTQ.numel():
            with torch.inference_mode():
                decoded_BT = _decode(self.kind, self.model, codes_BTQ.transpose(1, 2).to(self.device)).float().cpu()
            decoded_BT = decoded_BT[:, :wav_BT.shape[1]]
            wav_BT[:, :decoded_BT.shape[1]] = decoded_BT
        return wav_BT


    def code_vectors(self):
        """codes_QVE float32: what each code adds to the latent."""
        with torch.inference_mode():
            return code_vectors(lambda codes_BTQ: _latents(self.kind, self.model, codes_BTQ.to(self.device)), self.spec)


def load_pretrained_codec(path: str, device: str = "cpu") -> PretrainedCodec:
    """The codec of a folder or URI in transformers' format, with all its levels and its own rate.

    Raises ArtifactError for what cannot be read as such. A build of the step `codec` goes to
    `acoustic.load_codec`.
    """
    data = hf.read_model(replace(hf.CODEC, field="--codec"), path)
    settings = data.json[CONFIG]
    model = _build(path, settings, data.weights)
    kind = settings["model_type"]
    return PretrainedCodec(model, kind, _sizes(kind, model.config)[2], data.digest, device)


def from_export(path: str, weights: dict, config: dict, digest: str, device: str = "cpu") -> PretrainedCodec:
    """The codec of what `import_codec` left (weights by name, export/config.json).

    Raises ArtifactError.
    """
    kind, settings = config.get("kind"), config.get("transformers")
    if kind not in CLASSES or not isinstance(settings, dict):
        raise ArtifactError(f"{path}/export/config.json is no imported codec's (kind {kind!r}): give the path of a build "
                            f"whose kind is one of {', '.join(CLASSES)}")
    model = _build(path, {**settings, "model_type": kind}, weights)
    # Stages and token shards trust these numbers, so they must be the model's.
    rate, hop, levels, vocab = _sizes(kind, model.config)
    found = {"sample_rate": rate, "hop": hop, "vocab": vocab, "n_q": min(levels, config.get("n_q", 0))}
    if wrong := [f"{name} {config.get(name)!r}, the model's is {value}" for name, value in found.items()
                 if config.get(name) != value]:
        raise ArtifactError(f"{path}/export/config.json says {'; '.join(wrong)}: run the step again (--force codec)")
    return PretrainedCodec(model, kind, config["n_q"], digest, device)


def import_codec(config: dict, inputs: dict, out) -> dict:
    """Step fn: config {"codec": hf.ImportedCodec} -> facts.

    Leaves export/ (see above) with the whole model.

    Raises ValueError where the model does not fit the pipeline or its bytes are no longer those of
    the plan.
    """
    want = config["codec"]
    data = hf.read_model(hf.CODEC, want.uri, want.digest)
    settings = data.json[CONFIG]
    model, kind = _build(want.uri, settings, data.weights), settings["model_type"]
    rate, hop, levels, vocab = _sizes(kind, model.config)
    fixes = []
    if (rate, hop) != (SAMPLE_RATE, ACOUSTIC_HOP):
        fixes.append(f"give a model of {SAMPLE_RATE} Hz and hop {ACOUSTIC_HOP} (as DAC's 16 kHz model)")
    if vocab != want.vocab:
        fixes.append(f"codec.vocab={vocab}")
    if want.n_q > levels:
        fixes.append(f"codec.n_q={levels} (or fewer)")
    # All that is wrong in one error: each fix alone would cost another start.
    if fixes:
        raise ValueError(f"codec.pretrained: {want.uri} ({kind}) has {rate} Hz, hop {hop}, {levels} levels and a vocabulary "
                         f"of {vocab}; the pipeline takes {SAMPLE_RATE} Hz and hop {ACOUSTIC_HOP}, the config asks for "
                         f"{want.n_q} levels (codec.n_q) and a vocabulary of {want.vocab} (codec.vocab). "
                         f"Fix: {', '.join(fixes)}")
    out.check()
    facts = {"kind": kind, "n_q": want.n_q, "sample_rate": rate, "hop": hop, "vocab": vocab}
    write_export(out.path, data.safetensors, {**facts, "transformers": settings})
    return {**facts, "levels": levels, "parameters": sum(p.numel() for p in model.parameters()), "digest": want.digest}


def _build(where: str, settings: dict, weights: dict):
    """transformers' model in float32. Raises ArtifactError, ConfigError."""
    kind = settings.get("model_type")
    return hf.build_model(where, kind, CLASSES, settings, weights,
                          lambda config: _check_kind(kind, config, settings), UNUSED)


def _check_kind(kind: str, config, settings: dict) -> None:
    """Raises ValueError for models whose sound is not in their codes alone."""
    if getattr(config, "audio_channels", 1) != 1:
        raise ValueError(f"audio_channels is {config.audio_channels}, only mono models can be used")
    if kind == "encodec" and (config.normalize or config.chunk_length_s is not None):
        raise ValueError(f"normalize is {config.normalize} and chunk_length_s {config.chunk_length_s}: each chunk then has "
                         "a loudness beside its codes, which tokens cannot carry (the 48 kHz model); use the 24 kHz kind")
    if kind == "mimi" and any(settings.get(half, {}) is None for half in ("encoder_config", "decoder_config")):
        raise ValueError("the model was saved with one half only, a codec needs encoder and decoder")


def _sizes(kind: str, config) -> tuple[int, int, int, int]:
    """(sample rate in Hz, hop in samples, levels, vocabulary)."""
    if kind == "dac":
        hop, levels = math.prod(config.downsampling_ratios), config.n_codebooks
    else:
        hop, levels = math.prod(config.upsampling_ratios), config.num_quantizers
    if kind == "mimi":  # it halves its convolutions' frame rate once more before the codes
        hop *= int(config.encodec_frame_rate / config.frame_rate)
    return config.sampling_rate, hop, levels, config.codebook_size


def _frames(spec: TokenSpec, samples: int) -> int:
    """Frames of a clip: whole semantic frames at the pipeline's rate and hop, else as few as hold
    it.
    """
    if (spec.sample_rate, spec.hop) == (SAMPLE_RATE, ACOUSTIC_HOP):
        return padded_samples(samples) // spec.hop
    return max(1, -(-samples // spec.hop))


def _encode(kind: str, model, wav_11T, n_q: int):
    """codes_1QT with at least n_q levels."""
    if kind == "encodec":  # its levels follow from a bandwidth in kb/s; the last is the highest
        return model.encode(wav_11T, bandwidth=model.config.target_bandwidths[-1]).audio_codes[0]
    if kind == "dac":
        return model.encode(wav_11T, n_quantizers=n_q).audio_codes
    return model.encode(wav_11T, num_quantizers=max(n_q, model.config.num_semantic_quantizers)).audio_codes


def _latents(kind: str, model, codes_BTQ):
    """x_BDT of any prefix of the levels."""
    codes_BQT = codes_BTQ.transpose(1, 2)
    if kind == "encodec":
        return model.quantizer.decode(codes_BQT.transpose(0, 1))
    return model.quantizer.from_codes(codes_BQT)[0] if kind == "dac" else model.quantizer.decode(codes_BQT)


def _decode(kind: str, model, codes_BQT):
    """wav_BT of one clip or several."""
    if kind == "encodec":
        return model.decode(codes_BQT[None], [None]).audio_values[:, 0]
    wav = model.decode(audio_codes=codes_BQT).audio_values  # DAC's is (B, T), Mimi's (B, 1, T)
    return wav if kind == "dac" else wav[:, 0]

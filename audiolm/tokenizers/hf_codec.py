"""EnCodec, DAC and Mimi in transformers' format behind the Codec protocol (base.Codec): by local path or fsspec URI.

A model is a folder with config.json and model.safetensors; pickles (.bin) are never read.  The step `import_codec`
copies one into its build, where export/config.json says kind, levels used and transformers' own config.
Shapes: wav_BT float32 at spec.sample_rate, lengths_B true samples, codes_TQ int64 of one clip on the CPU, codes_BTQ of
a batch (1: one clip).  torch and transformers are imported when a model is loaded, so a plan needs neither.
Sources: EnCodec 2210.13438, DAC 2306.06546, Mimi 2410.00037.
"""

from __future__ import annotations

import hashlib
import json
import math

from audiolm import store
from audiolm.config.base import Config, Runtime
from audiolm.tokenizers.base import (
    ACOUSTIC_HOP,
    SAMPLE_RATE,
    TokenSpec,
    check_codes,
    check_finite,
    clip_lengths,
    padded_samples,
)

CLASSES = {"encodec": ("EncodecConfig", "EncodecModel"), "dac": ("DacConfig", "DacModel"),
           "mimi": ("MimiConfig", "MimiModel")}
FILES = ("model.safetensors", "config.json")
# Frames of real sound to keep at either side of a piece cut out of long audio.  DAC looks a few frames both ways;
# EnCodec's LSTM and Mimi's attention look back without end, so there a cut is near to the whole, not equal to it.
HISTORY = LOOKAHEAD = 50
_UNUSED = ("inited", "cluster_size", "embed_avg", "initialized")  # codebook buffers that only training reads


class ImportedCodec(Config):
    """Config of the step `codec` where codec.pretrained is given: the model is its bytes, wherever they lie."""

    uri: Runtime[str]
    digest: str
    n_q: int
    vocab: int


class PretrainedCodec:
    """Frozen, in float32. Clips are encoded one by one: these models know no lengths, padding would reach the codes."""

    def __init__(self, model, kind: str, n_q: int, digest: str, device: str = "cpu"):
        self.model, self.kind, self.hash, self.device = model.to(device).eval().requires_grad_(False), kind, digest, device
        self.history, self.lookahead = HISTORY, LOOKAHEAD
        rate, hop, _, vocab = _sizes(kind, model.config)
        self.spec = TokenSpec(kind, rate, hop, n_q, vocab)

    def encode(self, wav_BT, lengths_B) -> list:
        """codes_TQ (int64, on the CPU) of each clip: T = padded_samples(length) / 320 where the model has the pipeline's
        rate and hop, else ceil(length / hop), at least 1; zeros fill the last frame.

        Raises ValueError for wav_BT of another shape, lengths beyond it and samples that are no numbers.
        """
        import torch

        codes, hop = [], self.spec.hop
        with torch.inference_mode():
            for wav_T, n in zip(wav_BT, clip_lengths(wav_BT, lengths_B), strict=True):
                frames = _frames(self.spec, n)
                wav_11T = torch.zeros(1, 1, frames * hop, device=self.device)
                wav_11T[0, 0, :n] = wav_T[:n].float()
                check_finite(wav_11T)
                codes_1QT = _encode(self.kind, self.model, wav_11T, self.spec.n_q)
                codes.append(codes_1QT[0, :self.spec.n_q, :frames].T.long().cpu().contiguous())
        return codes

    def decode(self, codes_BTQ):
        """wav_BT float32 on the CPU, T = frames x hop, of any prefix of the levels. DAC leaves a few samples off the
        end where a stride is odd (8 of its 16 kHz model's); zeros stand there.

        Raises ValueError for codes of another shape or outside 0 .. vocab - 1.
        """
        import torch

        check_codes(codes_BTQ, self.spec)
        wav_BT = torch.zeros(len(codes_BTQ), codes_BTQ.shape[1] * self.spec.hop)
        if codes_BTQ.numel():
            with torch.inference_mode():
                made_BT = _decode(self.kind, self.model, codes_BTQ.transpose(1, 2).to(self.device)).float().cpu()
            made_BT = made_BT[:, :wav_BT.shape[1]]
            wav_BT[:, :made_BT.shape[1]] = made_BT
        return wav_BT


def load_pretrained_codec(path: str, device: str = "cpu") -> PretrainedCodec:
    """The codec of a build of the step `codec` that was imported, or of a folder or URI in transformers' format, with
    all its levels and at its own rate. Raises ArtefactError (a ValueError) for what cannot be read as such."""
    if store.exists(store.join(path, "export", "config.json")):
        from audiolm.tokenizers.artifact import read_export

        weights, config, digest = read_export(path)
        return from_export(path, weights, config, digest, device)
    data = [_read(path, name) for name in FILES]
    kind, model = _build(path, json.loads(data[1]), data[0])
    return PretrainedCodec(model, kind, _sizes(kind, model.config)[2], _digest(data), device)


def from_export(path: str, weights: dict, config: dict, digest: str, device: str = "cpu") -> PretrainedCodec:
    """The codec of what `import_codec` left (weights by name, export/config.json). Raises ArtefactError."""
    from audiolm.tokenizers.artifact import ArtifactError

    kind, settings = config.get("kind"), config.get("transformers")
    if kind not in CLASSES or not isinstance(settings, dict):
        raise ArtifactError(f"{path}/export/config.json is no imported codec's (kind {kind!r}): give the path of a build "
                            f"whose kind is one of {', '.join(CLASSES)}")
    kind, model = _build(path, {**settings, "model_type": kind}, weights)
    rate, hop, levels, vocab = _sizes(kind, model.config)
    found = {"sample_rate": rate, "hop": hop, "vocab": vocab, "n_q": min(levels, config.get("n_q", 0))}
    if wrong := [f"{name} {config.get(name)!r}, the model's is {value}" for name, value in found.items()
                 if config.get(name) != value]:
        raise ArtifactError(f"{path}/export/config.json says {'; '.join(wrong)}: run the step again (--force codec)")
    return PretrainedCodec(model, kind, config["n_q"], digest, device)


def imported(uri: str, n_q: int, vocab: int) -> ImportedCodec:
    """The step's config, from the files' bytes, read in pieces. Raises ValueError where one is missing."""
    sha = hashlib.sha256()
    for name in FILES:
        try:
            for piece in store.pieces(store.join(uri, name)):
                sha.update(piece)
        except (FileNotFoundError, NotADirectoryError) as e:
            raise ValueError(f"codec.pretrained: {_missing(uri, name)}") from e
    return ImportedCodec(uri=uri, digest=sha.hexdigest()[:16], n_q=n_q, vocab=vocab)


def import_codec(config: dict, inputs: dict, out) -> dict:
    """Step fn: config {"codec": ImportedCodec} -> facts. Leaves export/ (see above) with the whole model.

    Raises ValueError where the model does not fit the pipeline or its bytes are no longer those of the plan.
    """
    want = config["codec"]
    data = [_read(want.uri, name) for name in FILES]
    if (found := _digest(data)) != want.digest:
        raise ValueError(f"codec.pretrained: the files at {want.uri} changed since this run was planned ({want.digest} -> "
                         f"{found}): start it again")
    settings = json.loads(data[1])
    kind, model = _build(want.uri, settings, data[0])
    rate, hop, levels, vocab = _sizes(kind, model.config)
    fixes = []
    if (rate, hop) != (SAMPLE_RATE, ACOUSTIC_HOP):
        fixes.append(f"give a model of {SAMPLE_RATE} Hz and hop {ACOUSTIC_HOP} (as DAC's 16 kHz model)")
    if vocab != want.vocab:
        fixes.append(f"codec.vocab={vocab}")
    if want.n_q > levels:
        fixes.append(f"codec.n_q={levels} (or fewer)")
    if fixes:
        raise ValueError(f"codec.pretrained: {want.uri} ({kind}) has {rate} Hz, hop {hop}, {levels} levels and a vocabulary "
                         f"of {vocab}; the pipeline takes {SAMPLE_RATE} Hz and hop {ACOUSTIC_HOP}, the config asks for "
                         f"{want.n_q} levels (codec.n_q) and a vocabulary of {want.vocab} (codec.vocab). "
                         f"Fix: {', '.join(fixes)}")
    out.check()
    store.put(store.join(out.path, "export", "model.safetensors"), data[0])
    facts = {"kind": kind, "n_q": want.n_q, "sample_rate": rate, "hop": hop, "vocab": vocab}
    store.put_json(store.join(out.path, "export", "config.json"), {**facts, "transformers": settings})
    return {**facts, "levels": levels, "parameters": sum(p.numel() for p in model.parameters()), "digest": want.digest}


def _read(uri: str, name: str) -> bytes:
    from audiolm.tokenizers.artifact import ArtifactError

    try:
        return store.get(store.join(uri, name))
    except (FileNotFoundError, NotADirectoryError) as e:
        raise ArtifactError(_missing(uri, name)) from e


def _missing(uri: str, name: str) -> str:
    pickles = [n for n in store.names(uri) if n.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    why = f"; {pickles[0]} is a pickle, which is never read" if pickles else ""
    return (f"{uri} holds no {name}{why}. A pretrained codec is a folder or URI with config.json and one "
            "model.safetensors: load the model with transformers and save it again with save_pretrained(folder)")


def _digest(data: list[bytes]) -> str:
    return hashlib.sha256(b"".join(data)).hexdigest()[:16]


def _build(where: str, settings: dict, weights: bytes | dict) -> tuple[str, object]:
    """(kind, transformers' model in float32). The weights go through from_pretrained, not load_state_dict, because
    names in files differ from a model's (older weight norm, Mimi's halves). Raises ArtefactError, ImportError."""
    try:
        import transformers
    except ImportError as e:
        raise ImportError("a pretrained codec needs the library transformers: pip install 'audiolm[pretrained]'") from e
    import safetensors.torch
    import torch

    from audiolm.tokenizers.artifact import ArtifactError

    kind = settings.get("model_type")
    if kind not in CLASSES:
        raise ArtifactError(f"{where}: config.json has model_type {kind!r}; the codecs that can be used are "
                            f"{', '.join(CLASSES)}")
    config_class, model_class = (getattr(transformers, name) for name in CLASSES[kind])
    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        config = config_class.from_dict(settings)
        _check_kind(kind, config, settings)
        weights = safetensors.torch.load(weights) if isinstance(weights, bytes) else weights
        model, report = model_class.from_pretrained(None, config=config, state_dict=weights, dtype=torch.float32,
                                                    output_loading_info=True)
    except Exception as e:  # transformers and safetensors raise many kinds for what is one fault: the files
        raise ArtifactError(f"{where}: config.json and model.safetensors make no {kind} model: {e}") from e
    finally:
        if bars:
            transformers.utils.logging.enable_progress_bar()
    missing = sorted(n for n in report["missing_keys"] if n.rsplit(".", 1)[-1] not in _UNUSED)
    wrong = [f"{len(names)} {what} ({', '.join(names[:3])})" for what, names in
             (("missing", missing), ("unexpected", sorted(report["unexpected_keys"]))) if names]
    surplus = len(weights) - len(model.state_dict())
    if surplus > 0 and not wrong:  # transformers' Mimi keeps silent on names in a half that it knows
        wrong = [f"{surplus} more than the model has"]
    if wrong:
        raise ArtifactError(f"{where}: model.safetensors does not fit config.json; tensors {' and '.join(wrong)}: save the "
                            "model again with save_pretrained")
    return kind, model


def _check_kind(kind: str, config, settings: dict) -> None:
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
    if kind == "mimi":
        hop *= int(config.encodec_frame_rate / config.frame_rate)
    return config.sampling_rate, hop, levels, config.codebook_size


def _frames(spec: TokenSpec, samples: int) -> int:
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


def _decode(kind: str, model, codes_BQT):
    if kind == "encodec":
        return model.decode(codes_BQT[None], [None]).audio_values[:, 0]
    made = model.decode(audio_codes=codes_BQT).audio_values
    return made if kind == "dac" else made[:, 0]

"""HuBERT, WavLM, wav2vec 2.0 and w2v-BERT 2.0 in transformers' format as Extractors.

These models make a frame every 320 samples (50 Hz), the semantic tokens one every 640: `features`
is the mean of frames 2i and 2i + 1, `raw` gives the frames themselves. Rows are padded with zeros
to a multiple of 640 samples, n', and by 40 at either side (w2v-BERT: 120), so that exactly n' / 320
frames come out. Rows of any lengths form a batch, in which padding changes no row (hf_batch.py).
Legend as in extractor.py.
Sources: HuBERT 2106.07447, WavLM 2110.13900, wav2vec 2.0 2006.11477, w2v-BERT 2.0 2312.05187.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence

import torch

from audiolm.models.transfer import send
from audiolm.tokenizers import hf
from audiolm.tokenizers.artifact import CONFIG, MASKED_FORMAT, ArtifactError, write_export
from audiolm.tokenizers.base import SAMPLE_RATE, SEMANTIC_HOP
from audiolm.tokenizers.extractor import frames_of, mask_padding
from audiolm.tokenizers.hf_batch import EDGE, group_rows, mel_inputs, per_row_group_norm, wave_inputs

MEL_FAMILY = "wav2vec2-bert"
CLASSES = {"hubert": ("HubertConfig", "HubertModel"), "wavlm": ("WavLMConfig", "WavLMModel"),
           "wav2vec2": ("Wav2Vec2Config", "Wav2Vec2Model"), MEL_FAMILY: ("Wav2Vec2BertConfig", "Wav2Vec2BertModel")}
# Equals transformers' hidden_states[n], but that some of its versions normalise the last one of
# do_stable_layer_norm models.
CONVENTION = "output of block n counted from 1, before the norm that closes the encoder where it has one"
HOP = 320
# In files with a head for training or recognition: what is not of the encoder, and what
# transformers puts before the rest.
HEADS = ("lm_head.", "quantizer.", "project_q.", "project_hid.", "projector.", "classifier.", "layer_weights", "tdnn.",
         "objective.")
PREFIXES = ("hubert.", "wavlm.", "wav2vec2.", "wav2vec2_bert.")
UNUSED = ("masked_spec_embed", "adapter.", "intermediate_ffn.")  # of training's masks, and beyond the last block
OFF = {"mask_time_prob": 0.0, "mask_feature_prob": 0.0, "add_adapter": False, "use_intermediate_ffn_before_adapter": False}


class TransformersExtractor:
    """A frozen Extractor.

    `settings` is transformers' config, `preprocessor` its front end (see `_preprocessor`).
    """

    convention = CONVENTION

    def __init__(self, model, settings: dict, preprocessor: dict):
        self.model, self.settings, self.preprocessor = model.eval().requires_grad_(False), settings, preprocessor
        self.family = settings["model_type"]
        self.layers, self.dim = model.config.num_hidden_layers, model.config.hidden_size

    def features(self, wav_BT, lengths_B, layers):
        """As the protocol says, at 25 Hz: the mean of each two frames of `raw`."""
        features, frames_B = self.raw(wav_BT, lengths_B, layers)
        return [x.view(len(x), -1, 2, self.dim).mean(2) for x in features], frames_B // 2

    def raw(self, wav_BT: torch.Tensor, lengths_B: torch.Tensor,
            layers: Sequence[int]) -> tuple[list[torch.Tensor], torch.Tensor]:
        """features_BTD (float32; zeros past a row's frames) of each of `layers` and frames_B, both
        at 50 Hz.

        Raises ValueError for a layer that the model does not have.
        """
        self._check(layers)
        device = next(self.model.parameters()).device
        wav_BT, frames_B = mask_padding(send(wav_BT, device), lengths_B)
        frames, lengths_B = frames_of(lengths_B), send(lengths_B, device)
        features = [wav_BT.new_zeros(len(wav_BT), 2 * max(frames), self.dim) for _ in layers]
        with torch.no_grad():
            # Most families take all rows at once; each part is cut to its own longest row.
            for rows in group_rows(self.model.config, frames):
                part = [frames[row] for row in rows]
                at = slice(None) if len(rows) == len(frames) else rows  # a list of numbers would be copied to the device
                outputs = self._blocks(wav_BT[at, :max(part) * SEMANTIC_HOP], lengths_B[at], part, layers)
                for x_BTD, output_BTD in zip(features, outputs, strict=True):
                    x_BTD[at, :2 * max(part)] = output_BTD.float()
            # Frames past a row's end hold whatever padding gave: zeros are the same for every
            # batch.
            inside_BT1 = (torch.arange(2 * max(frames), device=wav_BT.device) < 2 * frames_B[:, None])[..., None]
            return [x_BTD.mul_(inside_BT1) for x_BTD in features], 2 * frames_B

    def to(self, device, dtype=None):
        positions = getattr(self.model.encoder, "embed_positions", None)
        rates = getattr(positions, "inv_freq", None)
        self.model.to(device=device, dtype=dtype or torch.float32)
        # Rotary positions: bfloat16 is exact only up to 256, and transformers' cache follows
        # neither device nor dtype.
        if rates is not None:
            positions.inv_freq, positions.cached_sequence_length = rates.to(device), None
        return self

    def truncated(self, layer):
        self._check([layer])
        # A shallower config and the weights of its blocks compute the same up to that block. A norm
        # that follows the last block never runs, because outputs are taken at blocks.
        state = self.model.state_dict()
        above = {f"encoder.layers.{n}." for n in range(layer, self.layers)}
        kept = {name: value.float().cpu() if value.is_floating_point() else value.cpu() for name, value in state.items()
                if ".".join(name.split(".")[:3]) + "." not in above}
        return _extractor("the model", {**self.settings, "num_hidden_layers": layer}, kept, self.preprocessor)

    def state(self):
        return self.model.state_dict()

    def to_json(self):
        return {"family": self.family, "layer_convention": CONVENTION, "layers": self.layers, "dim": self.dim,
                "transformers": self.settings, "preprocessor": self.preprocessor}

    def _check(self, layers: Sequence[int]) -> None:
        if wrong := [n for n in layers if not 1 <= n <= self.layers]:
            raise ValueError(f"layer {wrong[0]}: the model ({self.family}) has {self.layers} blocks; give 1 to {self.layers}")

    def _blocks(self, wav_BT, lengths_B, frames: list[int], layers: Sequence[int]) -> list:
        """The blocks' outputs, transformers' hidden_states.

        Blocks above the highest layer are not computed.
        """
        frames_B = torch.tensor(frames)
        if self.family == MEL_FAMILY:
            inputs, mask = mel_inputs(wav_BT, frames_B, self.preprocessor["num_mel_bins"])
        else:
            inputs, mask = wave_inputs(wav_BT, lengths_B, frames_B, self.preprocessor["do_normalize"])
        outputs = {}

        def keep(n: int):
            def hook(module, args, output):
                outputs[n] = output[0] if isinstance(output, tuple) else output
                if n == max(layers):
                    raise _Enough
            return hook

        hooks = [self.model.encoder.layers[n - 1].register_forward_hook(keep(n)) for n in set(layers)]
        try:
            with per_row_group_norm(self.model, frames), contextlib.suppress(_Enough):
                self.model(inputs.to(next(self.model.parameters()).dtype), attention_mask=mask)
        finally:
            for hook in hooks:
                hook.remove()
        return [outputs[n] for n in layers]


class _Enough(Exception):
    """Raised by a hook to leave the forward pass once the highest layer is computed."""


def load_pretrained_encoder(uri: str) -> TransformersExtractor:
    """The model of a folder or URI; in float32 on the CPU.

    Raises ArtifactError for what cannot be read as such.
    """
    return _from_files(uri, hf.read_model(hf.ENCODER, uri))


def from_export(config: dict, weights: dict[str, torch.Tensor]) -> TransformersExtractor:
    """The extractor of `to_json` and `state`; in float32 on the CPU.

    Raises ArtifactError where they do not fit.
    """
    if config.get("layer_convention") != CONVENTION:
        raise ArtifactError(f"layer_convention is {config.get('layer_convention')!r}, this code reads {CONVENTION!r}: "
                            "import the model again (--force masked_model)")
    settings = config.get("transformers")
    if not isinstance(settings, dict) or settings.get("model_type") != config.get("family"):
        raise ArtifactError(f"family is {config.get('family')!r}, `transformers` describes another model: import the model "
                            "again (--force masked_model)")
    return _extractor("the export", settings, weights, config.get("preprocessor", {}))


def import_encoder(config: dict, inputs: dict, out) -> dict:
    """Step fn: config {"encoder": hf.PretrainedModel} -> facts.

    Leaves export/ for `semantic.load_extractor`: the encoder alone, in float32.

    Raises ArtifactError where the model cannot be used or its bytes are no longer those of the
    plan.
    """
    want = config["encoder"]
    extractor = _from_files(want.uri, hf.read_model(hf.ENCODER, want.uri, want.digest))
    out.check()
    write_export(out.path, {f"encoder.{name}": value for name, value in extractor.state().items()}, {
        "format": MASKED_FORMAT, **extractor.to_json(), "sample_rate": SAMPLE_RATE, "hop": SEMANTIC_HOP,
        "source": {"digest": want.digest}})
    return {"family": extractor.family, "layers": extractor.layers, "dim": extractor.dim, "sample_rate": SAMPLE_RATE,
            "rate_hz": SAMPLE_RATE / SEMANTIC_HOP, "parameters": sum(p.numel() for p in extractor.model.parameters()),
            "digest": want.digest}


def _from_files(uri: str, data: hf.ModelBytes) -> TransformersExtractor:
    alone, beside = hf.ENCODER.optional
    preprocessor = data.json.get(alone) or data.json.get(beside, {}).get("feature_extractor", {})
    return _extractor(f"{hf.ENCODER.field}: {uri}", data.json[CONFIG], data.weights, preprocessor)


def _extractor(where: str, settings: dict, weights: dict, given: dict) -> TransformersExtractor:
    family = settings.get("model_type")
    model = hf.build_model(where, family, CLASSES, settings, _inner(weights), _switch_off)
    preprocessor = _preprocessor(where, family, given)
    # use_diff=False: defaults of this version of transformers become part of the export, whatever a
    # later one has.
    described = json.loads(model.config.to_json_string(use_diff=False))
    _check_rate(where, family, model.config, preprocessor)
    return TransformersExtractor(model, {k: v for k, v in described.items() if k != "_name_or_path"}, preprocessor)


def _preprocessor(where: str, family: str, given: dict) -> dict:
    """The fields of preprocessor_config.json that change features, or transformers' defaults.

    do_normalize: zero mean and unit variance over an utterance's true samples; w2v-BERT normalises
    each mel band over all frames instead.
    """
    kind = "SeamlessM4TFeatureExtractor" if family == MEL_FAMILY else "Wav2Vec2FeatureExtractor"
    named, rate = given.get("feature_extractor_type", kind), given.get("sampling_rate", SAMPLE_RATE)
    if named != kind:
        raise ArtifactError(f"{where}: preprocessor_config.json has feature_extractor_type {named!r}, {family} needs {kind}: "
                            "save that beside the model with save_pretrained(folder)")
    if rate != SAMPLE_RATE:
        raise ArtifactError(f"{where}: preprocessor_config.json has sampling_rate {rate}; the pipeline runs at {SAMPLE_RATE} "
                            "Hz: give a model of that rate")
    if family == MEL_FAMILY:
        return {"sampling_rate": rate, "num_mel_bins": given.get("num_mel_bins", 80), "stride": given.get("stride", 2)}
    return {"sampling_rate": rate, "do_normalize": given.get("do_normalize", True)}


def _inner(weights: dict) -> dict:
    """The encoder's weights by the names of transformers' base model, without any head.
    """
    stripped, inside = {}, any(name.startswith(PREFIXES) for name in weights)
    # An x-vector model's head has the name of the base model's convolutions, which then have a
    # prefix.
    heads = (*HEADS, "feature_extractor.") if inside else HEADS
    for name, value in weights.items():
        if prefix := next((p for p in PREFIXES if name.startswith(p)), None):
            name = name.removeprefix(prefix)
        elif name.startswith(heads):
            continue
        if not name.startswith(UNUSED):
            stripped[name] = value
    return stripped


def _switch_off(config) -> None:
    """Turns off what only training uses, and modules past the last block."""
    for name, value in OFF.items():
        if hasattr(config, name):
            setattr(config, name, value)


def _check_rate(where: str, family: str, config, preprocessor: dict) -> None:
    """Raises ArtifactError for a model without a frame each 320 samples; two make a semantic frame.
    """
    if family == MEL_FAMILY:
        bands, stride = preprocessor["num_mel_bins"], preprocessor["stride"]
        if stride != 2 or bands * stride != config.feature_projection_input_dim:
            raise ArtifactError(f"{where}: preprocessor_config.json has num_mel_bins {bands} and stride {stride}, the model "
                                f"takes {config.feature_projection_input_dim} numbers each 20 ms: set stride to 2, "
                                "num_mel_bins to half")
        return

    # Frames of the convolutions for one semantic frame and for 100, with the zeros at either end.
    def frames(samples: int) -> int:
        for kernel, stride in zip(config.conv_kernel, config.conv_stride, strict=True):
            samples = (samples - kernel) // stride + 1
        return samples

    if any(frames(n + 2 * EDGE) != n // HOP for n in (SEMANTIC_HOP, 100 * SEMANTIC_HOP)):
        raise ArtifactError(f"{where}: config.json has conv_kernel {list(config.conv_kernel)} and conv_stride "
                            f"{list(config.conv_stride)}; the pipeline takes models with a frame each {HOP} samples and a "
                            "receptive field of 400")

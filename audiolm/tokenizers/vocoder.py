"""Semantic tokens as a codec (base.Codec): a tokenizer and the vocoder that was trained on its tokens.

It measures what semantic tokens alone keep of the sound (2209.03143, Table I).  Shapes as in base; codes at 25 Hz, of
one or more levels, and any prefix of them decodes.
"""

from __future__ import annotations

import torch

from audiolm.models.vocoder import SemanticVocoder
from audiolm.tokenizers.artifact import ArtifactError, fill_module, read_export, require_keys
from audiolm.tokenizers.base import TokenSpec, check_codes
from audiolm.tokenizers.residual import ResidualTokenizer

KIND = "semantic-vocoder"
SIZES = ("levels", "vocab", "dim", "layers", "channels")


class SemanticCodec:
    """Frozen. Its levels are the vocoder's, which may be fewer than the tokenizer's."""

    def __init__(self, tokenizer: ResidualTokenizer, model: SemanticVocoder, digest: str, device: str = "cpu"):
        self.tokenizer, self.model, self.hash, self.device = tokenizer, model.to(device).eval(), digest, device
        spec = tokenizer.spec
        self.spec = TokenSpec(KIND, spec.sample_rate, spec.hop, model.levels, spec.vocab)

    def encode(self, wav_BT: torch.Tensor, lengths_B: torch.Tensor) -> list[torch.Tensor]:
        """codes_TQ (int64, on the CPU) of each clip, T = padded_samples(length) / 640."""
        return [codes_TQ[:, :self.spec.n_q] for codes_TQ in self.tokenizer.encode(wav_BT, lengths_B)]

    @torch.inference_mode()
    def decode(self, codes_BTQ: torch.Tensor) -> torch.Tensor:
        """wav_BT float32 on the CPU, T = frames x 640, of any prefix of the levels; a clip is held whole.

        Raises ValueError for codes of another shape or outside 0 .. vocab - 1.
        """
        check_codes(codes_BTQ, self.spec)
        if not codes_BTQ.numel():
            return torch.zeros(len(codes_BTQ), 0)
        return self.model(codes_BTQ.to(self.device)).float().cpu()


def load_vocoder(build: str, tokenizer: ResidualTokenizer, device: str = "cpu") -> SemanticCodec:
    """The codec of a finished vocoder build. `tokenizer` must be the one that the vocoder was trained on.

    Raises ArtifactError for another tokenizer, and where config and weights do not fit.
    """
    weights, config, digest = read_export(build)
    require_keys(build, config, KIND, (*SIZES, "tokens"), "semantic vocoder")
    levels, has = config["levels"], tokenizer.spec.n_q
    if levels > has:
        raise ArtifactError(f"{build} was trained on {levels} levels, the tokenizer has {has}: give the residual build too")
    if config["tokens"] != tokenizer.hash_of(levels):
        raise ArtifactError(f"{build} was trained on the tokens of {config['tokens']}, these are of "
                            f"{tokenizer.hash_of(levels)}: give the kmeans (and residual) builds it was trained "
                            "on, or train it again")
    model = SemanticVocoder(**{key: config[key] for key in SIZES}, norm=False)
    fill_module(build, model, weights, "semantic vocoder")
    return SemanticCodec(tokenizer, model, digest, device)

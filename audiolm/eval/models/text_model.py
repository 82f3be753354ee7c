"""Likelihood of a text under a causal text model of transformers, given by path.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable

from audiolm import store
from audiolm.eval.models.asr import PRETRAINED

Score = Callable[[str], tuple[float, int]]  # text -> (nats, tokens)


def missing_dependency(text_model: str | None) -> str | None:
    """The missing model or package, with the fix; None where texts can be scored."""
    if text_model is None:
        return "no text model: name the folder of a transformers causal model, tables.text_model=FOLDER"
    return None if importlib.util.find_spec("transformers") else f"transformers not installed: {PRETRAINED}"


def scorer(text_model: str, device: str = "cpu") -> Score:
    """Function of a text that gives (nats, tokens): every token is scored after the model's start token.

    Models without a start token begin with their end token; without either the first token is not scored.
    Raises ValueError where `text_model` holds no causal model with its tokenizer.
    """
    import torch
    import transformers

    try:
        with tempfile.TemporaryDirectory() as folder:
            path = store.local_copy(text_model, folder)
            tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
            model = transformers.AutoModelForCausalLM.from_pretrained(path, local_files_only=True, use_safetensors=True,
                                                                      dtype=torch.float32)
    except (OSError, ValueError) as e:
        raise ValueError(f"tables.text_model: {text_model} holds no causal text model of transformers ({e}): give a folder "
                         "with config.json, model.safetensors and a tokenizer of a ...ForCausalLM model") from e
    model.to(device).eval()
    first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id

    @torch.inference_mode()
    def score(text: str) -> tuple[float, int]:
        ids = ([] if first is None else [first]) + tokenizer(text, add_special_tokens=False).input_ids
        ids_T = torch.tensor(ids, device=device)
        logits_TV = model(input_ids=ids_T[None]).logits[0, :-1].float()
        return float(torch.nn.functional.cross_entropy(logits_TV, ids_T[1:], reduction="sum")), len(ids) - 1

    return score

"""How fast audiolm generates here: ids a second of one stage, and whole continuations; nothing is asserted.

    python tests/bench/generation.py                            the quickstart's sizes on the CPU
    python tests/bench/generation.py --device cuda              12 x 1024, bfloat16, batches 1, 16 and 64
    python tests/bench/generation.py --run outputs/runs/quickstart.json     a trained run's own models

Random weights unless --run; a stage draws --ids ids after a prompt of 1,152, whose prefill is taken off.  A continuation is
3 s of prompt and 7 s more, codec and semantic encoder included; random stages are not deduplicated, so that lengths are fixed.
audiolm-pytorch's semantic stage of the same size runs beside ours where it is installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from audiolm import store  # noqa: E402
from audiolm.config.load import load_config  # noqa: E402
from audiolm.data.tokens import RATIO  # noqa: E402
from audiolm.generate import audiolm  # noqa: E402
from audiolm.generate.load import load  # noqa: E402
from audiolm.lm.layouts import build_stages  # noqa: E402
from audiolm.lm.model import build_lm  # noqa: E402
from audiolm.models.conformer import Encoder, EncoderSizes
from audiolm.models.soundstream import SoundStream, SoundStreamSizes, fold
from audiolm.tokenizers.acoustic import AcousticTokenizer  # noqa: E402
from audiolm.tokenizers.extractor import ConformerExtractor, Window
from audiolm.tokenizers.semantic import SemanticTokenizer  # noqa: E402
from tests.bench.figures import Figure  # noqa: E402
from tests.bench.timing import best  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
PROMPT, PROMPT_S, SECONDS = 1152, 3.0, 7.0


def random_system(device: str, kind: str, config: str, channels: int | None = None) -> audiolm.AudioLM:
    """Of the sizes of a config among the workflows; its codec is a SoundStream, of `channels` in place of the config's."""
    cfg = load_config(str(ROOT / "workflows" / config), [])
    m, c = cfg.semantic.model, cfg.codec
    lm = cfg.lm.model_copy(update={"dedupe": False, "coarse": cfg.lm.coarse.model_copy(update={"kind": kind})})
    with torch.device(device):
        encoder = Encoder(EncoderSizes(m.dim, m.layers, m.heads, m.ff))
        codec = fold(SoundStream(SoundStreamSizes(c.strides, channels or c.enc_channels, channels or c.dec_channels, c.dim,
                                             c.n_q, c.vocab)))
        models = {}
        for stage in build_stages(lm, c.n_q, c.vocab, cfg.semantic.kmeans.k).values():
            model = build_lm(stage, getattr(lm, stage.name)).eval().requires_grad_(False)
            models[stage.name] = model.bfloat16() if device == "cuda" else model, stage
    torch.nn.init.normal_(codec.quantizer.codebook_QND, std=0.1)
    k = cfg.semantic.kmeans.k
    tokenizer = SemanticTokenizer(ConformerExtractor(encoder), m.layers, torch.zeros(m.dim), torch.ones(m.dim),
                                  torch.randn(k, m.dim), Window(750, 50), "", device)
    return audiolm.AudioLM(tokenizer, AcousticTokenizer(codec, "", device), models, 1.0, device=device)


def stage_rate(system: audiolm.AudioLM, batch: int, ids: int, repeats: int) -> Figure:
    """Ids a second of the coarse stage with a full cache."""
    _, stage = system.models["coarse"]
    frame = stage.slots if stage.frames else 1  # ids of a position
    ids -= ids % frame
    room = min(PROMPT, stage.max_len - ids // frame)
    # the coarse stage: a prefix of semantic ids, then codes up to the length asked for
    frames = (room - 2) // (1 + stage.frame_ids)
    z, codes = np.arange(frames) % stage.k, np.zeros((RATIO * frames, stage.levels[1]), np.int64)
    prompt, forced, sampler = stage.prompt(z), stage.targets(codes), system._samplers["coarse"]

    def draw(n: int) -> None:
        sampler([prompt] * batch, len(forced) + n, forced=[forced] * batch, seeds=range(batch))

    took = best(lambda: draw(ids + frame), repeats, system.device) - best(lambda: draw(frame), repeats, system.device)
    return Figure(f"sample coarse{', frames' if stage.frames else ''}, batch {batch}", batch * ids / took, "ids/s")


def whole(system: audiolm.AudioLM, batch: int, repeats: int, seconds: float = SECONDS) -> list[Figure]:
    """Seconds that continuations of a batch of prompts take, and those of each part."""
    draw = np.random.default_rng(0)
    prompts = [(0.1 * draw.standard_normal(round(16_000 * PROMPT_S))).astype(np.float32) for _ in range(batch)]

    def work() -> None:
        system.spent_s.clear()
        system.continuation(prompts, seconds, list(range(batch)), may_end=False)

    took = best(work, repeats, system.device, warm=1)
    frames = "coarse" in system.models and system.stage("coarse").frames
    what = f"continue {seconds:g} s{', frames' if frames else ''}, batch {batch}"
    return [Figure(what, took, "s"), *(Figure(f"{what}: {name}", spent, "s") for name, spent in system.spent_s.items())]


def other(device: str, batch: int, ids: int, repeats: int) -> None:
    if importlib.util.find_spec("audiolm_pytorch") is None:
        print("audiolm-pytorch is not installed: pip install audiolm-pytorch sets its figure beside ours")
        return
    from audiolm_pytorch import SemanticTransformer, SemanticTransformerWrapper

    size = {"dim": 1024, "depth": 12, "heads": 16} if device == "cuda" else {"dim": 128, "depth": 4, "heads": 4}
    try:
        model = SemanticTransformerWrapper(transformer=SemanticTransformer(num_semantic_tokens=1024, **size)).to(device).eval()
    except OSError as e:  # it asks the network for a text encoder's config, whatever is generated
        print(f"audiolm-pytorch cannot be built here: {str(e).splitlines()[0]}")
        return
    prompt = torch.randint(0, 1024, (batch, PROMPT), device=device)
    work = lambda: model.generate(max_length=PROMPT + ids, prime_ids=prompt)  # noqa: E731
    took = best(work, repeats, device, warm=1)
    print(f"audiolm-pytorch, semantic stage, {PROMPT:,} ids in the cache, batch {batch:3}: {batch * ids / took:10,.0f} ids/s")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    p.add_argument("--run", metavar="FILE", help="a run's index: its models instead of random ones")
    p.add_argument("--batches", type=int, nargs="+", help="of the stage; default 1 4 on a CPU, 1 16 64 on a GPU")
    p.add_argument("--ids", type=int, default=256, help="drawn by the stage")
    p.add_argument("--kind", choices=("flat", "frame"), default="flat", help="of the coarse stage, where it is random")
    p.add_argument("--compile", action="store_true", help="a token's layers and draws, by torch.compile")
    p.add_argument("--repeats", type=int, default=3)
    args = p.parse_args()
    gpu = args.device == "cuda"
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name() if gpu else f'{torch.get_num_threads()} CPU thread(s)'}")
    if args.run:
        steps = store.get_json(args.run)["steps"]
        system = load({name: step["path"] for name, step in steps.items()}, args.device)
    else:
        system = random_system(args.device, args.kind, "paper.yaml" if gpu else "scratch.yaml")
    if args.compile:
        system.compile_sampling()
    for batch in args.batches or ((1, 16, 64) if gpu else (1, 4)):
        print(stage_rate(system, batch, args.ids, args.repeats), flush=True)
    for batch in (1, 32) if gpu else (1, 4):
        print(*whole(system, batch, args.repeats), sep="\n", flush=True)
    other(args.device, 1, args.ids, 1)


if __name__ == "__main__":
    main()

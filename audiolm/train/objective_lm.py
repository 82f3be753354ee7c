"""The objective of a language-model stage (paper III-C): next-token cross-entropy over the stage's targets.

The loss is the mean in nats per target token over the whole global batch, token-weighted over micro-batches and ranks;
acoustic stages also report it per level (EOS counts in the level's slot it is predicted in).  Three stages are three
values of one Stage type.  Shapes: ids_BT, target_BT as data.batches; logits_BTV, entry t predicts ids t + 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from audiolm import rng
from audiolm.config import LM
from audiolm.data.batches import TokenBatches
from audiolm.data.tokens import TokenStore
from audiolm.lm.model import build_lm, export_lm
from audiolm.lm.nats import by_level, target_nats
from audiolm.lm.stages import Stage, build_stages
from audiolm.train.engine import all_sum
from audiolm.train.objective import Context

EVAL_BATCH = 8  # validation rows a forward pass, over a rank's share


def lm_objective(config: Mapping[str, Any], inputs: Mapping[str, str], ctx: Context) -> LMObjective:
    """Factory. config: stage ("lm_semantic", "lm_coarse" or "lm_fine"), lm (its config.Stage), dedupe, coarse_levels,
    rows (validation crops), seed; inputs: paths of manifest, semantic_tokens, acoustic_tokens (what the stage reads).

    Raises TokenError for stores that do not belong together, ValueError for a stage the codec leaves no room for.
    """
    return LMObjective(config, inputs, ctx)


def stage_of(config: Mapping[str, Any], inputs: Mapping[str, str]) -> Stage:
    """The stage's layout; sizes come from the token stores it reads. Raises ValueError where there is no such stage."""
    specs = {name: TokenStore(inputs[name]).spec for name in ("semantic_tokens", "acoustic_tokens") if name in inputs}
    k = specs["semantic_tokens"]["vocab"] if "semantic_tokens" in specs else 0
    name, coarse = config["stage"], config["coarse_levels"]
    acoustic = specs.get("acoustic_tokens", {"n_q": coarse, "vocab": 0})
    own = {name.removeprefix("lm_"): config["lm"]}
    lm = LM.model_validate({"dedupe": config["dedupe"], "coarse_levels": coarse, **own})
    stages = build_stages(lm, acoustic["n_q"], acoustic["vocab"], k)
    if name not in stages:
        raise ValueError(f"stage is {name!r}; with lm.coarse_levels {coarse} and codec.n_q {acoustic['n_q']} there are "
                         f"{sorted(stages)}")
    return stages[name]


class LMObjective:
    """State of one stage's training: the model, its batches and its validation rows."""

    unit, exported = "tokens", "lm"

    def __init__(self, config: Mapping[str, Any], inputs: Mapping[str, str], ctx: Context):
        self.ctx, self.name, self.seed = ctx, config["stage"], config["seed"]
        self.stage = stage_of(config, inputs)
        self.shape = config["lm"]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(rng.derive(self.seed, f"init {self.name}"))
            self.modules: dict[str, nn.Module] = {"lm": build_lm(self.stage, self.shape)}
        paths = [inputs["manifest"], inputs.get("semantic_tokens"), inputs.get("acoustic_tokens")]
        where, batch = self.shape.where, self.shape.train.batch
        self.data = TokenBatches(*paths, self.stage, "train", where, batch, self.seed)
        self.dev = TokenBatches(*paths, self.stage, "dev", where, batch, self.seed)
        self.rows = self.dev.fixed(config["rows"])
        self.levels_V = torch.from_numpy(self.stage.level_table())

    def load(self, step: int, rows: Sequence[int]) -> dict[str, torch.Tensor]:
        return self.data.batch(step, rows)

    def train_step(self, engines: Mapping[str, Any], batches: list[dict[str, torch.Tensor]],
                   step: int) -> dict[str, torch.Tensor]:
        """One update; all ranks take part."""
        engine, device = engines["lm"], self.ctx.device
        engine.module.train()
        own = sum(b["target_BT"][:, 1:].sum() for b in batches).to(device)
        tokens = all_sum(own.double())
        sums = torch.zeros(2, self.stage.levels[1] + 1, dtype=torch.float64, device=device)  # nats, tokens by level
        for i, batch in enumerate(batches):
            ids_BT, target_BT = batch["ids_BT"].to(device), batch["target_BT"].to(device)
            nats, levels = target_nats(engine(ids_BT), ids_BT, target_BT, self.levels_V.to(device))
            # engines average over ranks, so each rank's share is scaled by their number: the sum is the global mean
            engine.backward(nats.sum() * (self.ctx.world / tokens.float()), last=i == len(batches) - 1)
            sums += by_level(nats.detach(), levels, sums.shape[1])
        sums = all_sum(sums)
        loss = sums[0].sum() / tokens
        norm = engine.step()
        return {"loss": loss, "units": tokens, "grad_norm": norm, **self._per_level(sums)}

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Nats per target token on fixed dev rows, split over ranks; all ranks take part."""
        module, device = self.modules["lm"], self.ctx.device
        module.eval()
        sums = torch.zeros(2, self.stage.levels[1] + 1, dtype=torch.float64, device=device)
        own = self.rows[self.ctx.rank::self.ctx.world]
        for i in range(0, len(own), EVAL_BATCH):
            batch = self.dev.collate([self.dev.packed(*row) for row in own[i:i + EVAL_BATCH]])
            ids_BT, target_BT = batch["ids_BT"].to(device), batch["target_BT"].to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=self.shape.train.dtype == "bfloat16"):
                logits_BTV = module(ids_BT)
            nats, levels = target_nats(logits_BTV, ids_BT, target_BT, self.levels_V.to(device))
            sums += by_level(nats, levels, sums.shape[1])
        module.train()
        sums = all_sum(sums)
        loss = sums[0].sum() / sums[1].sum()
        return {k: float(v) for k, v in {"loss": loss, "tokens": sums[1].sum(), **self._per_level(sums)}.items()}

    def export(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        return export_lm(self.modules["lm"], self.stage, self.shape)

    def _per_level(self, sums: torch.Tensor) -> dict[str, torch.Tensor]:
        """Loss of each target level, counted from 1 as the paper does; nothing for the semantic stage."""
        return {f"loss.level{q + 1}": sums[0, q + 1] / sums[1, q + 1].clamp_min(1) for q in range(*self.stage.levels)}

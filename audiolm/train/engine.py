"""Modules under an optimizer: `torch` and `deepspeed` (ZeRO 0 to 3, 1910.02054), which compute the same.

Both keep fp32 master weights, as an update is often smaller than a bfloat16 weight's last bit, and run bfloat16 by
autocast.  Gradients are averaged over ranks; a loss is this rank's share.
`state()` gives and `saved` takes one canonical form: param/NAME, exp_avg/NAME, exp_avg_sq/NAME, buffer/NAME.  A checkpoint
of any engine and world size resumes on any other.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import socket
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from audiolm.config.training import TrainConfig
from audiolm.train.objectives.base import Context, autocast

Saved = dict[str, torch.Tensor]
MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW (1711.05101)
WHOLE_NUMEL = 100_000  # ZeRO 3 leaves parameters up to this size whole on every rank: gathering them costs more than it saves
BUCKET_NUMEL = 500_000_000  # elements of one reduction, DeepSpeed's default

_alone = False  # see `alone`


@contextlib.contextmanager
def alone():
    """Within the block all_sum waits for no other rank: for a rank's own trial."""
    global _alone
    _alone = True
    try:
        yield
    finally:
        _alone = False


def all_sum(x: torch.Tensor) -> torch.Tensor:
    """The sum over ranks; x itself when there is one. All ranks take part."""
    if dist.is_initialized() and dist.get_world_size() > 1 and not _alone:
        x = x.detach().clone()
        dist.all_reduce(x)
    return x


def learning_rate(train: TrainConfig, step: int) -> float:
    """Linear warm-up, constant, linear decay to zero over the last `decay_steps`; step counts from 0.

    Before the decay nothing depends on `steps`: runs of any length share that trunk.
    """
    up = min(1.0, (step + 1) / train.warmup_steps) if train.warmup_steps else 1.0
    down = min(1.0, (train.steps - step) / train.decay_steps) if train.decay_steps else 1.0
    return train.lr * min(up, down)


def decayed(module: nn.Module) -> list[str]:
    """Names of the parameters under weight decay: the weights of linear and convolution layers.

    Weight norm splits such a weight into a gain (original0), spared, and a direction (original1), decayed.  Biases, norms,
    embeddings, code tables and position tables are spared too: a row that a step does not use gets no gradient, and
    would only shrink.
    """
    tables = {f"{name}.weight" for name, m in module.named_modules() if isinstance(m, nn.Embedding)}
    return [name for name, p in module.named_parameters() if p.ndim >= 2 and name not in tables
            and (name.rpartition(".")[2] == "weight" or name.endswith("parametrizations.weight.original1"))]


def _adamw(module: nn.Module, train: TrainConfig) -> torch.optim.AdamW:
    """AdamW of both engines: one group with weight decay, one without (`decayed`)."""
    names = set(decayed(module))
    params = [(name in names, p) for name, p in module.named_parameters() if p.requires_grad]
    groups = [{"params": [p for under, p in params if under], "weight_decay": train.weight_decay},
              {"params": [p for under, p in params if not under], "weight_decay": 0.0}]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=train.lr, betas=train.betas, eps=1e-8,
                             fused=next(module.parameters()).is_cuda)


def _with_gradients(module: nn.Module) -> list[nn.Parameter]:
    """The trainable parameters; those that no loss reached get a gradient of zero.

    All parameters then have the same number of updates, the one number that a checkpoint keeps.
    """
    params = [p for p in module.parameters() if p.requires_grad]
    for p in params:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    return params


def is_weight(name: str) -> bool:
    """True for the canonical names of parameters and buffers, which an export keeps; moments are only for resuming."""
    return name.startswith(("param/", "buffer/"))


def load_weights(module: nn.Module, saved: Saved) -> None:
    """Loads parameters and buffers of a canonical checkpoint. Raises ValueError where they do not fit the module."""
    state = {k.partition("/")[2]: v for k, v in saved.items() if is_weight(k)}
    own = module.state_dict()
    wrong = sorted(set(own) ^ set(state)) or [k for k in own if own[k].shape != state[k].shape]
    if wrong:
        raise ValueError(f"the checkpoint is of another configuration: {', '.join(wrong[:5])} differ"
                         f"{' and more' if len(wrong) > 5 else ''}")
    module.load_state_dict(state)


class TorchEngine:
    """Plain PyTorch; several ranks average their gradients in one flat reduction."""

    def __init__(self, module: nn.Module, train: TrainConfig, ctx: Context, saved: Saved | None, updates: int):
        self.module, self.train, self.ctx, self.updates = module.to(ctx.device), train, ctx, updates
        if saved:
            load_weights(module, saved)
        self.optimizer = _adamw(module, train)
        if saved and updates:
            _set_moments(module, self.optimizer, saved, updates)

    def __call__(self, *args) -> Any:
        with autocast(self.ctx.device, self.train.dtype):
            return self.module(*args)

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def step(self) -> torch.Tensor:
        """One update; all ranks take part. Returns the gradient norm before clipping."""
        params = _with_gradients(self.module)
        if self.ctx.world > 1:  # one reduction of all gradients: a reduction has a fixed cost
            flat = all_sum(torch.cat([p.grad.flatten() for p in params])) / self.ctx.world
            for p, g in zip(params, flat.split([p.numel() for p in params]), strict=True):
                p.grad.copy_(g.view_as(p))
        # Returned before clipping, as it shows a training that is about to diverge; an infinite limit clips nothing.
        norm = torch.nn.utils.clip_grad_norm_(params, self.train.clip or float("inf"))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.updates += 1
        return norm

    def set_lr(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def state(self) -> Saved:
        """The canonical state, a copy on the CPU of rank 0; {} on others."""
        return {} if self.ctx.rank else _plain_state(self.module, self.optimizer, self.updates)

    def gathered(self) -> contextlib.AbstractContextManager:
        """Within the block the module's weights are whole, and rank 0 may change them. All ranks take part."""
        return contextlib.nullcontext()


class DeepSpeedEngine:
    """DeepSpeed ZeRO; the optimizer is torch's AdamW (no CPU extension to compile). All ranks take part in every call."""

    def __init__(self, module: nn.Module, train: TrainConfig, ctx: Context, saved: Saved | None, updates: int):
        deepspeed = _deepspeed(ctx)
        self.module, self.train, self.ctx, self.updates = module.to(ctx.device), train, ctx, updates
        if saved:
            load_weights(module, saved)  # before initialize, which copies the weights into its partitions
        with contextlib.redirect_stdout(io.StringIO()):  # it prints what it built
            self.engine, self._optimizer, _, _ = deepspeed.initialize(
                model=module, optimizer=_adamw(module, train), config=_zero_config(module, train, ctx.world))
        if saved and updates:
            self._load_moments(saved, updates)

    def __call__(self, *args) -> Any:
        return self.engine(*args)

    def backward(self, loss: torch.Tensor) -> None:
        self.engine.backward(loss, scale_wrt_gas=False)  # objectives scale by the whole step, not by micro-batches

    def step(self) -> torch.Tensor:
        """One update. Returns the gradient norm before clipping."""
        # Without ZeRO DeepSpeed reports no norm, and reduces the gradients only within its step.
        norm = self._reduced_norm() if self.train.zero == 0 else None
        self.engine.step()
        self.updates += 1
        return torch.as_tensor(norm if norm is not None else self.engine.get_global_grad_norm() or 0.0)

    def _reduced_norm(self) -> torch.Tensor:
        """The norm of the averaged gradients, on a copy: DeepSpeed averages its own in `step`."""
        flat = torch.cat([p.grad.flatten() for p in _with_gradients(self.module)])
        if dist.is_initialized() and dist.get_world_size() > 1:
            flat = all_sum(flat) / dist.get_world_size()
        return flat.norm()

    def set_lr(self, lr: float) -> None:
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr

    def state(self) -> Saved:
        """The canonical state, a copy on the CPU of rank 0; {} on others. All ranks take part.

        ZeRO splits moments (from stage 1) and weights (stage 3) over ranks.  They are gathered one parameter at a time, so
        that no GPU has to hold all of them.
        """
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        first = self.ctx.rank == 0
        if self.train.zero == 0:
            return _plain_state(self.module, self._optimizer, self.updates) if first else {}
        if self.updates:
            self._link_moments()
        state = weights(self.module, parameters=False) if first else {}
        for name, p in self.module.named_parameters():
            if p.requires_grad:
                whole = {"param": safe_get_full_fp32_param(p),
                         **{key: safe_get_full_optimizer_state(p, key) for key in MOMENTS if self.updates}}
            else:  # a frozen parameter is whole on every rank, and the optimizer does not know it
                whole = {"param": p, **{key: torch.zeros_like(p) for key in MOMENTS if self.updates}}
            if first:
                state |= {f"{key}/{name}": value.detach().to("cpu", copy=True) for key, value in whole.items()}
        return state

    @contextlib.contextmanager
    def gathered(self) -> Iterator[None]:
        """Within the block the module's weights are whole, and rank 0 may change them. All ranks take part.

        There a forward pass gathers and splits nothing, so that ranks may make different numbers of them.
        """
        if self.train.zero < 3:  # stages 1 and 2 split moments and gradients; weights are whole on every rank
            yield
            return
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(self.module.parameters()), modifier_rank=0), _without_hooks(self.module):
            yield

    def _link_moments(self) -> None:
        """Points the parameters at their moments.

        ZeRO does it once, after its first group stepped, and so misses the moments of the other groups.  The names are
        private; tests/train/test_engine.py guards them.
        """
        if self.train.zero == 3:
            return
        zero = self.engine.optimizer
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()

    def _load_moments(self, saved: Saved, updates: int) -> None:
        if self.train.zero == 0:
            _set_moments(self.module, self._optimizer, saved, updates)
            return
        from deepspeed.utils import safe_set_full_optimizer_state

        zero = self.engine.optimizer
        parts = zero.fp32_partitioned_groups_flat if self.train.zero == 3 else zero.single_partition_of_fp32_groups
        for flat in parts:  # the state that AdamW's first step would create
            zero.optimizer.state[flat] = _adamw_state(updates, flat, {key: torch.zeros_like(flat) for key in MOMENTS})
        self._link_moments()
        for name, p in self.module.named_parameters():
            for key in MOMENTS:
                safe_set_full_optimizer_state(p, saved[f"{key}/{name}"].to(p.device), key)


@contextlib.contextmanager
def _without_hooks(module: nn.Module) -> Iterator[None]:
    """Takes away the hooks of forward passes, which are DeepSpeed's alone, within the block."""
    kept = [(m, m._forward_pre_hooks, m._forward_hooks) for m in module.modules()]
    for m, _, _ in kept:
        m._forward_pre_hooks, m._forward_hooks = OrderedDict(), OrderedDict()
    try:
        yield
    finally:
        for m, before, after in kept:
            m._forward_pre_hooks, m._forward_hooks = before, after


def weights(module: nn.Module, parameters: bool = True) -> Saved:
    """Buffers and, where asked, parameters by canonical name, copied to the CPU."""
    params = {n for n, _ in module.named_parameters()}
    return {f"{'param' if n in params else 'buffer'}/{n}": v.detach().to("cpu", copy=True)
            for n, v in module.state_dict().items() if parameters or n not in params}


def _plain_state(module: nn.Module, optimizer: torch.optim.Optimizer, updates: int) -> Saved:
    state = weights(module)
    for name, p in module.named_parameters():
        for key in MOMENTS if updates else ():  # before the first update there are none
            moment = optimizer.state[p].get(key)
            state[f"{key}/{name}"] = (torch.zeros_like(p) if moment is None else moment.detach()).to("cpu", copy=True)
    return state


def _set_moments(module: nn.Module, optimizer: torch.optim.Optimizer, saved: Saved, updates: int) -> None:
    for name, p in module.named_parameters():
        optimizer.state[p] = _adamw_state(updates, p, {key: saved[f"{key}/{name}"].to(p.device).clone() for key in MOMENTS})


def _adamw_state(updates: int, like: torch.Tensor, moments: Saved) -> Saved:
    """One parameter's state as AdamW keeps it; the count of updates is beside the weights, where the fused kernel reads it."""
    return {"step": torch.tensor(float(updates), device=like.device), **moments}


def _zero_config(module: nn.Module, train: TrainConfig, world: int) -> dict[str, Any]:
    numel = sum(p.numel() for p in module.parameters())
    bucket = min(numel + numel % 2, BUCKET_NUMEL)  # DeepSpeed wants an even number
    return {
        # Objectives accumulate over micro-batches themselves: to DeepSpeed a step is one batch.
        "train_micro_batch_size_per_gpu": train.batch // world, "gradient_accumulation_steps": 1,
        "train_batch_size": train.batch, "managed_gradient_accumulation": False, "gradient_clipping": train.clip,
        "zero_allow_untested_optimizer": True, "steps_per_print": 2**62,
        # No "safe" modules: their gradients would be added over micro-batches and ranks in bfloat16; they compute in it anyway.
        "torch_autocast": {"enabled": train.dtype == "bfloat16", "dtype": "bfloat16", "lower_precision_safe_modules": []},
        "zero_optimization": {"stage": train.zero, "overlap_comm": False, "contiguous_gradients": train.zero > 1,
                              "reduce_bucket_size": bucket, "allgather_bucket_size": bucket,
                              "stage3_param_persistence_threshold": WHOLE_NUMEL,
                              # else ZeRO 3 replaces torch's linear for all of the process, with other rounding
                              "memory_efficient_linear": False}}


def make_engine(module: nn.Module, train: TrainConfig, ctx: Context, saved: Saved | None = None,
                updates: int = 0) -> TorchEngine | DeepSpeedEngine:
    return {"torch": TorchEngine, "deepspeed": DeepSpeedEngine}[train.engine](module, train, ctx, saved, updates)


def _deepspeed(ctx: Context):
    """The library, with a process group where no launcher made one: for a single worker."""
    if ctx.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # Twice: the library sets its logger's level again when it is imported.
    os.environ.setdefault("DS_LOG_LEVEL", "error")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # An extension that only speeds up inference between processes on CPUs; compiling it takes a minute and 3 GB.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not dist.is_initialized():  # Ray Train makes the group of its workers; one alone is a group of one
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        dist.init_process_group("nccl" if ctx.device.type == "cuda" else "gloo", rank=0, world_size=1)
    with contextlib.redirect_stdout(io.StringIO()):
        deepspeed.init_distributed(dist_init_required=False, verbose=False)
    return deepspeed

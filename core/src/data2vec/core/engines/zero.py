"""DeepSpeed ZeRO with the teacher inside the engine's module, so that it is sharded as the student is.

Parameters are fp32 and autocast casts them, so the average is taken of fp32 values. At stage 3 a rank moves its shard
of the teacher towards its shard of the student: they are cut alike, and no byte is exchanged.

What DeepSpeed's own checkpoints lose (frozen parameters, a step for each parameter, atomicity) does not matter here:
this engine gives and takes tensors by name, in pieces, as every engine does.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore

from data2vec.core.checkpoints.pieces import Piece
from data2vec.core.distributed.device import choose_device
from data2vec.core.distributed.ranks import Ranks
from data2vec.core.engines.engine import Engine, Shares, compile_blocks, recompute_blocks, shared_out, uses_bf16
from data2vec.core.engines.optimiser import adamw_state, build_optimiser, check_moments, load_adamw_state, set_rate
from data2vec.core.errors import ConfigError
from data2vec.core.settings.fields import EngineConfig, Recipe, Switch
from data2vec.core.task import Step, Task, check_state, lerp

_log = logging.getLogger(__name__)
_MOMENTS = ("exp_avg", "exp_avg_sq")


class _Loss(nn.Module):
    """A task behind one tensor, which is what DeepSpeed's hooks understand."""

    def __init__(self, task: Task[Any], device: torch.device, bf16: bool) -> None:
        super().__init__()
        self.task = task
        self.given: Step | None = None
        self._device_type, self._bf16 = device.type, bf16

    def forward(self, prepared: Any, seed: int, update: int, scale: float) -> Tensor:
        """The summed loss times ``scale``; what the task gives stays in ``given``."""
        # Here and not around the engine, which would switch it off; its own autocast rounds the gradients that ranks
        # exchange.
        with torch.autocast(self._device_type, torch.bfloat16, enabled=self._bf16):
            step: Step = self.task(prepared, seed=seed, update=update)
        self.given = step
        return step.total * scale


def deepspeed_settings(config: EngineConfig, clip: float | None) -> dict[str, Any]:
    """DeepSpeed's configuration: ours, then the user's ``engine.deepspeed``."""
    zero: dict[str, Any] = {
        "stage": config.zero_stage,
        "contiguous_gradients": True,
        "overlap_comm": False,
        "reduce_bucket_size": config.bucket_size,
        "allgather_bucket_size": config.bucket_size,
        "memory_efficient_linear": False,  # would replace torch.nn.functional.linear for the whole process
    }
    if config.zero_stage == 3:
        zero["stage3_param_persistence_threshold"] = config.persistence_threshold
        zero["stage3_prefetch_bucket_size"] = config.bucket_size
    if config.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if config.offload_parameters:
        zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,  # of its own bookkeeping only: batches are ours
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,  # a step is where the training loop says
        "gradient_clipping": clip or 0.0,  # it clips at 1.0 where nothing is said
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # that one is compiled at first use
        "steps_per_print": 2**62,
    }
    return _merged(settings, config.deepspeed)


def _merged(ours: dict[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(ours)
    for key, value in theirs.items():
        old = merged.get(key)
        merged[key] = _merged(old, value) if isinstance(old, dict) and isinstance(value, Mapping) else value
    return merged


class DeepSpeedEngine(Engine):
    """See :class:`data2vec.core.engines.engine.Engine`."""

    def __init__(self, task: Task[Any], recipe: Recipe, ranks: Ranks) -> None:
        """Hand the task to DeepSpeed; every rank must have built the same one.

        Raises:
            ConfigError: DeepSpeed is not installed or refuses the settings, or ``train.device`` is not usable here.
        """
        train, self.stage = recipe.train, recipe.engine.zero_stage
        self.ranks, self.task, self.seed = ranks, task, train.seed
        self.device = choose_device(train.device)
        self.bf16 = uses_bf16(train.precision, self.device)
        recompute_blocks(task, train.activation_checkpointing)
        self.sharded = self.stage == 3
        self._names = list(task.own_state())  # before parameters are cut
        self._shapes = {name: value.shape for name, value in task.state_dict().items()}
        switch = train.compile
        if self.stage == 3 and switch is not Switch.OFF:
            if switch is Switch.ON or self.device.type == "cuda":
                _log.warning("blocks are not compiled at ZeRO stage 3, where that gives wrong results: running eagerly")
            switch = Switch.OFF
        self.compiled = compile_blocks(task, switch, self.device)
        base = build_optimiser(task, recipe.optim)
        self._clip = recipe.optim.clip
        self._norm: Tensor | None = None
        if self.stage == 0:
            base.register_step_pre_hook(self._clip_all)
        settings = deepspeed_settings(recipe.engine, self._clip if self.stage else None)
        self._engine = _initialise(_Loss(task, self.device, self.bf16), base, settings, self.device)
        self._base = base
        # DeepSpeed adds attributes to parameters at stage 3, which no type declares.
        self._pairs: list[tuple[str, Any, Any]] = list(task.followers())
        self._check_pairs()

    def _check_pairs(self) -> None:
        """Check what the average relies on; assertions, because only a change of DeepSpeed can break it."""
        assert all(not mine.requires_grad for _, mine, _ in self._pairs)
        assert all(value.dtype == torch.float32 for _, mine, theirs in self._pairs for value in (mine, theirs))
        if self.stage == 3:
            for name, mine, theirs in self._pairs:
                assert mine.ds_shape == theirs.ds_shape, name
                assert mine.ds_tensor.shape == theirs.ds_tensor.shape, name
                assert getattr(mine, "ds_secondary_tensor", None) is None, name

    def accumulate(self, prepared: Any, *, scale: float, update: int) -> Step:
        """See :class:`Engine`."""
        # DeepSpeed averages gradients over ranks.
        loss = self._engine(prepared, self.seed, update, self.ranks.world * scale)
        step: Step = self._engine.module.given
        self._engine.backward(loss)
        return step

    def _clip_all(self, optimiser: Any, *rest: Any) -> None:
        """Stage 0: just before the step, when gradients have been summed over ranks."""
        trained = [p for group in optimiser.param_groups for p in group["params"]]
        for parameter in trained:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if self._clip is None:
            self._norm = nn.utils.get_total_norm([p.grad for p in trained])
        else:
            self._norm = nn.utils.clip_grad_norm_(trained, self._clip)

    def step(self, rate: float, update: int) -> Tensor:
        """See :class:`Engine`."""
        set_rate(self._engine.optimizer.param_groups, rate, update)
        self._engine.step()
        norm = self._norm if self.stage == 0 else self._engine.get_global_grad_norm()
        self._forget_gradients()
        if self._engine.was_step_applied():
            self.task.after_step(update, self.move)
        return torch.as_tensor(float("nan") if norm is None else norm, device=self.device)

    def _forget_gradients(self) -> None:
        """Else a parameter without a gradient in the next update, as of a dropped layer, would get this one's."""
        zero = self._engine.optimizer
        kept: list[Tensor] = []
        offloaded: list[Tensor] = []  # partitions whose gradients, and norms of those, stay in host memory
        if self.stage == 3:
            kept = [zero.grad_partitions_flat_buffer]
            offloaded = zero.fp32_partitioned_groups_flat if zero.offload_optimizer else []
        elif self.stage and zero.cpu_offload:
            kept = list(zero.accumulated_grads_in_cpu.values())
            offloaded = zero.single_partition_of_fp32_groups
        if offloaded:
            zero.norm_for_param_grads.clear()
        for gradient in (*kept, *(partition.grad for partition in offloaded if partition.grad is not None)):
            gradient.zero_()

    @torch.no_grad()
    def move(self, followers: Sequence[Any], followed: Sequence[Any], share: float) -> None:
        """Move parameters towards others; at stage 3 each rank its shards, without communication."""
        if self.stage < 3:
            lerp(followers, followed, share)
            return
        shards = [(mine.ds_tensor, theirs.ds_tensor) for mine, theirs in zip(followers, followed, strict=True)]
        # Parameters that stay whole on every rank: the copies that the forward pass reads move as the shards do.
        shards += [
            (mine.data, theirs.data)
            for mine, theirs in zip(followers, followed, strict=True)
            if _is_whole(mine) and mine.data_ptr() != mine.ds_tensor.data_ptr()
        ]
        for device in {mine.device for mine, _ in shards}:
            here = [(mine, theirs.to(device)) for mine, theirs in shards if mine.device == device]
            lerp([mine for mine, _ in here], [theirs for _, theirs in here], share)
        if self.device.type == "cuda":  # the next gathering may read the shards on another stream
            torch.cuda.current_stream(self.device).synchronize()

    def state(self) -> dict[str, Shares]:
        """See :class:`Engine`."""
        rank, world = self.ranks.rank, self.ranks.world
        if self.stage == 3:
            return {"model": self._sharded_model(), "optimiser": self._sharded_moments()}
        model = shared_out(self.task.own_state(), rank, world)
        if self.stage == 0:
            return {"model": model, "optimiser": shared_out(adamw_state(self._base, self.task), rank, world)}
        optimiser: dict[str, Tensor | Piece] = {}
        for name, parameter, fragment, state in self._fragments():
            start, length = fragment.lp_fragment_address.start, fragment.lp_fragment_address.numel
            for moment in _MOMENTS:
                values = state[moment].narrow(0, fragment.hp_fragment_address.start, length)
                optimiser[f"{name}/{moment}"] = Piece(values, start, tuple(parameter.shape))
            if start == 0:
                optimiser[f"{name}/step"] = state["step"].reshape(())
        return {"model": model, "optimiser": optimiser}

    def _fragments(self) -> Iterator[tuple[str, nn.Parameter, Any, dict[str, Tensor]]]:
        """Stages 1 and 2: (name, parameter, its place in this rank's flat partition, the partition's moments)."""
        flat = self._engine.optimizer.single_partition_of_fp32_groups
        for name, parameter in self.task.named_parameters():
            fragment = getattr(parameter, "_hp_mapping", None)
            if parameter.requires_grad and fragment is not None:
                partition = flat[fragment.param_group_index]
                yield name, parameter, fragment, self._moments_of(partition)

    def _moments_of(self, flat: Tensor) -> dict[str, Tensor]:
        """AdamW's state of a flat partition, made where there was no step yet."""
        state: dict[str, Tensor] = self._base.state[flat]
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)
            for moment in _MOMENTS:
                state[moment] = torch.zeros_like(flat)
        return state

    def _sharded_model(self) -> Shares:
        mine: dict[str, Tensor | Piece] = {}
        parameters: dict[str, Any] = dict(self.task.named_parameters(remove_duplicate=False))
        buffers = dict(self.task.named_buffers(remove_duplicate=False))
        for name in self._names:
            if name in parameters:
                parameter = parameters[name]
                start, length = self._shard(parameter)
                if length:
                    values = parameter.ds_tensor.flatten()[:length]
                    mine[name] = Piece(values, start, tuple(parameter.ds_shape))
            elif self.ranks.first:
                mine[name] = buffers[name]
        return mine

    def _shard(self, parameter: Any) -> tuple[int, int]:
        """Find where this rank's shard begins in the flattened parameter, and its elements without padding."""
        size = parameter.ds_tensor.ds_numel
        start = self.ranks.rank * size
        return start, max(0, min(size, parameter.ds_numel - start))

    def _sharded_moments(self) -> Shares:
        optimiser: dict[str, Tensor | Piece] = {}
        for name, parameter, flat, offset in self._shards_of_moments():
            start, length = self._shard(parameter)
            state = self._moments_of(flat)
            if length:
                for moment in _MOMENTS:
                    values = state[moment].narrow(0, offset, length)
                    optimiser[f"{name}/{moment}"] = Piece(values, start, tuple(parameter.ds_shape))
            if self.ranks.first:
                optimiser[f"{name}/step"] = state["step"].reshape(())
        return optimiser

    def _shards_of_moments(self) -> Iterator[tuple[str, Any, Tensor, int]]:
        """Stage 3: (name, parameter, the flat partition that holds its shard, where in it)."""
        zero = self._engine.optimizer
        for name, parameter in self.task.named_parameters():
            if parameter.requires_grad:
                group, offset, _ = zero.grad_position[zero.get_param_id(parameter)]
                yield name, parameter, zero.fp32_partitioned_groups_flat[group], offset

    def load_state(self, model: Mapping[str, Tensor], optimiser: Mapping[str, Tensor]) -> None:
        """See :class:`Engine`."""
        trained = {name: self._shapes[name] for name, p in self.task.named_parameters() if p.requires_grad}
        for _ in check_moments(optimiser, trained):
            pass  # before anything is changed
        if self.stage == 3:
            self._load_sharded(model, optimiser)
            return
        self.task.load_own_state(model)
        if self.stage == 0:
            load_adamw_state(self._base, self.task, optimiser)
            return
        self._engine.optimizer.refresh_fp32_params()
        for name, _, fragment, state in self._fragments():
            start, length = fragment.lp_fragment_address.start, fragment.lp_fragment_address.numel
            for moment in _MOMENTS:
                here = state[moment].narrow(0, fragment.hp_fragment_address.start, length)
                if f"{name}/{moment}" in optimiser:
                    here.copy_(optimiser[f"{name}/{moment}"].flatten()[start : start + length])
            if f"{name}/step" in optimiser:
                state["step"].copy_(optimiser[f"{name}/step"])

    @torch.no_grad()
    def _load_sharded(self, model: Mapping[str, Tensor], optimiser: Mapping[str, Tensor]) -> None:
        check_state(model, {name: self._shapes[name] for name in self._names})
        parameters: dict[str, Any] = dict(self.task.named_parameters(remove_duplicate=False))
        buffers = dict(self.task.named_buffers(remove_duplicate=False))
        for name in self._names:
            whole = model[name]
            if name not in parameters:
                buffers[name].copy_(whole)
                continue
            parameter = parameters[name]
            start, length = self._shard(parameter)
            parameter.ds_tensor.flatten()[:length].copy_(whole.flatten()[start : start + length])
            if _is_whole(parameter):
                parameter.data.copy_(whole.view(parameter.ds_shape))
        for name, parameter, flat, offset in self._shards_of_moments():
            start, length = self._shard(parameter)
            flat.data.narrow(0, offset, length).copy_(model[name].flatten()[start : start + length])
            state = self._moments_of(flat)
            for moment in _MOMENTS:
                if f"{name}/{moment}" in optimiser:
                    part = optimiser[f"{name}/{moment}"].flatten()[start : start + length]
                    state[moment].narrow(0, offset, length).copy_(part)
            if f"{name}/step" in optimiser:
                state["step"].copy_(optimiser[f"{name}/step"])


def _is_whole(parameter: Any) -> bool:
    """Tell whether a parameter of stage 3 stands whole on this rank at the moment."""
    return bool(parameter.ds_status.name == "AVAILABLE")


def _initialise(module: nn.Module, optimiser: Any, settings: Mapping[str, Any], device: torch.device) -> Any:
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed
    except ImportError as error:
        raise ConfigError(
            [f"engine.kind=deepspeed: {error}; install data2vec-core[deepspeed] (Linux), or use engine.kind=torch"]
        ) from None
    deepspeed.utils.logger.setLevel(logging.WARNING)
    if device.type == "cpu":  # else it compiles an operator for shared memory, which needs a compiler
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    for name, value in (("RANK", dist.get_rank()), ("WORLD_SIZE", dist.get_world_size()), ("LOCAL_RANK", 0)):
        os.environ.setdefault(name, str(value))
    try:
        engine, *_ = deepspeed.initialize(model=module, optimizer=optimiser, config=dict(settings))
    except (ValueError, AssertionError, TypeError, KeyError, NotImplementedError) as error:
        first = " ".join(str(error).split())[:500]
        raise ConfigError([f"engine.deepspeed: DeepSpeed refuses these settings ({first})"]) from None
    return engine

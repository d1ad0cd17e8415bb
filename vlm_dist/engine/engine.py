"""The engine: a model, an optimizer and ZeRO behind a few verbs.

forward or loss, backward (any number of times), step
save, collect_trainable, restore_trainable
zero_gradients
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vlm_dist.engine.cpu_adam import use_cpu_adam
from vlm_dist.engine.device_time import DeviceTimer, leave_out_gathering
from vlm_dist.engine.inspection import GradientInspector
from vlm_dist.engine.merge import check_read_back
from vlm_dist.engine.outcome import StepOutcome
from vlm_dist.engine.partitions import Partitions
from vlm_dist.engine.rehearsal import Snapshot, held_bytes
from vlm_dist.engine.replicated import initialise_replicated
from vlm_dist.engine.resharding import Resharder
from vlm_dist.engine.runtime import init_deepspeed_comm
from vlm_dist.engine.secondary_shards import check_nothing_stale, check_secondary_shards, uses_secondary_shards
from vlm_dist.engine.slices import ReadElements, SlicedState
from vlm_dist.engine.trainable_names import compute_dtype_of, trainable_names
from vlm_dist.engine.trainable_state import TrainableState
from vlm_dist.engine.transfer import Transfer
from vlm_dist.engine.zero_buffers import forget_gradients, forget_kept_gradients, round_masters_into_weights
from vlm_dist.engine.zero_init import release_zero_init
from vlm_dist.errors import CheckpointError, ConfigError
from vlm_dist.loss import LabelledHead, TokenGroups

#: What DeepSpeed's dynamic loss scaler counts; all of it decides when the scale changes next.
LOSS_SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


class Engine:
    """A model under ZeRO. Made by `Engine.initialise`.

    Attributes:
        module: the model; for evaluation and generation call it directly, on all ranks equally often.
        device: where inputs go.
        world_size: number of ranks.
        zero_stage: 0 to 3.
        compute_dtype: of forward and backward.
        base_learning_rate: of the first parameter group, before the schedule's factor.
        head: gives the loss without the logits.
        forward_timer: for whoever measures forward passes; knows what is waiting for other ranks.
    """

    def __init__(
        self,
        deepspeed_engine: Any,
        *,
        names: Mapping[int, str],
        lr_schedule: Callable[[int], float],
        base_learning_rates: Sequence[float],
        compute_dtype: torch.dtype,
        control_group: dist.ProcessGroup,
        head: LabelledHead,
    ) -> None:
        from vlm_dist.engine.checkpoint_hook import CheckpointHook  # imports DeepSpeed

        self._deepspeed = deepspeed_engine
        self._zero = deepspeed_engine.optimizer
        self.module: nn.Module = deepspeed_engine.module
        self.device: torch.device = torch.device(deepspeed_engine.device)
        self.world_size: int = deepspeed_engine.dp_world_size
        self.zero_stage: int = int(deepspeed_engine.zero_optimization_stage())
        self.compute_dtype = compute_dtype
        self._optimizer: torch.optim.Optimizer = deepspeed_engine.basic_optimizer
        self._lr_schedule = lr_schedule
        self._base_learning_rates = list(base_learning_rates)
        self.base_learning_rate = self._base_learning_rates[0]
        self._num_updates = 0
        self._control_group = control_group
        self.head = head
        partitions = Partitions(self._zero, self.zero_stage, names)
        self._resharder = Resharder(partitions, self._optimizer, control_group)
        self._inspector = GradientInspector(self._zero, self.zero_stage, partitions, dist.get_rank(control_group))
        self._checkpoint_hook = CheckpointHook(deepspeed_engine)
        self._transfer = Transfer.to(self.device, self.compute_dtype)
        self.forward_timer = DeviceTimer(self.device)
        if self.zero_stage == 3:
            leave_out_gathering(self._zero, self.forward_timer)
        self._is_hpz_on_trial = uses_secondary_shards(deepspeed_engine.config)
        if self._is_hpz_on_trial:
            check_secondary_shards(self.module, control_group)

    @classmethod
    def initialise(
        cls,
        model: nn.Module,
        optimizer_factory: Callable[[list[dict[str, Any]]], torch.optim.Optimizer],
        param_groups: list[dict[str, Any]],
        lr_schedule: Callable[[int], float],
        ds_config: Mapping[str, Any],
        control_group: dist.ProcessGroup | None = None,
        report: Callable[[str], None] = lambda message: None,
    ) -> Engine:
        """Put a model under ZeRO. Collective: every rank calls this.

        Args:
            model: loaded within `zero_init_context`.
            optimizer_factory: makes torch's Adam or AdamW from the groups.
            param_groups: all trainable parameters, each in exactly one group.
            lr_schedule: number of applied updates -> factor on each group's learning rate.
            ds_config: from `merge_deepspeed_config`, with the number of trainable parameters.
            control_group: a gloo group of all ranks, over which state is collected; None makes one.
            report: where messages go.

        Raises:
            ConfigError: DeepSpeed rejects the configuration, or changes it, or an option does not keep its promise.
            ModelError: the groups are not the model's trainable parameters, or have the wrong dtype.
        """
        init_deepspeed_comm()
        import deepspeed

        if control_group is None:
            made = dist.new_group(backend="gloo")
            assert isinstance(made, dist.ProcessGroup)
            control_group = made
        compute_dtype = compute_dtype_of(ds_config)
        names = trainable_names(model, param_groups, compute_dtype)
        base_learning_rates: list[float] = []

        def make_optimizer(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
            optimizer = optimizer_factory(groups)
            if not isinstance(optimizer, torch.optim.Adam):  # AdamW is a subclass
                raise ConfigError(f"the optimizer is {type(optimizer).__name__}; checkpoints know Adam and AdamW only")
            base_learning_rates.extend(float(group["lr"]) for group in optimizer.param_groups)
            assert control_group is not None
            optimizer, notice = use_cpu_adam(optimizer, ds_config, control_group)
            if notice is not None:
                report(f"notice: {notice}")
            return optimizer

        head = LabelledHead(model)
        try:
            with redirect_stdout(StringIO()):  # its BF16_Optimizer prints memory readings that nobody asked for
                filled = [group for group in param_groups if group["params"]]
                if ds_config["zero_optimization"]["stage"] == 0:
                    deepspeed_engine = initialise_replicated(model, make_optimizer, filled, ds_config)
                else:
                    deepspeed_engine, *_ = deepspeed.initialize(
                        model=model,
                        optimizer=make_optimizer,
                        model_parameters=filled,
                        config=dict(ds_config),
                        dist_init_required=False,
                    )
        except (ValueError, AssertionError) as error:
            raise ConfigError(f"DeepSpeed rejects the configuration: {error}") from error
        check_read_back(ds_config, deepspeed_engine._config)
        return cls(
            deepspeed_engine,
            names=names,
            lr_schedule=lr_schedule,
            base_learning_rates=base_learning_rates,
            compute_dtype=compute_dtype,
            control_group=control_group,
            head=head,
        )

    def forward(self, inputs: Mapping[str, Any]) -> Tensor:
        """Run the model on one micro-batch. Collective under ZeRO-3.

        Args:
            inputs: keyword arguments of the model; tensors are moved to the device, and floating ones to the compute
                dtype.

        Returns:
            Logits [B, T, V].
        """
        return self._forward(inputs).logits  # type: ignore[no-any-return]

    def loss(
        self,
        inputs: Mapping[str, Any],
        labels: Tensor,
        ignore_index: int = -100,
        groups: TokenGroups | None = None,
    ) -> Tensor:
        """Run the model on one micro-batch, without the logits of positions that have no label. See `forward`.

        Args:
            inputs: keyword arguments of the model.
            labels: [B, T], on the CPU; `ignore_index` marks positions without a label.
            ignore_index: the value of a position without a label.
            groups: of the positions with a label, where their parts of the sum are wanted, too.

        Returns:
            Scalar float32 in nats: the sum over this micro-batch's target tokens, as `token_loss_sum` defines it.
        """
        with self.head.giving_loss(labels, ignore_index, groups):
            return self._forward(inputs)["loss"]  # type: ignore[no-any-return]

    def _forward(self, inputs: Mapping[str, Any]) -> Any:
        # no cache: transformers looks for the samples of a packed row only where there is none
        return self._deepspeed(**self._transfer.take(inputs), use_cache=False)

    def copy_ahead(self, inputs: Mapping[str, Any]) -> None:
        """Begin to copy what `loss` or `forward` will be given next to the device, while it computes.

        Args:
            inputs: the very object that will be given.
        """
        self._transfer.begin(inputs)

    def backward(self, loss_sum: Tensor, num_target_tokens: int) -> None:
        """Add one micro-batch to the gradient. Collective: every rank calls this equally often.

        After all micro-batches of all ranks the gradient is d(sum of all their losses) / d(parameters) /
        num_target_tokens, however the step was cut.

        Args:
            loss_sum: scalar float32, the sum over this micro-batch's target tokens.
            num_target_tokens: of the whole step, over all ranks and micro-batches; the same in every call.
        """
        # DeepSpeed averages over the ranks, and would average over its own count of micro-batches.
        scale = torch.full_like(loss_sum, self.world_size / num_target_tokens, requires_grad=False)
        # a loss of inf may have a finite gradient: it must not be applied either; asking here would stall the device
        loss = loss_sum * scale.where(loss_sum.detach().isfinite(), torch.nan)
        if self.zero_stage == 0:
            loss = loss * self._zero.loss_scale  # DeepSpeed knows the scale of its own optimizers only
        self._deepspeed.backward(loss, scale_wrt_gas=False)

    def step(self) -> StepOutcome:
        """Clip, update and forget the gradient. Collective: every rank calls this."""
        factor = self._lr_schedule(self._num_updates)
        for group, base in zip(self._optimizer.param_groups, self._base_learning_rates, strict=True):
            group["lr"] = base * factor
        self._inspector.begin_step()
        self._deepspeed.step()
        applied = bool(self._deepspeed.was_step_applied())
        self._num_updates += applied
        forget_kept_gradients(self._zero, self.zero_stage)
        if self._is_hpz_on_trial and applied:
            check_nothing_stale((p for p in self.module.parameters() if p.requires_grad), self._control_group)
            self._is_hpz_on_trial = False
        return StepOutcome(
            applied,
            float(self._optimizer.param_groups[0]["lr"]),
            self._zero._global_grad_norm,
            self._inspector.names,
            self._inspector.is_scale_search,
        )

    def zero_gradients(self) -> None:
        """Forget what was accumulated since the last step, as if backward had not been called."""
        forget_gradients(self._zero, self.zero_stage)

    @contextmanager
    def rehearsal(self) -> Iterator[None]:
        """Within, micro-batches are run and steps are taken that never happened afterwards. Collective.

        What they allocate stays allocated, the optimizer's moments included. Where the enclosed work fails, nothing is
        put back: the run is over.
        """
        snapshot = Snapshot(
            self._deepspeed,
            self._resharder.partitions,
            self._optimizer,
            self._dynamic_loss_scaler,
            LOSS_SCALER_FIELDS,
        )
        num_updates = self._num_updates
        yield
        self._transfer.forget()
        if self._resharder.step() == num_updates:  # not finite, or float16's scale was too large
            self._resharder.create_moments(num_updates)
        snapshot.put_back()
        self._num_updates = num_updates
        self.zero_gradients()
        round_masters_into_weights(self._zero, self.zero_stage)

    def held_bytes(self) -> dict[str, int]:
        """What this rank holds between steps, by part: weights, float32 masters, moments."""
        return held_bytes(self.module, self._resharder.partitions)

    def save(self, directory: Path, tag: str, holders: Any = None) -> TrainableState | None:
        """Collect a checkpoint through DeepSpeed's own `save_checkpoint`; writes nothing. Collective.

        Args:
            directory: of the run.
            tag: the checkpoint's name.
            holders: see `collect_trainable`.

        Returns:
            What is to be written, on the ranks that hold it; None elsewhere.
        """
        return self._checkpoint_hook.run(str(directory), tag, lambda: self.collect_trainable(holders))

    def collect_trainable(self, holders: Any = None) -> TrainableState | None:
        """Everything that a checkpoint needs, on the ranks that hold it; None elsewhere. Collective.

        Args:
            holders: a gloo group of the ranks that hold it, rank 0 first, as `dist.new_group` gives it to members and
                others; None: rank 0 alone.
        """
        parameters = self._resharder.collect(holders)
        if parameters is None:
            return None
        return TrainableState(
            step=self._resharder.step(),
            parameters=parameters,
            hyperparameters=self._resharder.hyperparameters(),
            loss_scaler=self._loss_scaler_state(),
        )

    def save_slices(self, directory: Path, tag: str) -> SlicedState:
        """As `save`, where each rank writes its own share. Collective: every rank calls this."""
        return self._checkpoint_hook.run(str(directory), tag, self._collect_slices)

    def _collect_slices(self) -> SlicedState:
        return SlicedState(
            step=self._resharder.step(),
            slices=self._resharder.own_slices(),
            shapes=self._resharder.partitions.shapes,
            weights=self.collect_weights(),
            hyperparameters=self._resharder.hyperparameters(),
            loss_scaler=self._loss_scaler_state(),
        )

    def collect_weights(self) -> dict[str, Tensor] | None:
        """All trainable parameters in the compute dtype on rank 0, None elsewhere. Collective."""
        return self._resharder.weights(self.compute_dtype)

    def restore_trainable(self, state: TrainableState | None, source: int = 0) -> None:
        """Continue from a collected state, bit for bit. Collective: every rank calls this.

        It may come from another ZeRO stage or number of ranks. Learning rates and other hyperparameters stay those
        that this engine was made with; the schedule continues at the state's step.

        Args:
            state: read on one rank only; the others may pass None.
            source: that rank.

        Raises:
            CheckpointError: on every rank: names or shapes are not this model's.
        """
        header = [None if state is None else (state.step, state.loss_scaler)]
        dist.broadcast_object_list(header, src=source, group=self._control_group)
        step, loss_scaler = header[0] or (0, {})
        self._resharder.restore(None if state is None else state.parameters, step, source)
        self._go_on(step, loss_scaler)

    def restore_slices(
        self, read: ReadElements, shapes: Mapping[str, torch.Size], step: int, loss_scaler: Mapping[str, float]
    ) -> None:
        """As `restore_trainable`, where each rank reads its own share. Collective: every rank calls this.

        Args:
            read: gives elements of a parameter.
            shapes: of all parameters that can be read; the same on every rank.
            step: updates that the optimizer had applied.
            loss_scaler: of the saved state.

        Raises:
            CheckpointError: on every rank: names or shapes are not this model's, or a rank could not read.
        """
        failure = None
        try:
            self._resharder.restore_slices(read, shapes, step)
        except CheckpointError as error:
            failure = str(error)
        failures: list[Any] = [None] * dist.get_world_size(self._control_group)
        dist.all_gather_object(failures, failure, group=self._control_group)
        if any(failures):
            raise CheckpointError(next(filter(None, failures)))
        self._go_on(step, loss_scaler)

    def _go_on(self, step: int, loss_scaler: Mapping[str, float]) -> None:
        """Follow masters and moments that were put back. Collective."""
        if self._dynamic_loss_scaler:
            for key, value in loss_scaler.items():
                setattr(self._dynamic_loss_scaler, key, value)
        self._num_updates = step
        self.zero_gradients()
        round_masters_into_weights(self._zero, self.zero_stage)

    def close(self) -> None:
        """Let go of DeepSpeed's hooks and buffers. Local: a rank that fails may call it alone."""
        self._deepspeed.destroy()
        release_zero_init()

    @property
    def num_trainable(self) -> int:
        """Trainable elements."""
        return sum(shape.numel() for shape in self._resharder.partitions.shapes.values())

    def _loss_scaler_state(self) -> dict[str, float]:
        scaler = self._dynamic_loss_scaler
        return {key: getattr(scaler, key) for key in LOSS_SCALER_FIELDS} if scaler else {}

    @property
    def _dynamic_loss_scaler(self) -> Any | None:
        """float16 only."""
        scaler = getattr(self._zero, "loss_scaler", None)
        return scaler if scaler is not None and scaler.dynamic else None

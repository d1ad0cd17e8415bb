"""What a run takes over from its checkpoint, what it leaves in one, and what it refuses to continue."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from vlm_dist import __version__
from vlm_dist.checkpoint import Checkpoint, CheckpointStore, Places, RunFacts, find_places
from vlm_dist.checkpoint.layout import checkpoint_name
from vlm_dist.config import RunConfig
from vlm_dist.config.arithmetic import BatchArithmetic, resolve_batch
from vlm_dist.config.masking import without_secrets
from vlm_dist.data.plan.contents import read_contents, write_contents
from vlm_dist.data.plan.plan import Plan
from vlm_dist.distributed.failures import agree_on_failure
from vlm_dist.distributed.group import Ranks
from vlm_dist.engine import Engine
from vlm_dist.errors import CheckpointError
from vlm_dist.observability.log import MetricLog
from vlm_dist.optim import make_lr_schedule
from vlm_dist.trainer_parts import NOTHING_OWED, Cadence, Owed


def fit_batch(config: RunConfig, ranks: Ranks, checkpoint: Checkpoint | None) -> BatchArithmetic:
    """The global batch belongs to the run: on resume the checkpoint's wins, and accumulation follows."""
    saved = checkpoint.info["global_batch_size"] if checkpoint is not None else None
    return resolve_batch(config.train, ranks.world_size, saved, allow_idle=True)


def planned_by(config: RunConfig) -> Checkpoint | None:
    """The checkpoint whose global batch and lengths a run's plan has, before the fact or after it; None: a new run's.

    Raises:
        CheckpointError: `train.resume` names one that cannot be read.
    """
    store, resume = CheckpointStore(config.train.output_dir), config.train.resume
    return store.latest() if resume is False or resume == "auto" else store.load(Path(str(resume)))


def check_output_dir(config: RunConfig, store: CheckpointStore) -> None:
    """Refuse to mix two runs in one directory.

    Raises:
        CheckpointError: says what to set.
    """
    output_dir, resume = config.train.output_dir, config.train.resume
    if resume is False and store.has_any():
        raise CheckpointError(
            f"{output_dir} has checkpoints of an earlier run, and resume is false; set train.resume=auto to "
            "continue it, or another train.output_dir"
        )
    is_path = resume is not False and resume != "auto"
    if is_path and Path(str(resume)).resolve().parent != output_dir.resolve() and store.has_any():
        raise CheckpointError(
            f"{output_dir} has checkpoints of another run than {resume}; set train.resume=auto to continue "
            "that run, or another train.output_dir to go on from there"
        )


def prepare_output_dir(config: RunConfig, store: CheckpointStore, ranks: Ranks) -> Places:
    """Refuse to mix two runs in one directory, or one that cannot be written. Collective: every rank calls this.

    Returns:
        Who writes there.
    """
    places = find_places(config.train.output_dir, ranks)
    with agree_on_failure(ranks):
        if places.is_writer:
            check_output_dir(config, store)
            store.recover()
    return places


def write_description(config: RunConfig, plan: Plan) -> None:
    """Write what the run is into its output directory.

    Raises:
        CheckpointError: it cannot be written; so could no checkpoint.
    """
    path = config.train.output_dir / "resolved_config.yaml"
    try:
        config.write(path)
    except OSError as error:
        raise CheckpointError(f"{path} could not be written: {error.strerror or error}") from error
    write_contents(config.train.output_dir, plan.contents)


def check_end(checkpoint: Checkpoint, plan: Plan) -> None:
    """Refuse a run that ends before its checkpoint: its adapter would not be what the configuration says."""
    if checkpoint.step > plan.num_steps:
        raise CheckpointError(
            f"{checkpoint.path} has done {checkpoint.step} steps, but the run has {plan.num_steps}; raise "
            "train.max_steps or train.num_train_epochs, or resume from an earlier checkpoint"
        )


def run_facts(
    config: RunConfig, batch: BatchArithmetic, engine: Engine, ranks: Ranks, num_steps: int
) -> Callable[[dict[str, Any]], RunFacts]:
    """What a checkpoint says besides tensors, given the plan's state."""
    versions = {name: version(name) for name in ("torch", "transformers", "peft", "deepspeed")}
    resolved = config.to_yaml()
    return lambda plan_state: RunFacts(
        plan=plan_state,
        global_batch_size=batch.global_batch_size,
        resolved_config=resolved,
        scheduler=_schedule_facts(config) | {"num_steps": num_steps},
        versions={"vlm-dist": __version__, **versions, "python": platform.python_version()},
        topology={"world_size": ranks.world_size, "zero_stage": engine.zero_stage},
    )


def _schedule_facts(config: RunConfig) -> dict[str, Any]:
    """What the schedule of the learning rate is made from."""
    keys = (
        "lr_scheduler_type",
        "learning_rate",
        "warmup_ratio",
        "warmup_steps",
        "num_train_epochs",
        "max_steps",
    )
    return {key: getattr(config.train, key) for key in keys}


def check_continuation(config: RunConfig, checkpoint: Checkpoint, plan: Plan) -> list[str]:
    """Compare a checkpoint with the run that is to continue it.

    Returns:
        One line for the log per difference that may be.

    Raises:
        CheckpointError: data, order, model or adapter are others, and `train.resume_anyway` does not name them; or the
            run ends before the checkpoint.
    """
    told = []
    # before the order: that of another model, or of another processor, is another one, too
    differences = check_config(config, checkpoint)
    try:
        plan.check_state(checkpoint.info["plan"], read_contents(checkpoint.path.parent))
    except CheckpointError as error:
        if "data" not in config.train.resume_anyway:
            cause = "".join(f"\n  {line}" for line in differences if ".processor_params." in line)
            told_first = f"the processor's parameters differ, on which lengths depend:{cause}\n" if cause else ""
            raise CheckpointError(
                f"{told_first}{error}; or go on all the same with train.resume_anyway=[data]: samples may be "
                "repeated or left out"
            ) from error
        told.append(
            f"train.resume_anyway has data: the run goes on at step {checkpoint.step} of another order, in which "
            f"samples may be repeated or left out. {str(error).splitlines()[0]}\n"
            + "\n".join(line for line in str(error).splitlines()[1:] if line.startswith(" "))
        )
    check_end(checkpoint, plan)
    length = _describe_length(config, checkpoint, plan)
    return [*told, *differences, *([length] if length is not None else [])]


def _describe_length(config: RunConfig, checkpoint: Checkpoint, plan: Plan) -> str | None:
    """What becomes of the learning rate where the run is longer or shorter than was planned."""
    planned = checkpoint.info["scheduler"].get("num_steps")
    if planned is None or planned == plan.num_steps:
        return None
    updates = checkpoint.info["optimizer"]["step"]
    before, now = (
        config.train.learning_rate * make_lr_schedule(config.train, length)(min(updates, length))
        for length in (planned, plan.num_steps)
    )
    return (
        f"the run has {plan.num_steps} steps now, and had {planned} when the checkpoint was written: from here on the "
        f"learning rate is that of {plan.num_steps} steps ({now:.2e}; with {planned} it would be {before:.2e}); what "
        "is done stays as it is"
    )


def is_own(config: RunConfig, checkpoint: Checkpoint | None, ranks: Ranks) -> bool:
    """Whether a checkpoint is one that an automatic resume of the run would find. Collective: every rank calls this."""
    if checkpoint is None:
        return False
    found = config.train.output_dir.resolve() / checkpoint_name(checkpoint.step)  # not one that was set aside there
    return ranks.gather_objects(checkpoint.path.resolve() == found)[checkpoint.owner]  # where the path was found


def find_owed(cadence: Cadence, start: int, log: MetricLog, ranks: Ranks, *, is_own: bool) -> Owed:
    """What a resumed run does before its first step. Collective: every rank calls this.

    Args:
        cadence: of the run.
        start: steps that are done.
        log: knows on rank 0 which evaluations are done.
        ranks: of the run.
        is_own: see above.
    """
    if start == 0:
        return NOTHING_OWED
    is_missing = not ranks.broadcast_object(log.has_eval(start))
    return Owed(save=not is_own, evaluation=cadence.due(start, cadence.eval_steps) and is_missing)


#: What makes the adapter another one: a checkpoint of other values is not continued.
FIXED = (
    "model_id",
    *(f"peft.{key}" for key in ("r", "lora_alpha", "target_modules", "bias", "use_rslora", "use_dora")),
    *(f"peft.{key}" for key in ("modules_to_save", "quantization", "towers")),
    "model.processor_params.new_special_tokens",
)
#: Those of them with which an adapter has other tensors, so that nothing could be taken over.
OTHER_WEIGHTS = (
    *(f"peft.{key}" for key in ("r", "target_modules", "bias", "use_dora", "modules_to_save", "towers")),
    "model.processor_params.new_special_tokens",
)
#: What says where and how far to run, and changes nothing of what is learned.
FREE = (
    *("deepspeed", "train.output_dir", "train.resume", "train.stop_at_step", "train.run_name", "data.index_dir"),
    *("train.resume_anyway", "peft.adapter", "train.sample_ledger"),  # where the run began, and what it tells of itself
)


def check_config(config: RunConfig, checkpoint: Checkpoint) -> list[str]:
    """Compare the run's configuration with the checkpoint's.

    Returns:
        One notice per value that differs and may.

    Raises:
        CheckpointError: the base model or the adapter is another one, and `train.resume_anyway` does not have model;
            lists all differences of them.
    """
    written = yaml.safe_load(checkpoint.resolved_config) or {}
    saved = _flat(without_secrets(written))  # a signature that was made anew is no difference
    now = _flat(yaml.safe_load(config.to_yaml()))
    entry = f"model.model_classes.{config.model_id}"
    own, revisions = f"{entry}.processor_params", ("model.loading_params.revision", f"{entry}.loading_params.revision")
    compared = saved.keys() & now.keys()  # what another version did not know has not been changed
    compared |= {
        key for key in saved.keys() | now.keys() if _is_within(key, ("model.processor_params", own, *revisions))
    }
    differing = [key for key in sorted(compared) if saved.get(key) != now.get(key)]
    lines = {key: f"{key}: {saved.get(key)!r} in the checkpoint, now {now.get(key)!r}" for key in differing}
    if (accumulation := "train.gradient_accumulation_steps") in lines:
        lines[accumulation] += "; but the samples per step belong to the run, and accumulation follows from them"
    # a revision that is named now, and was not, may be the one that was loaded
    always = (*FIXED, f"{own}.new_special_tokens", *(key for key in revisions if saved.get(key) is not None))
    fixed = [lines[key] for key in differing if _is_within(key, always)]
    if fixed and "model" in config.train.resume_anyway:
        fixed[0] = f"train.resume_anyway has model: the weights were learned with another one. {fixed[0]}"
    elif fixed:
        fits = not any(_is_within(key, OTHER_WEIGHTS) for key in differing)
        raise CheckpointError(
            f"{checkpoint.path} is of another model or adapter:\n  "
            + "\n  ".join(fixed)
            + "\nrestore the values of the checkpoint, or start a new run in another train.output_dir"
            + (
                "; or go on all the same with train.resume_anyway=[model]: the weights were learned with what the "
                "checkpoint has"
                if fits
                else ""
            )
        )
    return [*fixed, *(lines[key] for key in differing if not _is_within(key, (*FREE, *always)))]


def _is_within(key: str, prefixes: tuple[str, ...]) -> bool:
    return any(key == prefix or key.startswith(f"{prefix}.") for prefix in prefixes)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys; lists stay values."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat

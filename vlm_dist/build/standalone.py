"""One evaluation by itself: an adapter, or the bare base, on held-out samples; on whatever processes there are.

It changes nothing of the run: what it writes goes to a folder of its own in `output_dir/eval`.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from vlm_dist import __version__
from vlm_dist.build.data import make_materialisers, make_processor, open_sources
from vlm_dist.build.ending import collective_timeout, told_clearly
from vlm_dist.build.evaluation import make_evaluator
from vlm_dist.build.model import make_model
from vlm_dist.build.parts import ds_merger, make_engine, make_pool
from vlm_dist.checkpoint import open_starting_point, start_from
from vlm_dist.checkpoint.layout import (
    ADAPTER_FILES,
    FINAL_ADAPTER,
    checkpoint_name,
    list_checkpoints,
    seems_whole,
    sha256_of,
)
from vlm_dist.checkpoint.retention import marked_best
from vlm_dist.config import RunConfig
from vlm_dist.config.answer_metrics import ANSWER_METRICS
from vlm_dist.data.quarantine import Quarantine
from vlm_dist.data.types import Source
from vlm_dist.distributed.environment import resolve_topology
from vlm_dist.distributed.failures import agree_on_failure
from vlm_dist.distributed.group import Ranks, init_process_groups, shut_down
from vlm_dist.distributed.patience import long_work
from vlm_dist.distributed.signals import AskedToStop, StopRequest
from vlm_dist.engine import Engine, load_deepspeed_json, prepare_deepspeed, prepare_native_ops
from vlm_dist.errors import CheckpointError, ConfigError, DataError, ExitCode
from vlm_dist.evaluate import write_predictions
from vlm_dist.evaluate.table import format_figures
from vlm_dist.model import check_quantization, prepare_checkpoint
from vlm_dist.observability.logging_setup import configure_logging

#: In the run's directory: a folder for each evaluation by itself.
EVAL_DIR = "eval"
#: In the place of metrics: nothing is generated.
LOSS_ALONE = ("loss",)


@dataclass(frozen=True)
class EvalRequest:
    """What is to be evaluated.

    Attributes:
        adapter: its directory; None: `checkpoint` says which.
        checkpoint: `best`, `latest` or a directory; None beside no adapter: the run's own `adapter/`.
        is_base: the base model, without any adapter.
        split: of the data.
        metrics: of generated answers; `loss` alone generates none; None: those of the configuration.
        max_samples: of each source; None: all.
        output: of the predictions; None: the evaluation's own folder.
    """

    adapter: Path | None = None
    checkpoint: str | None = None
    is_base: bool = False
    split: Literal["eval", "train"] = "eval"
    metrics: tuple[str, ...] | None = None
    max_samples: int | None = None
    output: Path | None = None

    def check(self) -> None:
        """Refuse what contradicts itself.

        Raises:
            ConfigError: says what.
        """
        if (self.adapter is not None) + (self.checkpoint is not None) + self.is_base > 1:
            raise ConfigError("give one of --adapter, --checkpoint and --base")
        unknown = [name for name in self.metrics or () if name not in ("loss", *ANSWER_METRICS)]
        if unknown or self.metrics == ():
            raise ConfigError(
                f"--metrics: got {', '.join(unknown) or 'nothing'}, expected loss (alone: nothing is generated) or "
                f"some of {', '.join(ANSWER_METRICS)}, with commas between"
            )
        if self.max_samples is not None and self.max_samples < 1:
            raise ConfigError(f"--max-samples: got {self.max_samples}, expected 1 or more")

    def choose(self, run_dir: Path) -> Path | None:
        """The directory of the adapter; None for the base.

        Raises:
            CheckpointError: there is none.
        """
        if self.is_base:
            return None
        if self.adapter is not None:
            return self.adapter
        if self.checkpoint == "best":
            best = marked_best(run_dir)
            if best is None:
                raise CheckpointError(
                    f"--checkpoint best: {run_dir} has no best checkpoint; a run has one with "
                    "train.metric_for_best_model. Name a directory, or latest"
                )
            return run_dir / checkpoint_name(best.step)
        whole = [path for _, path in list_checkpoints(run_dir) if seems_whole(path)]
        if self.checkpoint == "latest":
            if not whole:
                raise CheckpointError(f"--checkpoint latest: {run_dir} has no complete checkpoint")
            return whole[0]
        if self.checkpoint is not None:
            return Path(self.checkpoint)
        if not (run_dir / FINAL_ADAPTER).is_dir():
            there = f"; there are {', '.join(path.name for path in whole)}" if whole else ""
            raise CheckpointError(
                f"{run_dir} has no {FINAL_ADAPTER}/: the run is not done. Name what to evaluate: --checkpoint latest, "
                f"--checkpoint DIR, --adapter DIR, or --base{there}"
            )
        return run_dir / FINAL_ADAPTER


def evaluate_once(config: RunConfig, request: EvalRequest, stop: StopRequest | None = None) -> ExitCode:
    """Evaluate, and write what was found. Every rank calls this.

    Args:
        config: of the run.
        request: what is to be evaluated.
        stop: listens to the signals of this process.

    Raises:
        VlmDistError: with one clear message, after all ranks have left together.
    """
    request.check()
    topology = resolve_topology(os.environ)
    prepare_deepspeed()
    configure_logging(topology.rank, topology.world_size)
    ranks = init_process_groups(topology, collective_timeout(config.train), stop)
    try:
        with agree_on_failure(ranks):
            adapter = request.choose(config.train.output_dir) if ranks.is_main else None
        config = config_of(config, request, ranks.broadcast_object(adapter))
        with told_clearly(config.train, ranks), ranks.progress.until_leaving():
            _evaluate(config, request, ranks)
            ranks.barrier()  # nobody takes the engine apart while another still needs a collective
    except AskedToStop as asked:
        if ranks.is_main:
            logging.getLogger(__name__).info("stopped by a signal (%s); nothing is written", asked)
        shut_down()
        return ExitCode.PREEMPTED
    shut_down()
    return ExitCode.DONE


def config_of(config: RunConfig, request: EvalRequest, adapter: Path | None) -> RunConfig:
    """The run's configuration, for an evaluation alone: another directory, and nothing that only training needs.

    Raises:
        ConfigError: the split has no sources.
    """
    run_dir = config.train.output_dir
    label = "base"
    if adapter is not None:
        is_own = adapter.resolve().parent == run_dir.resolve()
        label = adapter.name if is_own else f"{adapter.resolve().parent.name}-{adapter.name}"
    sources = config.data.eval if request.split == "eval" else config.data.train
    if not sources:
        raise ConfigError(
            f"data.{request.split} is empty: name held-out samples there, or evaluate on those of training with "
            "--split train"
        )
    if request.max_samples is not None:
        sources = tuple(
            one.model_copy(update={"max_samples": min(one.max_samples or request.max_samples, request.max_samples)})
            for one in sources
        )
    metrics = request.metrics or config.train.eval_metrics
    generates = tuple(metrics) != LOSS_ALONE
    train = config.train.model_copy(
        update={
            "output_dir": run_dir / EVAL_DIR / f"{label}-{request.split}",
            "predict_with_generate": generates,
            "eval_metrics": tuple(name for name in metrics if name != "loss") if generates else ("exact_match",),
            "gradient_checkpointing": False,
            "torch_compile": False,
        }
    )
    return config.model_copy(
        update={
            "train": train,
            "peft": config.peft.model_copy(update={"adapter": adapter}),
            "data": config.data.model_copy(update={"train": (), "eval": sources}),
        }
    )


def _evaluate(config: RunConfig, request: EvalRequest, ranks: Ranks) -> None:
    with ExitStack() as stack:
        with agree_on_failure(ranks):
            ds_json = load_deepspeed_json(config.deepspeed)
            check_quantization(config.peft.quantization, ds_json["zero_optimization"]["stage"])
        sources = open_sources(config, "eval", ranks)
        loading = config.model.loading_for(config.model_id)
        with long_work(ranks, f"preparing {config.model_id}", leaves_if_asked=True):
            prepare_checkpoint(config.model_id, config.model_entry, loading)
            prepare_native_ops(ds_json)
        with agree_on_failure(ranks):
            processor, family = make_processor(config)
            materialise = make_materialisers(config, [], sources, processor, family)
        begin = open_starting_point(config.peft, ranks, processor)
        merge = ds_merger(config, ds_json, ranks)
        model, num_trainable = make_model(config, merge(None)[0], processor, ranks, _quiet, writes_description=False)
        started = begin.parameter_names(model) if begin is not None else {}
        ds_config, _ = merge(num_trainable)
        engine = make_engine(config, model, ds_config, 1, ranks, _quiet)
        stack.callback(engine.close)
        if begin is not None:
            start_from(begin, engine, started, ranks)
        ranks.leave_if_asked()
        quarantine = stack.enter_context(Quarantine(config.train.output_dir, ranks.rank))
        pool = make_pool(config, materialise, engine.device.type == "cuda")
        stack.callback(pool.close)
        evaluator = make_evaluator(config, ranks, engine, sources, pool, processor, quarantine)
        assert evaluator is not None
        figures, predictions = evaluator.measure(0)
        with agree_on_failure(ranks):
            if ranks.is_main:
                folder = config.train.output_dir
                answers = request.output or folder / "predictions.jsonl"
                report = folder / "metrics.json" if request.output is None else answers.with_suffix(".metrics.json")
                _write_report(report, figures, _describe(config, request, sources, ranks, engine))
                told = [f"figures: {report}"]
                if config.train.predict_with_generate:
                    write_predictions(answers, predictions)
                    told.append(f"answers: {answers}")
                print(format_figures(figures), *told, sep="\n", flush=True)  # noqa: T201 - the command's answer


def _quiet(line: str) -> None:
    """What training tells of the model is known from there."""
    logging.getLogger(__name__).debug("%s", line)


def _describe(
    config: RunConfig, request: EvalRequest, sources: Sequence[Source], ranks: Ranks, engine: Engine
) -> dict[str, Any]:
    """What was evaluated, so that a figure can be trusted later."""
    adapter = config.peft.adapter
    files = {} if adapter is None else {name: adapter / name for name in ADAPTER_FILES if (adapter / name).is_file()}
    generation = {"max_new_tokens": config.train.generation_max_new_tokens, "metrics": list(config.train.eval_metrics)}
    return {
        "adapter": None if adapter is None else str(adapter),
        "adapter_sha256": {name: sha256_of(path) for name, path in files.items()},
        "base_model": config.model_id,
        "revision": config.model.loading_for(config.model_id).revision,
        "split": request.split,
        "max_samples": request.max_samples,
        "sources": [
            {"name": source.name, "num_samples": len(source), "manifest_hash": source.manifest_hash}
            for source in sources
        ],
        "generation": generation if config.train.predict_with_generate else None,
        "precision": config.train.precision,
        "world_size": ranks.world_size,
        "zero_stage": engine.zero_stage,
        "versions": {"vlm-dist": __version__, **{name: version(name) for name in ("torch", "transformers", "peft")}},
    }


def _write_report(path: Path, figures: Mapping[str, float], evaluated: Mapping[str, Any]) -> None:
    known = {name: value if value == value else None for name, value in figures.items()}  # JSON has no NaN
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"figures": known, "evaluated": evaluated}, indent=2, ensure_ascii=False)
        temporary.write_text(text + "\n", encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error}") from error

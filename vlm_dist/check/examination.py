"""All stages of an examination, in the order in which data flows; one that fails does not hide what others find."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from vlm_dist.check.batch import check_batch
from vlm_dist.check.data import check_data
from vlm_dist.check.model import check_model
from vlm_dist.check.parts import NotThereError, OfStageError, Parts, heard_warnings, must_be_positive
from vlm_dist.check.processor import check_processor
from vlm_dist.check.step import check_step
from vlm_dist.check.surroundings import check_packages
from vlm_dist.config import Drafted, draft_run
from vlm_dist.errors import ExitCode, VlmDistError
from vlm_dist.observability.findings import Finding, Level, exit_code, format_table

#: In the order in which they are run; `--stage` takes these names.
STAGES: dict[str, Callable[[Parts], Iterator[Finding]]] = {
    "data": check_data,
    "processor": check_processor,
    "batch": check_batch,
    "model": check_model,
    "step": check_step,
}
#: What is looked at without `--stage`: a step needs the weights, and the time to load them.
DEFAULT_STAGES = ("data", "processor", "batch", "model")


@dataclass(frozen=True)
class Examination:
    """What was found, stage by stage.

    Attributes:
        run: file of the run.
        found: stage -> findings; "config" comes first.
    """

    run: Path
    found: dict[str, list[Finding]]

    @property
    def findings(self) -> list[Finding]:
        """All, in the order of the stages."""
        return [finding for findings in self.found.values() for finding in findings]

    @property
    def exit_code(self) -> ExitCode:
        """0 without problems; else that of the first stage that has one."""
        return exit_code(self.findings)

    def __str__(self) -> str:
        parts = [format_table(self.findings, f"vlm-dist check {self.run}")]
        parts += [f"{finding.what}:\n{_indented(finding.details)}" for finding in self.findings if finding.details]
        return "\n\n".join(parts)

    def to_json(self) -> str:
        """One object: the stages with their findings, and the exit code."""
        stages = {name: [finding.as_record() for finding in findings] for name, findings in self.found.items()}
        return json.dumps({"run": str(self.run), "exit_code": int(self.exit_code), "stages": stages}, indent=2)


def examine(
    run: Path, overrides: Sequence[str] = (), stages: Sequence[str] = DEFAULT_STAGES, world_size: int = 1
) -> Examination:
    """Examine a run.

    Args:
        run: file of the run.
        overrides: as given to `--set`.
        stages: of `STAGES`; the configuration and the packages are always looked at.
        world_size: ranks of the run.

    Raises:
        ConfigError: there cannot be so many ranks.
    """
    must_be_positive(world_size)
    drafted = draft_run(run, overrides)
    found = {"config": [*_about_config(drafted, run), *check_packages()]}
    parts = Parts(drafted, world_size)
    for name in (name for name in STAGES if name in stages):
        found.setdefault(name, [])
        with heard_warnings() as heard:
            _run_stage(name, parts, found)
        found[name] += [Finding(Level.WARNING, name, line) for line in heard]
    return Examination(run, {name: list(dict.fromkeys(findings)) for name, findings in found.items()})


def _run_stage(name: str, parts: Parts, found: dict[str, list[Finding]]) -> None:
    """Run a stage to its end, or to where it cannot go on."""
    try:
        for finding in STAGES[name](parts):
            found[name].append(finding)
    except NotThereError as missing:
        whole = "the configuration" if missing.stage == "config" else f"stage {missing.stage}"
        found[name].append(
            Finding(Level.WARNING, name, f"not looked at{' any further' if found[name] else ''}: {whole} has a problem")
        )
    except OfStageError as error:
        _tell(found, error.stage, name, error.error)
    except VlmDistError as error:
        _tell(found, name, name, error)


def _tell(found: dict[str, list[Finding]], stage: str, met_by: str, error: VlmDistError) -> None:
    """Tell an error, once: where another stage has told it already, this one only says that it ends."""
    told_by = next((name for name, findings in found.items() if _has_told(findings, str(error))), None)
    if told_by is None:
        found.setdefault(stage, []).append(Finding(Level.PROBLEM, stage, str(error), exit_code=error.exit_code))
    elif met_by == stage:
        whole = "the configuration" if told_by == "config" else f"stage {told_by}"
        found[met_by].append(Finding(Level.WARNING, met_by, f"not looked at any further: {whole} has a problem"))
    if met_by != stage:
        found[met_by].append(Finding(Level.WARNING, met_by, f"not looked at any further: stage {stage} has a problem"))


def _has_told(findings: Sequence[Finding], text: str) -> bool:
    """Whether problems say all this already, as a whole or line by line."""
    told = "\n".join(finding.found for finding in findings if finding.level is Level.PROBLEM)
    return bool(told) and all(line in told for line in text.splitlines())


def _about_config(drafted: Drafted, run: Path) -> Iterator[Finding]:
    for problem in drafted.problems:
        yield Finding(Level.PROBLEM, "config", problem, exit_code=ExitCode.CONFIG)
    config = drafted.config
    if config is None:
        return
    for notice in config.notices:
        yield Finding(Level.NOTICE, "config", notice)
    if not drafted.problems:
        yield Finding(Level.OK, "config", f"{run}: all values and what binds them")


def _indented(text: str) -> str:
    return "\n".join(f"  {line}".rstrip() for line in text.splitlines())

"""Runs faults one after the other, restarts what they end, and holds the result against the undisturbed run."""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tests.chaos import faults as table
from tests.chaos import networks
from tests.chaos.claims import Reference, steps_lost, violations
from tests.chaos.faults import BAD_SAMPLE, NUM_STEPS, SAVE_STEPS, Fault, remove
from tests.chaos.runs import Ended, Layout, start, wait
from tests.tiny_run import TinyRun, make_tiny_run

#: Samples of a step; it belongs to the run, whatever the number of ranks.
GLOBAL_BATCH_SIZE = 8
MAX_STARTS = 4

SETTINGS = (
    "train.sample_ledger=true",
    f"train.max_steps={NUM_STEPS}",
    f"train.save_steps={SAVE_STEPS}",
    "train.eval_steps=4",
    "train.adam_epsilon=1e-6",
    "peft.lora_dropout=0.05",
)


@dataclass(frozen=True)
class Row:
    """What became of one fault."""

    fault: Fault
    problems: tuple[str, ...]
    num_starts: int
    lost: int
    seconds_to_detect: float | None
    seconds: float

    @property
    def survived(self) -> bool:
        return not self.problems

    @property
    def how(self) -> str:
        if self.problems:
            return "; ".join(self.problems)
        return "went on" if self.num_starts == 1 else f"resumed ({self.num_starts} starts)"

    @property
    def line(self) -> dict[str, Any]:
        detected = None if self.seconds_to_detect is None else round(self.seconds_to_detect, 2)
        return {
            "name": f"chaos/{self.fault.name}", "value": int(self.survived), "unit": "survived", "aim": ">= 1",
            "fault": self.fault.what, "layout": str(self.fault.layout), "how": self.how, "steps_lost": self.lost,
            "seconds_to_detect": detected, "seconds": round(self.seconds, 1),
        }  # fmt: skip


class Campaign:
    """A working directory with the tiny model, its undisturbed runs by layout, and what it takes to disturb one."""

    def __init__(self, directory: Path) -> None:
        self.run = make_tiny_run(directory / "clean", num_images=30, num_clips=6)
        self._references: dict[tuple[str, Layout], Reference] = {}

    @cached_property
    def corrupt(self) -> TinyRun:
        """The same with one picture whose bytes are damaged in its shard."""
        directory = self.run.directory.parent / "corrupt"
        for name in ("model", "configs", "ds_configs", "data"):
            shutil.copytree(self.run.directory / name, directory / name)
        shard = damage_picture(directory / "data" / BAD_SAMPLE["source"], BAD_SAMPLE["key"])
        # else the start notices that the shard is not what its index says
        command = [sys.executable, "-m", "vlm_dist.cli", "shards", "index", "--force", str(shard)]
        subprocess.run(command, check=True, capture_output=True, env=self.run.environment())
        return TinyRun(directory)

    def overrides(self, layout: Layout, name: str) -> list[str]:
        """Of every start with this layout."""
        accumulation = max(1, GLOBAL_BATCH_SIZE // (2 * layout.ranks))
        batch = [f"train.gradient_accumulation_steps={accumulation}"]
        return [*SETTINGS, *batch, f"train.output_dir={name}"]

    def reference(self, which: str, layout: Layout) -> Reference:
        """The undisturbed run, made when it is first asked for."""
        plain = Layout(layout.ranks, layout.zero)  # started by a command, it is the same run
        key = (which, plain)
        if key not in self._references:
            run = self.corrupt if which == "corrupt" else self.run
            name = f"reference-{which}-{plain.ranks}-{plain.zero}"
            left_out = [{"point": "decode", "do": "skip", "always": True, **BAD_SAMPLE}]
            started = start(run, name, plain, self.overrides(plain, name), left_out if which == "left_out" else ())
            ended = wait(started, 300)
            if not ended.is_complete:
                raise RuntimeError(f"the undisturbed run {name} ended with {ended.codes}:\n{ended.output[-4000:]}")
            self._references[key] = Reference(run.directory / name, NUM_STEPS)
        return self._references[key]

    def file_events(self) -> list[dict[str, Any]]:
        """What rank 0 does to files in the save of step 6, as one undisturbed run shows it."""
        name, log = "counted", self.run.directory / "counted.jsonl"
        action = self._file_action(name) | {"do": "log", "log": str(log)}
        ended = wait(start(self.run, name, table.ONE, self.overrides(table.ONE, name), [action]), 300)
        if not ended.is_complete:
            raise RuntimeError(f"the counted run ended with {ended.codes}:\n{ended.output[-4000:]}")
        return [json.loads(line) for line in log.read_text().splitlines()]

    def _file_action(self, name: str) -> dict[str, Any]:
        return {
            "point": "file", "do": "kill", "rank": 0, "output_dir": str(self.run.directory / name), "output_name": name,
            "armed_by": "checkpoint-6", "ended_by": "checkpoint-9",
        }  # fmt: skip

    def kills_in_save(self, rng: random.Random, most: int | None = None) -> list[Fault]:
        """SIGKILL of rank 0 before each thing that a save does to files, and in the midst of each write."""
        events = self.file_events()
        cases = [(event, False) for event in events] + [(event, True) for event in events if event["can_half"]]
        if most is not None:
            cases = [cases[index] for index in sorted(rng.sample(range(len(cases)), min(most, len(cases))))]
        found = []
        for number, (event, half) in enumerate(cases):
            paths = re.sub(r"\S*/", "", event["paths"]) or event["paths"]
            fault = Fault(
                "kill in a save", f"SIGKILL {'in' if half else 'before'} {event['kind']} {paths}",
                table.ONE if number % 4 else table.TWO,
                [{"point": "file", "number": event["number"], "half": half}],
                codes=frozenset({-table.KILL}) | table.LOST_PEER, max_lost=table.LOST_WITH_A_SAVE,
            )  # fmt: skip
            fault.name = f"kill-in-a-save-{number}"
            found.append(fault)
        return found

    def try_fault(self, fault: Fault) -> Row:
        """Let it happen, restart until the run is complete, and check every claim."""
        began = time.monotonic()
        run = self.corrupt if fault.reference == "corrupt" else self.run
        directory = run.directory / fault.name
        marker = run.directory / f"{fault.name}.marker"
        problems: list[str] = []
        try:
            reference = self.reference(fault.reference, fault.layout)
            if fault.before is not None:
                fault.before(directory)
            with networks.two_networks() if fault.has_networks else nullcontext():
                ends = self._restart(fault, run, directory, marker, problems)
            if ends[-1].is_complete:
                same = fault.resume_layout is None
                problems += violations(directory, reference, same_layout=same)
            lost = steps_lost(directory) if (directory / "ledger").is_dir() else 0
        except Exception as error:  # noqa: BLE001 - a fault whose check breaks is not survived, and the next one follows
            problems.append(f"{type(error).__name__}: {str(error)[-500:]}")
            ends, lost = [], 0
        if lost > fault.max_lost:
            problems.append(f"{lost} steps were lost, at most {fault.max_lost} may be")
        detected = self._seconds_to_detect(marker, ends[0] if ends else None, fault)
        if detected is not None and detected > fault.seconds_to_detect:
            problems.append(f"it took {detected:.0f} s until all processes were gone")
        if not problems:
            remove(directory)
        return Row(fault, tuple(problems), len(ends), lost, detected, time.monotonic() - began)

    def _restart(self, fault: Fault, run: TinyRun, directory: Path, marker: Path, problems: list[str]) -> list[Ended]:
        ends: list[Ended] = []
        while len(ends) < MAX_STARTS and not (ends and ends[-1].is_complete):
            layout = fault.layout if not ends or fault.resume_layout is None else fault.resume_layout
            name = f"{fault.name}.{len(ends) + 1}"
            overrides = [*self.overrides(layout, directory.name), *fault.overrides, "train.resume=auto"]
            actions = [self._complete(action, directory, marker) for action in fault.actions] if not ends else []
            in_child = networks.enter if fault.has_networks and not ends else None
            started = start(run, name, layout, overrides, [*actions, *fault.always], in_child)
            drive = None
            if fault.drive is not None and not ends:
                drive = lambda one: fault.drive(one, directory, lambda: _note(marker))  # type: ignore[misc]  # noqa: E731
            ended = wait(started, fault.timeout_seconds if not ends else 300, drive, fault.supervisor_seconds)
            ends.append(ended)
            problems += self._about_start(fault, ended, len(ends), marker)
            if len(ends) == 1 and fault.must_end and (directory / "adapter").exists():
                problems.append("the first start went on to the last step")
            if len(ends) == 1 and fault.between is not None:
                fault.between(directory)
        if not ends[-1].is_complete:
            problems.append(f"not complete after {len(ends)} starts, exit codes {ends[-1].codes}")
        return ends

    def _about_start(self, fault: Fault, ended: Ended, number: int, marker: Path) -> list[str]:
        problems = []
        if ended.was_ended_by_hand:
            problems.append(f"start {number} did not end by itself")
        if ended.orphans:
            problems.append(f"start {number} left processes: {'; '.join(ended.orphans)}")
        if number > 1:
            if number == 2 and fault.resume_says and not re.search(fault.resume_says, ended.output):
                problems.append(f"the second start does not say {fault.resume_says!r}")
            return problems
        if (fault.actions or fault.drive) and not marker.is_file():
            problems.append("the fault did not happen")
        if fault.codes is None and not ended.is_complete:
            problems.append(f"the first start was to go on, but ended with {ended.codes}")
        if fault.codes is not None:
            wrong = [code for code in ended.codes if code not in fault.codes]
            if wrong:
                problems.append(f"exit codes {ended.codes}, expected {sorted(fault.codes)}")
        if fault.says and not re.search(fault.says, _joined(ended.output)):
            problems.append(f"the first start does not say {fault.says!r}")
        return problems

    def _complete(self, action: Mapping[str, Any], directory: Path, marker: Path) -> dict[str, Any]:
        """Fill in what only the campaign knows."""
        if action["point"] == "file":
            action = self._file_action(directory.name) | action
        elif "command" in action:
            action = {**action, "command": action["command"].format(output_dir=directory)}
        return {"marker": str(marker), **action}

    @staticmethod
    def _seconds_to_detect(marker: Path, ended: Ended | None, fault: Fault) -> float | None:
        if ended is None or fault.codes is None or not marker.is_file():
            return None
        return ended.ended_at - json.loads(marker.read_text())["at"]


def _note(marker: Path) -> None:
    marker.write_text(json.dumps({"at": time.monotonic()}))


def _joined(output: str) -> str:
    """Output with its line breaks undone, which the console puts where a line is full."""
    return " ".join(output.split())


def damage_picture(shards: Path, key: str) -> Path:
    """Overwrite the picture of a sample; sizes and headers of its shard, which is given back, stay as they are."""
    import tarfile

    for path in sorted(shards.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name == f"{key}.png":
                    with path.open("r+b") as file:
                        file.seek(member.offset_data + 30)
                        file.write(b"\x5a" * (member.size - 30))
                    return path
    raise LookupError(key)


def run_all(campaign: Campaign, faults: Sequence[Fault], report: Any) -> list[Row]:
    """Try faults one after the other and print each row."""
    rows = []
    for fault in faults:
        row = campaign.try_fault(fault)
        rows.append(row)
        report(row)
    return rows

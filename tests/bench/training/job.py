"""What a trainer is asked to do, and the lines that it writes: the seam between the bench and the trainers.

Imported in the environments of all peers: names nothing but the standard library.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

#: Of the language model's layers alone; the tower stays frozen.
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TARGET_PATTERN = rf".*language_model.*\.({'|'.join(TARGETS)})"


@dataclass(frozen=True)
class Job:
    """One run.

    Attributes:
        trainer: script in `tests.bench.training.trainers`.
        settings: "default", or the name of what its documents offer for mixed lengths.
        data: folder of the samples.
        model: folder of the model.
        output: folder that the run may fill.
        num_steps: optimizer steps.
        per_device: samples of a micro-batch.
        accumulation: micro-batches of a rank in a step.
        max_length: tokens of the longest sample that is taken.
        zero: stage.
        workers: processes of the loader.
        save_at: step after which a checkpoint is written; 0: none.
        pretended: what the checkpoint is to say instead, for a run that others resume; 0: what it is.
        resumed_at: step of the checkpoint in the output folder that the run goes on from; 0: it starts anew.
        rank: LoRA's.
        alpha: LoRA's.
        learning_rate: constant.
        seed: of the run.
    """

    trainer: str
    settings: str
    data: str
    model: str
    output: str
    num_steps: int
    per_device: int = 8
    accumulation: int = 1
    max_length: int = 4096
    zero: int = 2
    workers: int = 0
    save_at: int = 0
    pretended: int = 0
    resumed_at: int = 0
    rank: int = 16
    alpha: int = 32
    learning_rate: float = 1e-4
    seed: int = 7

    @classmethod
    def read(cls, path: str | None = None) -> Job:
        """From the file that the command line names."""
        return cls(**json.loads(Path(path or sys.argv[1]).read_text(encoding="utf-8")))

    def write(self, path: Path) -> None:
        """For `read`."""
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @property
    def deepspeed(self) -> dict[str, Any]:
        """The same ZeRO for every trainer."""
        return {
            "zero_optimization": {"stage": self.zero},
            "train_micro_batch_size_per_gpu": self.per_device,
            "gradient_accumulation_steps": self.accumulation,
            "gradient_clipping": 1.0,
            "zero_allow_untested_optimizer": True,
        }

    def rows(self) -> Iterator[dict[str, Any]]:
        """The samples: `image` (a path, or None), `question`, `answer`, `tokens` (as the trainers see them)."""
        with (Path(self.data) / "rows.jsonl").open(encoding="utf-8") as lines:
            for line in lines:
                row = json.loads(line)
                yield row | {"image": row["image"] and str(Path(self.data) / row["image"])}

    def samples_file(self, as_wanted: Callable[[dict[str, Any]], dict[str, Any]]) -> Path:
        """JSON lines in the form that a trainer wants, written once: by the first rank that comes, of the first run."""
        path = Path(self.output) / "samples.jsonl"
        if not path.exists():
            mine = path.with_name(f"samples-{os.getpid()}.jsonl")
            with mine.open("w", encoding="utf-8") as lines:
                lines.writelines(json.dumps(as_wanted(row)) + "\n" for row in self.rows())
            with suppress(FileExistsError):
                os.link(mine, path)  # datasets know a file by its time: it must not be replaced
            mine.unlink()
        return path

    def pack_tokens(self) -> int:
        """Of a pack that holds as many tokens as `per_device` samples do, and every sample; a multiple of 8."""
        lengths = [row["tokens"] for row in self.rows()]
        return -(-max(*lengths, round(self.per_device * sum(lengths) / len(lengths))) // 8) * 8

    def checkpoint(self) -> str | None:
        """Where the run of a peer goes on from; None: nowhere."""
        if not self.resumed_at:
            return None
        return str(next((Path(self.output) / "run").rglob(f"checkpoint-{self.resumed_at}")))


class Clock:
    """Writes what happens in this rank, with the time.

    Args:
        job: whose folder takes the lines.
    """

    def __init__(self, job: Job) -> None:
        self.rank = int(os.environ.get("RANK", "0"))
        Path(job.output).mkdir(parents=True, exist_ok=True)
        self._file = (Path(job.output) / f"clock-{self.rank}.jsonl").open("a", buffering=1)
        self._tokens = 0
        self._loss: Any = None

    def write(self, event: str, **facts: Any) -> None:
        """A line."""
        self._file.write(json.dumps({"event": event, "time": time.time(), **facts}) + "\n")

    def count(self, tokens: int) -> None:
        """Real tokens of a micro-batch of this rank."""
        self._tokens += tokens

    def step(self, step: int, **facts: Any) -> None:
        """A step of the optimizer is done."""
        self.write("step", step=step, tokens=self._tokens, **facts)
        self._tokens = 0

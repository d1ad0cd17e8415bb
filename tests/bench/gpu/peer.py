"""TRL's SFTTrainer, or the Hugging Face Trainer, on the same samples: `python -m tests.bench.gpu.peer trl TASK.json`.

Both train the same LoRA on the same targets, with the loss on the answers alone. They pad: neither packs samples with
pictures. Of gradient checkpointing and rows per micro-batch the fastest that fits is taken, found by trying.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import importlib.util
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.bench.gpu.ours import LORA, WARM_UP_STEPS

TARGETS = r".*language_model\.layers\.\d+\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj"
PEERS = ("trl", "trainer")


@dataclass(frozen=True)
class Task:
    """What a peer does.

    Attributes:
        model: directory.
        model_class: of transformers.
        samples: directory of `write_rows`.
        output: where the peer keeps what it writes, and `result.json`.
        samples_per_step: of one rank.
        rows: of a micro-batch, the most to try first.
        num_steps: timed ones.
        seconds: after which no further way is tried.
        is_cpu: a rehearsal.
        num_workers: of the loader.
    """

    model: str
    model_class: str
    samples: str
    output: str
    samples_per_step: int
    rows: int
    num_steps: int
    seconds: float
    is_cpu: bool
    num_workers: int

    def write(self, path: Path) -> Path:
        """For the other process."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self)))
        return path


class Stopwatch:
    """Counts real tokens and the seconds of steps; waits for the device only where the timing begins and ends."""

    def __init__(self, num_steps: int, device: torch.device) -> None:
        self.num_steps, self.device = num_steps, device
        self.num_seen = 0
        self.tokens: list[Tensor] = []
        self.started = self.ended = 0.0

    def count(self, mask: Tensor) -> None:
        """A micro-batch's tokens, in the steps that are timed."""
        if WARM_UP_STEPS <= self.num_seen < WARM_UP_STEPS + self.num_steps:
            self.tokens.append(mask.sum())

    def step_done(self) -> None:
        self.num_seen += 1
        if self.num_seen in (WARM_UP_STEPS, WARM_UP_STEPS + self.num_steps):
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            now = time.perf_counter()
            if self.num_seen == WARM_UP_STEPS:
                self.started = now
            self.ended = now

    @property
    def tokens_per_second(self) -> float:
        return sum(int(count) for count in self.tokens) / (self.ended - self.started)


def watch(trainer_class: type, stopwatch: Stopwatch) -> type:
    """The class, with a stopwatch in it."""

    class Watched(trainer_class):  # type: ignore[misc,valid-type]
        def training_step(self, model: Any, inputs: dict[str, Any], *args: Any) -> Tensor:
            stopwatch.count(inputs["attention_mask"])
            return super().training_step(model, inputs, *args)  # type: ignore[no-any-return]

    return Watched


@dataclass(frozen=True)
class Way:
    """One way to run a peer.

    Attributes:
        checkpointing: of gradients.
        rows: of a micro-batch.
        liger: with Liger's kernels.
    """

    checkpointing: bool
    rows: int
    liger: bool


def ways(rows: int, *, liger: bool) -> list[Way]:
    """The fastest that can be hoped for first.

    Args:
        rows: of a micro-batch, the most.
        liger: its kernels can be used; the last ways are without them.
    """
    sizes = dict.fromkeys([(False, rows), *((True, max(1, rows // part)) for part in (1, 2, 4, rows))])
    return [Way(*size, kernels) for kernels in ((True, False) if liger else (False,)) for size in sizes]


def has_liger(task: Task) -> bool:
    """Whether Liger's kernels are installed, and know this transformers' classes of the model."""
    try:
        for name in ("qwen2_vl", "qwen2_5_vl"):
            importlib.import_module(f"liger_kernel.transformers.model.{name}")
    except (ImportError, AttributeError):
        return False
    return not task.is_cpu


def arguments(task: Task, way: Way) -> dict[str, Any]:
    """Of TrainingArguments, and of SFTConfig, which is one: each the faster choice where there is one."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    return {
        "output_dir": task.output,
        "per_device_train_batch_size": way.rows,
        "gradient_accumulation_steps": max(1, round(task.samples_per_step / way.rows)),
        "max_steps": WARM_UP_STEPS + task.num_steps,
        "learning_rate": 1e-5,
        "bf16": True,
        "use_cpu": task.is_cpu,
        "gradient_checkpointing": way.checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "use_liger_kernel": way.liger,
        "optim": "adamw_torch" if task.is_cpu else "adamw_torch_fused",
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "dataloader_num_workers": task.num_workers,
        "dataloader_pin_memory": not task.is_cpu,
        "train_sampling_strategy": "group_by_length",
        "length_column_name": "length",
        "remove_unused_columns": False,
        "ddp_find_unused_parameters": world > 1 or None,  # the frozen tower has no gradient in a batch of texts
        "seed": 0,
    }


def make_rows(task: Task, processor: Any) -> list[dict[str, Any]]:
    """Prompt, completion, pictures, and a length to group by: the text's tokens and 28 x 28 pixels a visual token."""
    from PIL import Image

    folder = Path(task.samples)
    rows = []
    for line in (folder / "samples.jsonl").read_text().splitlines():
        sample = json.loads(line)
        images, visual = [], 0
        if sample["image"] is not None:
            path = str(folder / sample["image"])
            with Image.open(path) as picture:
                visual = picture.width * picture.height // 784
            images = [path]
        text = processor.tokenizer(sample["question"] + " " + sample["answer"])["input_ids"]
        rows.append({
            "prompt": [{"role": "user", "content": sample["question"]}],
            "completion": [{"role": "assistant", "content": sample["answer"]}],
            "images": images,
            "length": len(text) + visual,
        })  # fmt: skip
    return rows * max(1, -(-task.samples_per_step * (WARM_UP_STEPS + task.num_steps) // len(rows)))


def make_dataset(rows: list[dict[str, Any]]) -> Any:
    """As TRL wants it: pictures that are decoded when they are read."""
    import datasets

    message = [{"role": datasets.Value("string"), "content": datasets.Value("string")}]
    features = datasets.Features(
        {
            "prompt": message,
            "completion": message,
            "images": datasets.List(datasets.Image()),
            "length": datasets.Value("int64"),
        }
    )
    return datasets.Dataset.from_list(rows, features=features)


class Collate:
    """The batch of the Hugging Face Trainer, as its guides write it: chat template, processor, labels.

    Args:
        processor: of the model.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        tokenizer = self.processor.tokenizer
        texts, images = [], []
        for row in rows:
            content = [{"type": "image"} for _ in row["images"]]
            content.append({"type": "text", "text": row["prompt"][0]["content"]})
            messages = [{"role": "user", "content": content}, row["completion"][0]]
            texts.append(self.processor.apply_chat_template(messages, tokenize=False))
            images += row["images"]
        settings = {"padding": True, "padding_side": "right", "return_tensors": "pt"}
        batch = dict(self.processor(text=texts, images=images or None, **settings))
        labels = torch.full_like(batch["input_ids"], -100)
        for index, row in enumerate(rows):
            answer = len(tokenizer(row["completion"][0]["content"] + "<|im_end|>\n")["input_ids"])
            end = int(batch["attention_mask"][index].sum())
            labels[index, end - answer : end] = batch["input_ids"][index, end - answer : end]
        return batch | {"labels": labels}


def make_trainer(
    peer: str, task: Task, model: Any, processor: Any, dataset: Any, way: Way, stopwatch: Stopwatch
) -> Any:
    """The peer's trainer, ready."""
    from peft import LoraConfig, get_peft_model
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Tick(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            stopwatch.step_done()

    lora = LoraConfig(
        r=LORA["r"], lora_alpha=LORA["lora_alpha"], lora_dropout=LORA["lora_dropout"], target_modules=TARGETS,
        task_type="CAUSAL_LM",
    )  # fmt: skip
    given = arguments(task, way)
    if peer == "trl":
        from trl import SFTConfig, SFTTrainer

        settings = SFTConfig(**given, max_length=None, completion_only_loss=True)
        return watch(SFTTrainer, stopwatch)(
            model=model, args=settings, train_dataset=dataset, processing_class=processor, peft_config=lora,
            callbacks=[Tick()],
        )  # fmt: skip
    adapted = get_peft_model(model, lora, autocast_adapter_dtype=False)
    if way.checkpointing:
        adapted.enable_input_require_grads()
    return watch(Trainer, stopwatch)(
        model=adapted, args=TrainingArguments(**given), train_dataset=dataset, data_collator=Collate(processor),
        callbacks=[Tick()],
    )  # fmt: skip


def load(task: Task) -> Any:
    """The model as a peer loads it: bfloat16, on the device."""
    import transformers

    flash = not task.is_cpu and importlib.util.find_spec("flash_attn") is not None
    return getattr(transformers, task.model_class).from_pretrained(
        task.model,
        dtype=torch.bfloat16,
        attn_implementation="flash_attention_2" if flash else "sdpa",
        device_map=None if task.is_cpu else {"": int(os.environ.get("LOCAL_RANK", "0"))},
    )


def run(peer: str, task: Task) -> dict[str, Any]:
    """Try one way after the other, and measure the first that fits."""
    from transformers import AutoProcessor

    started = time.monotonic()
    processor = AutoProcessor.from_pretrained(task.model)
    dataset = make_dataset(make_rows(task, processor))
    device = torch.device("cpu" if task.is_cpu else "cuda")
    refused: list[dict[str, Any]] = []
    broken = False  # Liger's kernels have failed for another reason than memory
    for way in ways(task.rows, liger=has_liger(task)):
        if way.liger and broken:
            continue
        if refused and time.monotonic() - started > task.seconds:
            break
        stopwatch = Stopwatch(task.num_steps, device)
        if not task.is_cpu:
            torch.cuda.reset_peak_memory_stats()
        model = load(task)
        try:
            trainer = make_trainer(peer, task, model, processor, dataset, way, stopwatch)
            trainer.train()
        except Exception as error:
            if not (isinstance(error, torch.OutOfMemoryError) or way.liger):
                raise
            broken = broken or not isinstance(error, torch.OutOfMemoryError)
            refused.append(asdict(way) | {"error": f"{type(error).__name__}: {str(error)[:200]}"})
            model = trainer = None
        else:
            peak = 0 if task.is_cpu else torch.cuda.max_memory_reserved()
            step = (stopwatch.ended - stopwatch.started) / task.num_steps
            return {
                "tokens_per_second": stopwatch.tokens_per_second,
                "step_seconds": step,
                "peak_bytes": peak,
                **asdict(way),
                "attention": str(getattr(model.config, "_attn_implementation", None)),
                "refused": refused,
            }
        finally:
            gc.collect()
            if not task.is_cpu:
                torch.cuda.empty_cache()
    return {"refused": refused}


def main() -> None:
    """Run a peer; rank 0 writes `result.json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("task", type=Path)
    options = parser.parse_args()
    task = Task(**json.loads(options.task.read_text()))
    found = run(options.peer, task)
    if os.environ.get("RANK", "0") == "0":
        (Path(task.output) / "result.json").write_text(json.dumps(found))
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()

"""What makes each message of the guide's troubleshooting appear."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.e2e.bad_cases import CASES, changed
from tests.e2e.preloaded import Preloaded
from tests.tiny_run import Finished, TinyRun
from vlm_dist.config import VlmCollatorConfig, load_run
from vlm_dist.errors import VlmDistError


@dataclass(frozen=True)
class Workshop:
    """What a fault is made with."""

    run: TinyRun
    process: Preloaded
    patch: pytest.MonkeyPatch
    log: pytest.LogCaptureFixture

    def train(self, *overrides: str, environment: dict[str, str] | None = None) -> Finished:
        return self.process.run("vlm_dist.train", changed(*overrides), self.run.directory, environment or {})


def _command(name: str) -> Callable[[Workshop], str]:
    """A command that another test has already, and which must fail."""
    case = next(case for case in CASES if case.name == name)

    def fail(shop: Workshop) -> str:
        ended = shop.process.run("vlm_dist.train", case.arguments, shop.run.directory, case.environment)
        assert ended.exit_code == case.code, ended.output
        return ended.output

    return fail


def _training(*overrides: str, exit_code: int) -> Callable[[Workshop], str]:
    def fail(shop: Workshop) -> str:
        ended = shop.train(*overrides)
        assert ended.exit_code == exit_code, ended.output
        return ended.output

    return fail


def _gated(shop: Workshop) -> str:
    import httpx
    import huggingface_hub

    from vlm_dist.model.loading_errors import check_present

    model = "google/paligemma-3b-pt-448"

    def answer(*args: object, **kwargs: object) -> None:
        response = httpx.Response(403, request=httpx.Request("GET", f"https://huggingface.co/{model}"))
        raise huggingface_hub.errors.GatedRepoError("says the hub", response=response)

    shop.patch.setattr(huggingface_hub, "hf_hub_download", answer)
    with pytest.raises(VlmDistError) as caught:
        check_present(model, None, weights=True, processor=True)
    return str(caught.value)


def _remote_code(shop: Workshop) -> str:
    directory = shop.run.directory / "remote"
    shutil.copytree(shop.run.directory / "model", directory)
    config = json.loads((directory / "config.json").read_text())
    config["auto_map"] = {"AutoModelForImageTextToText": "modeling.MyModel"}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "modeling.py").write_text("raise RuntimeError('this code must not run')\n")
    entry = "model.model_classes.remote={model_class: MyModel, processor_class: Qwen2VLProcessor}"
    ended = shop.train("model_id=remote", entry, "train.output_dir=remote-run")
    assert ended.exit_code == 4
    return ended.output


def _kinds(family: str) -> Callable[[Workshop], str]:
    def choose(shop: Workshop) -> str:
        from vlm_dist.data.encoding.preconditions import choose_kinds
        from vlm_dist.families.table import FAMILIES

        row = next(row for row in FAMILIES if row.name == family)
        switches = {"data_processing": {"image_data": True, "video_data": True}}
        with shop.log.at_level(logging.WARNING):
            try:
                choose_kinds(VlmCollatorConfig.model_validate(switches), row)
            except VlmDistError as error:
                return str(error)
        return shop.log.text

    return choose


def _bad_video(shop: Workshop) -> str:
    (shop.run.directory / "bad.mp4").write_bytes(b"\0\0\0\x18ftypmp42" + b"\0" * 500)
    rows = [{"video": "bad.mp4", "question": "q", "answer": "a"}] * 8
    (shop.run.directory / "videos.jsonl").write_text("\n".join(map(json.dumps, rows)))
    ended = shop.train(
        "data.train=[{type: jsonl, path: videos.jsonl}]",
        "data.eval=[]",
        "collator.data_processing.image_data=false",
        "train.output_dir=videos-run",
        "train.max_steps=1",
    )
    assert ended.exit_code == 3
    return ended.output


def _out_of_memory(shop: Workshop) -> str:
    from vlm_dist.build.memory_check import MemoryGuard

    sizes = ["train.per_device_train_batch_size=8", "train.gradient_accumulation_steps=2"]
    shop.patch.chdir(shop.run.directory)
    guard = MemoryGuard(load_run(shop.run.config, sizes), 2, False, dict, torch.device("cpu"))
    with pytest.raises(VlmDistError) as caught, guard.explaining("step 7, forward"):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 4.64 GiB.\nGPU 0 has …")
    return str(caught.value)


def _hang(shop: Workshop) -> str:
    from vlm_dist.distributed.heartbeat import Beat
    from vlm_dist.distributed.watchdog import Watchdog

    waiting = Beat(0, 9, 7, "backward", True, (), 0, 1200.0)
    lagging = Beat(0, 8, 7, "waiting for data", True, (), 0, 1210.0)
    watchdog = SimpleNamespace(
        _own_age=lambda: 1200.0,
        _ranks=SimpleNamespace(rank=0),
        _own_beat=lambda: waiting,
        _others=lambda: {1: lagging},
        _stacks_path=Path("runs/vqa/stacks/rank-00000.txt"),
    )
    return Watchdog._describe_hang(watchdog)  # type: ignore[arg-type]


def _disk_full(shop: Workshop) -> str:
    from vlm_dist.checkpoint.publish import publish_directory

    def write(directory: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    shop.patch.chdir(shop.run.directory)
    with pytest.raises(VlmDistError) as caught:
        publish_directory(Path("runs/vqa/checkpoint-100"), write)
    return str(caught.value)


def _prompt_loss(shop: Workshop) -> str:
    arguments = ["check", "configs/tiny.yaml", "--stage", "processor"]
    for override in ("collator.label_masking.mask_input_tokens=false", "train.output_dir=checked"):
        arguments += ["--set", override]
    return shop.process.run("vlm_dist.cli", arguments, shop.run.directory).output


def _deepspeed(shop: Workshop) -> str:
    call = "from deepspeed.launcher.runner import main; main(['-m', 'vlm_dist.train'])"
    ended = shop.run.command([sys.executable, "-c", call], timeout_seconds=60)
    assert ended.exit_code == 2
    return ended.output


def _port(shop: Workshop) -> str:
    with socket.create_server(("127.0.0.1", 0)) as other:
        environment = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(other.getsockname()[1])}
        ended = shop.train("train.output_dir=port", environment=environment)
    assert ended.exit_code == 6
    return ended.output


_FROZEN = "peft.towers={vision: freeze, projector: freeze, language: freeze}"

#: What the guide calls a fault -> what makes it, and gives back all that was printed.
FAULTS: dict[str, Callable[[Workshop], str]] = {
    **{case.name: _command(case.name) for case in CASES},
    "gated": _gated,
    "remote code": _remote_code,
    "precision of the device": _training(
        "train.bf16=false", "train.fp16=true", "train.output_dir=fp16", "train.max_steps=1", exit_code=2
    ),
    "dtype": _training("model.loading_params.torch_dtype=float16", "train.bf16=true", exit_code=2),
    "no videos": _kinds("llava"),
    "one kind": _kinds("smolvlm"),
    "eval column": _training("data.eval[0].columns={image: jpg}", "train.output_dir=held", exit_code=3),
    "skipped": _training(
        "collator.text_processing.max_length=30", "train.output_dir=skipped", "train.max_steps=2", exit_code=3
    ),
    "bad video": _bad_video,
    "out of memory": _out_of_memory,
    "hang": _hang,
    "disk full": _disk_full,
    "loss is nan": _training(
        "train.learning_rate=1e30",
        "train.max_nonfinite_steps=2",
        "train.max_steps=4",
        "train.output_dir=nan",
        "data.eval=[]",
        exit_code=7,
    ),
    "loss on the prompt": _prompt_loss,
    "all frozen": _training(_FROZEN, exit_code=2),
    "other adapter": _training("peft.adapter=run/adapter", "peft.r=4", "train.output_dir=other", exit_code=2),
    "deepspeed -m": _deepspeed,
    "port in use": _port,
    "wandb offline": _training(
        "train.report_to=wandb", "train.output_dir=offline", "train.max_steps=1", exit_code=0
    ),
}  # fmt: skip

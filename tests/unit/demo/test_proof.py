"""The demo tells the truth: scores of the run's own record, a check with PEFT alone, failure below the floor."""

import json
import re

import peft
import pytest
import torch
import yaml

from vlm_dist.demo.__main__ import FULL_FLOOR, HELDOUT, RUN_FILE, shortfalls
from vlm_dist.demo.answer_format import SYSTEM_PROMPT, teach_answer_format
from vlm_dist.demo.digits import DigitSplit, split_digits
from vlm_dist.demo.proof import AdapterProof, format_table, load_and_score, read_pictures, read_run
from vlm_dist.demo.tiny_model import TinyShape, build_config, build_model, build_processor, save_checkpoint
from vlm_dist.errors import DataError


def metrics(directory, *records):
    path = directory / "metrics.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def evaluation(step, images, clips):
    return {"kind": "eval", "step": step, "images/exact_match": images, "clips/exact_match": clips}


TRAINED = {"kind": "train", "step": 400, "num_steps": 400, "loss": 0.25}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    shape = TinyShape(num_layers=2, vision_depth=1)
    processor = build_processor(shape)
    model = build_model(build_config(shape, processor.tokenizer), seed=0)
    teach_answer_format(model, processor, num_steps=40)
    directory = tmp_path_factory.mktemp("base")
    save_checkpoint(directory, model, processor, torch.bfloat16)
    return directory, model, processor


def test_base_answers_with_a_digit(base):
    _, model, processor = base
    _, heldout = split_digits()
    answers = read_pictures(model, processor, DigitSplit(heldout.pictures[:20], heldout.labels[:20]))
    assert all(re.fullmatch(r"\d", answer) for answer in answers), answers


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft 0.21 on transformers 5.23
def test_adapter_is_loaded_and_weighed(base, tmp_path):
    directory, model, _ = base
    config = peft.LoraConfig(r=4, target_modules="all-linear")
    peft.get_peft_model(model, config, autocast_adapter_dtype=False).save_pretrained(tmp_path)
    _, heldout = split_digits()
    proof = load_and_score(directory, tmp_path, DigitSplit(heldout.pictures[:20], heldout.labels[:20]))
    assert proof.parameter_bytes == 2 * proof.num_parameters
    assert proof.parameter_bytes < proof.file_bytes < 1.5 * proof.parameter_bytes
    assert 0 <= proof.images_exact_match <= 0.5


def test_record_is_read(tmp_path):
    path = metrics(tmp_path, evaluation(0, 0.1, 0.0), evaluation(200, 0.8, 0.5), TRAINED, evaluation(400, 0.95, 0.9))
    record = read_run(path, list(HELDOUT))
    assert record.base.exact_match == {"images": 0.1, "clips": 0.0}
    assert (record.tuned.step, record.tuned.exact_match) == (400, {"images": 0.95, "clips": 0.9})
    assert record.final_loss == 0.25


@pytest.mark.parametrize(
    "records",
    [[TRAINED], [evaluation(0, 0.1, 0.0), TRAINED], [TRAINED, evaluation(200, 0.1, 0), evaluation(400, 1, 1)]],
)
def test_missing_evaluation_is_an_error(tmp_path, records):
    with pytest.raises(DataError, match="expected evaluations at step 0 and at the end"):
        read_run(metrics(tmp_path, *records), list(HELDOUT))


def test_table_and_floor(tmp_path):
    path = metrics(tmp_path, evaluation(0, 0.1, 0.0), TRAINED, evaluation(400, 0.95, 0.3))
    record = read_run(path, list(HELDOUT))
    proof = AdapterProof(tmp_path / "adapter", 1000, 2000, 2200, 0.95)
    table = format_table(record, proof, tmp_path / "base", {"images": 297, "clips": 96})
    assert re.search(r"images +0\.100 +0\.950 +297", table)
    assert "2,200 bytes; its 1,000 trainable parameters are 2,000 bytes (x 1.10)" in table
    assert "PeftModel.from_pretrained" in table.splitlines()[-1]
    assert shortfalls(record, proof, FULL_FLOOR) == ["clips: exact match 0.300 is below 0.5"]


def test_run_file_opens_with_its_command_and_fits_the_demo():
    text = RUN_FILE.read_text()
    assert text.splitlines()[0] == f"# deepspeed --num_gpus 2 -m vlm_dist.train --config {RUN_FILE}"
    overrides = yaml.safe_load(text)["overrides"]
    assert overrides["collator"]["message_format"]["system_prompt"] == SYSTEM_PROMPT
    assert {source["name"]: source["path"].split("/")[-1] for source in overrides["data"]["eval"]} == HELDOUT

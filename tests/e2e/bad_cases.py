"""Commands that must fail, and what each must say."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from vlm_dist.errors import ExitCode

TINY = ["--config", "configs/tiny.yaml"]


def changed(*overrides: str) -> list[str]:
    """Arguments of the tiny run with values changed."""
    return [*TINY, *(part for override in overrides for part in ("--set", override))]


def source(**settings: object) -> list[str]:
    """Arguments of the tiny run on one other training source."""
    return changed("data.train=" + json.dumps([settings]))


@dataclass(frozen=True)
class Case:
    """A command that must fail.

    Attributes:
        says: texts that the message must contain: what is wrong, where, and the way out.
        before_torch: it fails while only the configuration is known.
    """

    name: str
    arguments: list[str]
    code: ExitCode
    says: tuple[str, ...]
    before_torch: bool = False
    environment: dict[str, str] = field(default_factory=dict)
    timeout_seconds: float = 30


def config(name: str, arguments: list[str], *says: str) -> Case:
    return Case(name, arguments, ExitCode.CONFIG, says, before_torch=True)


def later(name: str, arguments: list[str], code: ExitCode, *says: str) -> Case:
    return Case(name, [*arguments, "--set", f"train.output_dir=runs/{name}"], code, says)


def launched(name: str, environment: dict[str, str], *says: str) -> Case:
    return Case(name, TINY, ExitCode.DISTRIBUTED, says, environment=environment)


CASES = [
    # The run file and the files that it names
    config("no run file", ["--config", "configs/nope.yaml"], "configs/nope.yaml: no such file"),
    config("run file is a directory", ["--config", "configs"], "configs: is a directory, expected a YAML file"),
    config("not YAML", ["--config", "configs/syntax.yaml"], "configs/syntax.yaml:4: not valid YAML", "expected ',' or"),
    config("not text", ["--config", "configs/binary.yaml"], "configs/binary.yaml: is not UTF-8 text"),
    config("a tab", ["--config", "configs/tab.yaml"], "configs/tab.yaml:3", r"'\t'"),
    config("a list", ["--config", "configs/list.yaml"], "configs/list.yaml:1: got a list of 1, expected keys"),
    config("empty", ["--config", "configs/empty.yaml"], "model: is missing, expected a hub id or a directory"),
    config(
        "no such section file",
        ["--config", "configs/nofile.yaml"],
        "configs/nofile.yaml:",
        "configs.train: no such file: configs/nope.yaml",
    ),
    # Values and --set
    config("wrong type", changed("train.learning_rate=fast"), "--set train.learning_rate=fast", "expected a number"),
    config("unknown key", changed("train.learning_rat=1"), "unknown key; did you mean learning_rate?"),
    config("unknown section", changed("trian.seed=1"), "unknown section; did you mean train?"),
    config("no value", changed("train.seed"), "expected section.key=value, such as train.learning_rate=1e-4"),
    config("unknown variable", ["--config", "configs/variable.yaml"], "{quesiton_column}", "{question_column}?"),
    config("two precisions", changed("train.bf16=true", "train.fp16=true"), "at most one of them"),
    config("not yet", changed("train.report_to=mlflow"), "not yet supported; use wandb, tensorboard or none"),
    config(
        "all at once",
        changed("train.seed=x", "peft.r=0", "collator.text_processing.max_length=-1"),
        "train.seed: got 'x'",
        "peft.r: got 0",
        "max_length: got -1",
    ),
    # Model ids
    config(
        "unknown model",
        changed("model_id=acme/nope-7b"),
        "add to vlm_model_config.yaml",
        '"acme/nope-7b":',
        'model_class: "',
        'processor_class: "',
        'import_path: "transformers"',
    ),
    config("no model directory", changed("model_id=./nomodel"), "no such model directory: ./nomodel"),
    config("empty model directory", changed("model_id=nothing"), "nothing is not a model directory: no config.json"),
    later(
        "hub id without network",
        changed("model_id=Qwen/Qwen2-VL-2B-Instruct"),
        ExitCode.MODEL,
        "could not find Qwen/Qwen2-VL-2B-Instruct",
        "HF_HUB_OFFLINE",
        "hf download Qwen/Qwen2-VL-2B-Instruct",
    ),
    later(
        "model without weights", changed("model_id=noweights"), ExitCode.MODEL, "lacks the weights (model.safetensors"
    ),
    later("damaged weights", changed("model_id=badweights"), ExitCode.MODEL, "could not load badweights", "it again"),
    later("model without processor", changed("model_id=noprocessor"), ExitCode.MODEL, "lacks the tokenizer"),
    later(
        "target modules match nothing",
        changed("peft.target_modules=[nothing_proj]"),
        ExitCode.MODEL,
        "peft.target_modules: 'nothing_proj' matches no linear layer",
        "q_proj",
    ),
    # Columns
    later(
        "wrong column",
        changed("collator.dataset_columns.question_column=query"),
        ExitCode.CONFIG,
        "dataset_columns.question_column",
        "no column 'query'; it has: answer, question, video, image",
    ),
    later(
        "wrong image column",
        changed("collator.dataset_columns.image_column=picture", "collator.data_processing.video_data=false"),
        ExitCode.CONFIG,
        "no source has a column 'picture'; images has: answer, question, video, image",
    ),
    later(
        "wrong rename",
        source(type="tar", path="data/images", columns={"image": "jpg"}),
        ExitCode.DATA,
        "columns maps to 'jpg', which the data does not have; it has: png, answer, question, video",
    ),
    # Data
    later("empty directory", source(type="tar", path="nothing"), ExitCode.DATA, "no .tar files found for 'nothing'"),
    later(
        "wrong glob",
        source(type="tar", path="data/images/*.tgz"),
        ExitCode.DATA,
        "files found for 'data/images/*.tgz' (looked in",
    ),
    later(
        "several missing sources",
        changed(
            'data.train=[{"type": "tar", "path": "gone"}, {"type": "jsonl", "path": "rows.jsonl"}]',
            'data.eval=[{"type": "hf", "path": "tables/x.parquet"}]',
        ),
        ExitCode.DATA,
        "'gone' (looked in",
        "'rows.jsonl' (looked in",
        "there is no tables/x.parquet",
    ),
    later("no such directory", source(type="tar", path="data/imags"), ExitCode.DATA, "'data/imags' (looked in"),
    later(
        "no held-out data", changed('data.eval=[{"type": "tar", "path": "nope"}]'), ExitCode.DATA, "'nope' (looked in"
    ),
    later(
        "truncated tar",
        source(type="tar", path="data/cut", columns={"image": "png"}),
        ExitCode.DATA,
        "data/cut/a.tar: truncated inside '",
        "copy or write the shard again",
    ),
    later(
        "no tar",
        source(type="tar", path="data/junk"),
        ExitCode.DATA,
        "data/junk/a.tar: not a tar",
        "copy or write the shard again",
    ),
    later(
        "no media",
        source(type="jsonl", path="nomedia.jsonl"),
        ExitCode.DATA,
        "0.png (nomedia.jsonl:1); media_root is ., set it to",
    ),
    later("a URL", source(type="jsonl", path="urls.jsonl"), ExitCode.DATA, "https://x.org/0.png' is a URL", "shards"),
    later("no JSON", source(type="jsonl", path="nojson.jsonl"), ExitCode.DATA, "4 of 4 records are no JSON objects"),
    later("no saved data set", source(type="hf", path="./nope"), ExitCode.DATA, "there is no ./nope (looked from"),
    later(
        "no hub data set",
        source(type="hf", name="acme/nope"),
        ExitCode.DATA,
        "cannot load the data set 'acme/nope'",
        "without network give a local directory as path",
    ),
    later(
        "nothing fits",
        changed("collator.text_processing.max_length=8", "train.max_steps=2"),
        ExitCode.DATA,
        "nothing was learned: no sample of the 2 steps could be used",
        "quarantine/rank-*.jsonl",
    ),
    # DeepSpeed's JSON
    config("no JSON file", changed("deepspeed=ds_configs/none.json"), "deepspeed: no such file: ds_configs/none.json"),
    later("JSON syntax", changed("deepspeed=ds_configs/syntax.json"), ExitCode.CONFIG, "ds_configs/syntax.json:1: not"),
    later(
        "JSON typo",
        changed("deepspeed=ds_configs/typo.json"),
        ExitCode.CONFIG,
        "ds_configs/typo.json:1: zero_optimisation is not a DeepSpeed key; did you mean zero_optimization?",
    ),
    later(
        "JSON auto",
        changed("deepspeed=ds_configs/auto.json"),
        ExitCode.CONFIG,
        'zero_optimization.reduce_bucket_size is "auto"; write a value',
    ),
    later(
        "JSON owned",
        changed("deepspeed=ds_configs/owned.json"),
        ExitCode.CONFIG,
        "train_micro_batch_size_per_gpu is train_config.yaml: per_device_train_batch_size; remove it here",
    ),
    later(
        "JSON stage as text",
        changed("deepspeed=ds_configs/text.json"),
        ExitCode.CONFIG,
        "zero_optimization.stage is '2', expected 0, 1, 2 or 3",
    ),
    later(
        "JSON stage 4", changed("deepspeed=ds_configs/four.json"), ExitCode.CONFIG, "stage is 4, expected 0, 1, 2 or 3"
    ),
    # Where it goes and where it starts
    Case(
        "output_dir is a file",
        changed("train.output_dir=afile"),
        ExitCode.CONFIG,
        ("train.output_dir: cannot write to afile", "name a directory that can be written"),
    ),
    Case(
        "output_dir under a file",
        changed("train.output_dir=afile/run"),
        ExitCode.CONFIG,
        ("train.output_dir: cannot write to afile/run: Not a directory",),
    ),
    later(
        "no such checkpoint",
        changed("train.resume=run/checkpoint-99"),
        ExitCode.CHECKPOINT,
        "run/checkpoint-99: no such checkpoint; there are: run/checkpoint-2",
    ),
    Case(
        "earlier run",
        TINY,
        ExitCode.CHECKPOINT,
        ("run has checkpoints of an earlier run", "train.resume=auto", "another train.output_dir"),
    ),
    Case(
        "resume with other data",
        changed("train.resume=auto", "train.max_steps=4", "data.train[0].path=data/images/images-000000.tar"),
        ExitCode.CHECKPOINT,
        (
            "data order is not this run's",
            "source 0 (images): samples 40 -> 16",
            "missing: images-000001.tar",
            "put these files back",
        ),
    ),
    Case(
        "resume with another seed",
        changed("train.resume=auto", "train.max_steps=4", "train.seed=7"),
        ExitCode.CHECKPOINT,
        ("seed: checkpoint 42, now 7",),
    ),
    Case(
        "resume with a batch that does not divide",
        changed("train.resume=auto", "train.max_steps=4", "train.per_device_train_batch_size=3"),
        ExitCode.CONFIG,
        (
            "the checkpoint's global batch of 4 samples, which stays the run's, is not a multiple of 3",
            "set per_device_train_batch_size to 2 or 4",
        ),
    ),
    Case(
        "resume behind the end",
        changed("train.resume=auto", "train.max_steps=1"),
        ExitCode.CHECKPOINT,
        ("run/checkpoint-2 has done 2 steps, but the run has 1", "raise train.max_steps"),
    ),
    Case(
        "resume with another rank of LoRA",
        changed("train.resume=auto", "train.max_steps=4", "peft.r=4"),
        ExitCode.CHECKPOINT,
        (
            "is of another model or adapter",
            "peft.r: 8 in the checkpoint, now 4",
            "restore the values of the checkpoint",
        ),
    ),
    # Launchers
    launched("RANK alone", {"RANK": "0"}, "WORLD_SIZE, LOCAL_RANK are not set", "unset RANK, WORLD_SIZE, LOCAL_RANK"),
    launched("no LOCAL_RANK", {"RANK": "0", "WORLD_SIZE": "2"}, "LOCAL_RANK is not set"),
    launched(
        "RANK is no number", {"RANK": "x", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, "RANK is 'x', expected a whole number"
    ),
    launched(
        "more local than all",
        {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"},
        "LOCAL_WORLD_SIZE 2 is larger than WORLD_SIZE 1",
    ),
    launched("no MASTER_ADDR", {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}, "MASTER_"),
    launched("mpirun", {"OMPI_COMM_WORLD_SIZE": "4"}, "every process of mpirun would train alone"),
]

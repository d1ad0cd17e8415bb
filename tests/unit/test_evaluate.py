"""Evaluation on 1, 2 and 3 gloo ranks, with a stand-in for the engine and for the workers."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.ranks import Ranks, run_ranks
from vlm_dist.config.peft import PeftConfig
from vlm_dist.config.vlm_model import ModelClassEntry
from vlm_dist.data.index.facts import FACTS_DTYPE
from vlm_dist.data.types import MicroBatch, MicroBatchJob, NullSlot, RawSample, SampleOrigin
from vlm_dist.demo.tiny_model import TinyShape, save_tiny_qwen2_vl
from vlm_dist.errors import DataError, ModelError, VlmDistError
from vlm_dist.evaluate import Evaluator, normalise_answer
from vlm_dist.evaluate.generation import learned_ends
from vlm_dist.loss import LabelledHead, token_loss_sum
from vlm_dist.model import attach_adapter, enable_gradient_checkpointing, load_model, load_processor

ENTRY = ModelClassEntry(
    model_class="Qwen2VLForConditionalGeneration", processor_class="Qwen2VLProcessor", import_path="transformers"
)
SHAPE = TinyShape(
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_key_value_heads=2,
    vision_dim=32,
    vision_depth=1,
    vision_heads=2,
    max_pixels=56 * 56,
)
VISION = "<|vision_start|><|image_pad|><|vision_end|>"


@pytest.fixture(scope="module")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_qwen2_vl(tmp_path_factory.mktemp("tiny") / "qwen2-vl", SHAPE, dtype=torch.float32)


class Questions:
    """A source of questions about grey squares."""

    def __init__(self, name: str, size: int, broken: Sequence[int] = ()) -> None:
        self.name, self.size, self.broken = name, size, broken
        self.columns = ("question", "answer")
        self.manifest_hash = f"{name}{size}"
        self.shard_sizes = [size]

    def __len__(self) -> int:
        return self.size

    def facts(self, rows: Any) -> Any:
        return np.zeros(len(rows), dtype=FACTS_DTYPE)

    def will_read(self, rows: Any) -> None: ...

    def origin(self, index: int) -> SampleOrigin:
        return SampleOrigin(self.name, "shard-0", f"{index:03}")

    def read(self, index: int) -> RawSample:
        words = " ".join(["which"] * (index % 3 + 1))
        return RawSample({"question": f"{words} digit {index}?", "answer": f"It is {index}"}, self.origin(index))


class InlinePool:
    """Renders, tokenises and pads in this process, as the materialiser does in its workers."""

    def __init__(self, sources: Sequence[Questions], processor: Any, prompts_only: bool = False) -> None:
        self.sources, self.processor, self.prompts_only = sources, processor, prompts_only

    def submit(self, job: MicroBatchJob) -> Any:
        return SimpleNamespace(result=lambda: self.make(job))

    def make(self, job: MicroBatchJob) -> MicroBatch:
        from PIL import Image

        torch.rand(1)  # evaluation must not move the generators of training
        prompts, answers, origins, shades, null_slots = [], [], [], [], []
        for ref in job.refs:
            if ref is None:
                null_slots.append(NullSlot(None, "tail", "empty"))
                continue
            source = self.sources[ref.source]
            if ref.index in source.broken:
                if source.name == "unreadable":
                    raise DataError(f"{source.origin(ref.index)}: disk on fire")
                null_slots.append(NullSlot(source.origin(ref.index), "decode", "not a picture"))
                continue
            raw = source.read(ref.index)
            prompts.append(f"<|im_start|>user\n{VISION}{raw.fields['question']}<|im_end|>\n<|im_start|>assistant\n")
            answers.append(raw.fields["answer"])
            origins.append(raw.origin)
            shades.append(ref.index * 9)
        num_samples = len(prompts)
        prompts, shades = prompts or [VISION], shades or [0]  # the dummy
        ends = [f"{a}<|im_end|>" for a in answers] or [""]
        texts = prompts if self.prompts_only else [p + end for p, end in zip(prompts, ends, strict=True)]
        images = [Image.new("RGB", (56, 56), (shade % 256,) * 3) for shade in shades]
        side = "left" if self.prompts_only else "right"
        inputs = dict(self.processor(text=texts, images=images, padding=True, padding_side=side, return_tensors="pt"))
        labels = torch.full_like(inputs["input_ids"], -100)
        if not self.prompts_only:
            for row, answer in enumerate(answers):
                count = len(self.processor.tokenizer(f"{answer}<|im_end|>")["input_ids"])
                length = int(inputs["attention_mask"][row].sum())
                labels[row, length - count : length] = inputs["input_ids"][row, length - count : length]
        return MicroBatch(
            job=job,
            inputs=inputs,
            labels=labels,
            num_samples=num_samples,
            num_target_tokens=int((labels != -100).sum()),
            num_tokens=0,
            num_computed_tokens=0,
            null_slots=null_slots,
            origins=origins,
            references=answers,
            other_references=[(f"{answer}!", "number") for answer in answers] if self.prompts_only else [],
        )


def make_engine(tiny_dir: Path, adapter: bool = False) -> Any:
    model = load_model(str(tiny_dir), ENTRY, dtype="float32")
    if adapter:
        settings = PeftConfig(r=4, lora_dropout=0.2)
        model = attach_adapter(model, settings, {"vision": "lora", "projector": "lora", "language": "lora"}, seed=1)
        enable_gradient_checkpointing(model)
    device = torch.device("cpu")
    return SimpleNamespace(
        module=model, device=device, compute_dtype=torch.float32, zero_stage=2, head=LabelledHead(model)
    )


def make_evaluator(ranks: Ranks, tiny_dir: Path, sources: list[Questions], engine: Any, **changes: Any) -> Evaluator:
    processor = load_processor(str(tiny_dir), ENTRY)
    arguments: dict[str, Any] = {
        "engine": engine,
        "ranks": ranks,
        "sources": sources,
        "pool": InlinePool(sources, processor),
        "generation_pool": InlinePool(sources, processor, prompts_only=True),
        "tokenizer": processor.tokenizer,
        "per_device_eval_batch_size": 2,
        "max_new_tokens": 6,
    }
    return Evaluator(**{**arguments, **changes})


#: One that is a mean, and some that are not, with one reference and with several.
METRICS = ("exact_match", "anls", "wer", "bleu", "chrf")


def evaluate(ranks: Ranks, tiny_dir: Path, sources: list[Questions], out: Path | None) -> dict[str, Any]:
    engine = make_engine(tiny_dir)
    calls = {"forward": 0, "generate": 0}
    generate = engine.module.generate

    def counted_generate(**kwargs: Any) -> Any:
        calls["generate"] += 1
        handle.remove()
        try:
            return generate(**kwargs)
        finally:
            hook()

    def hook() -> None:
        nonlocal handle
        handle = engine.module.register_forward_hook(lambda *_: calls.update(forward=calls["forward"] + 1))

    handle: Any = None
    hook()
    engine.module.generate = counted_generate
    metrics = make_evaluator(ranks, tiny_dir, sources, engine, predictions_dir=out, metrics=METRICS).run(7)
    return {"metrics": metrics, "calls": calls}


SOURCES = [Questions("squares", 9, broken=[1]), Questions("few", 1)]


@pytest.fixture(scope="module")
def alone(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, float], list[dict[str, Any]]]:
    out = tmp_path_factory.mktemp("alone")
    (result,) = run_ranks(evaluate, 1, tiny_dir, SOURCES, out)
    return result["metrics"], [json.loads(line) for line in (out / "step-7.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_number_of_ranks_changes_nothing(
    alone: tuple[dict[str, float], list[dict[str, Any]]], tiny_dir: Path, tmp_path: Path, world_size: int
) -> None:
    results = run_ranks(evaluate, world_size, tiny_dir, SOURCES, tmp_path)
    metrics, predictions = alone
    assert all(result["metrics"] == metrics for result in results)  # losses to the last bit
    assert len({str(result["calls"]) for result in results}) == 1  # as many collectives on every rank
    assert results[0]["calls"]["forward"] == results[0]["calls"]["generate"] > 0
    written = [json.loads(line) for line in (tmp_path / "step-7.jsonl").read_text().splitlines()]
    assert written == predictions
    assert [path.name for path in tmp_path.iterdir()] == ["step-7.jsonl"]


def test_every_held_out_sample_counts_exactly_once(alone: tuple[dict[str, float], list[dict[str, Any]]]) -> None:
    metrics, predictions = alone
    assert (metrics["squares/num_samples"], metrics["squares/num_skipped"]) == (8, 1)
    assert (metrics["few/num_samples"], metrics["few/num_skipped"]) == (1, 0)
    keys = [(one["source"], one["key"]) for one in predictions]
    assert keys == [*(("squares", f"{i:03}") for i in range(9) if i != 1), ("few", "000")]
    assert predictions[0]["reference"] == "It is 0" and "which digit 0?" in predictions[0]["prompt"]
    assert predictions[0]["references"] == ["It is 0", "It is 0!", "number"]


def test_metrics_are_of_each_source_and_of_all(alone: tuple[dict[str, float], list[dict[str, Any]]]) -> None:
    """From what the file says of each answer; word errors over all words, of the reference that fits best."""
    metrics, predictions = alone
    for source in ("squares", "few", "overall"):
        own = [one for one in predictions if source in (one["source"], "overall")]
        assert metrics[f"{source}/num_answers"] == len(own) > 0
        assert metrics[f"{source}/anls"] == pytest.approx(sum(one["anls"] for one in own) / len(own))
        assert 0 <= metrics[f"{source}/chrf"] <= 1
        assert min(one["wer"] for one in own) <= metrics[f"{source}/wer"] <= max(one["wer"] for one in own)
    assert metrics["overall/num_samples"] == 9 and metrics["overall/num_skipped"] == 1
    total = metrics["squares/loss"] * 8 + metrics["few/loss"]
    assert metrics["overall/loss"] == pytest.approx(total / 9, rel=0.05)  # answers have nearly the same length


def test_loss_and_answers_are_those_of_one_sample_at_a_time(
    alone: tuple[dict[str, float], list[dict[str, Any]]], tiny_dir: Path
) -> None:
    """Neither padding on the left nor neighbours in the batch may change an answer."""
    metrics, predictions = alone
    engine = make_engine(tiny_dir)
    processor = load_processor(str(tiny_dir), ENTRY)
    from vlm_dist.data.types import SampleRef

    total, targets, answers = 0.0, 0, []
    for index in (i for i in range(9) if i != 1):
        job = MicroBatchJob(0, 0, (SampleRef(0, index),))
        batch = InlinePool(SOURCES, processor).make(job)
        with torch.no_grad():
            total += float(token_loss_sum(engine.module(**batch.inputs).logits, batch.labels))
        targets += batch.num_target_tokens
        prompt = InlinePool(SOURCES, processor, prompts_only=True).make(job).inputs
        ids = engine.module.generate(**prompt, max_new_tokens=6, do_sample=False, use_cache=False)
        new = ids[0, prompt["input_ids"].shape[1] :]
        answers.append(processor.tokenizer.decode(new, skip_special_tokens=True).strip())
    assert metrics["squares/loss"] == pytest.approx(total / targets, rel=1e-5)
    assert [one["prediction"] for one in predictions[:-1]] == answers


def train(ranks: Ranks, tiny_dir: Path, evaluating: bool) -> dict[str, Any]:
    """Four steps; the generators are not seeded again, so that any use of them by evaluation would show."""
    engine = make_engine(tiny_dir, adapter=True)
    sources = [Questions("train", 8)]
    pool = InlinePool(sources, load_processor(str(tiny_dir), ENTRY))
    evaluator = make_evaluator(ranks, tiny_dir, [Questions("held-out", 3)], engine)
    optimizer = torch.optim.AdamW([p for p in engine.module.parameters() if p.requires_grad], lr=0.05)
    torch.manual_seed(0)
    engine.module.train()
    engine.module.get_base_model().lm_head.eval()  # modes are restored one by one
    from vlm_dist.data.types import SampleRef

    losses = []
    for step in range(4):
        batch = pool.make(MicroBatchJob(step, 0, (SampleRef(0, 2 * step), SampleRef(0, 2 * step + 1))))
        loss = token_loss_sum(engine.module(**batch.inputs).logits, batch.labels)
        loss.backward()
        if evaluating:  # even with a gradient half accumulated
            evaluator.run(step)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    modes = [module.training for module in engine.module.modules()]
    return {"losses": losses, "modes": modes, "random": torch.random.get_rng_state().tolist()}


def test_evaluation_does_not_disturb_training(tiny_dir: Path) -> None:
    (plain,) = run_ranks(train, 1, tiny_dir, False)
    (disturbed,) = run_ranks(train, 1, tiny_dir, True)
    assert plain == disturbed
    assert len(set(plain["losses"])) == 4


def exact_match_of_own_answers(ranks: Ranks, tiny_dir: Path) -> dict[str, float]:
    """The references are what the model answers, in another spelling."""
    engine, processor = make_engine(tiny_dir), load_processor(str(tiny_dir), ENTRY)
    sources = [Questions("own", 4)]
    out = tiny_dir.parent / "own"
    make_evaluator(ranks, tiny_dir, sources, engine, predictions_dir=out).run(0)
    answers = [json.loads(line)["prediction"] for line in (out / "step-0.jsonl").read_text().splitlines()]

    class Own(InlinePool):
        def make(self, job: MicroBatchJob) -> MicroBatch:
            batch = super().make(job)
            for row, origin in enumerate(batch.origins):
                wrong = origin.key == "002"
                batch.references[row] = "wrong" if wrong else f"  {answers[int(origin.key)].upper()} \n"
            return batch

    pool = Own(sources, processor, prompts_only=True)
    return make_evaluator(ranks, tiny_dir, sources, engine, generation_pool=pool).run(0)


def test_exact_match_is_normalised(tiny_dir: Path) -> None:
    (metrics,) = run_ranks(exact_match_of_own_answers, 1, tiny_dir)
    assert metrics["own/exact_match"] == 0.75
    assert normalise_answer("  Ten\n  PAST two ") == normalise_answer("ten past Two") != normalise_answer("ten")


def loss_only(ranks: Ranks, tiny_dir: Path) -> dict[str, float]:
    sources = [Questions("same", 2, broken=[0, 1]), Questions("same", 2)]
    return make_evaluator(ranks, tiny_dir, sources, make_engine(tiny_dir), generation_pool=None).run(0)


def test_without_generation_there_is_the_loss_alone(tiny_dir: Path) -> None:
    (metrics,) = run_ranks(loss_only, 1, tiny_dir)
    names = ("same#0", "same#1", "overall")
    assert set(metrics) == {f"{i}/{name}" for i in names for name in ("loss", "num_samples", "num_skipped")}
    assert math.isnan(metrics["same#0/loss"]) and metrics["same#1/loss"] == metrics["overall/loss"] > 0


def unreadable(ranks: Ranks, tiny_dir: Path) -> str:
    sources = [Questions("unreadable", 6, broken=[2])]  # in the second micro-batch: rank 1's
    try:
        make_evaluator(ranks, tiny_dir, sources, make_engine(tiny_dir)).run(0)
    except VlmDistError as error:
        return str(error)
    return "no error"


def test_a_rank_that_cannot_read_takes_the_others_with_it(tiny_dir: Path) -> None:
    messages = run_ranks(unreadable, 2, tiny_dir)
    assert all("unreadable/shard-0:002: disk on fire" in message for message in messages)


def failing_on_one(ranks: Ranks, tiny_dir: Path, where: str) -> str:
    """The second rank's storage fails before there is anything to wait for."""
    sources = [Questions("few", 6)]

    def fail(*_: Any) -> Any:
        raise DataError(f"no storage to {where}")

    evaluator = make_evaluator(ranks, tiny_dir, sources, make_engine(tiny_dir), generation_pool=None)
    if ranks.rank == 1:
        owner: Any = {"announce": sources[0], "submit": evaluator._pool, "plan": evaluator._walk.plans[0]}[where]
        setattr(owner, {"announce": "will_read", "submit": "submit", "plan": "step"}[where], fail)
    try:
        evaluator.run(0)
    except VlmDistError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize("where", ["announce", "submit", "plan"])
def test_a_rank_that_fails_before_it_reads_takes_the_others_with_it(tiny_dir: Path, where: str) -> None:
    messages = run_ranks(failing_on_one, 2, tiny_dir, where, timeout_seconds=30)
    assert messages == [f"rank 1: no storage to {where}", f"no storage to {where}"]


def cannot_generate(ranks: Ranks, tiny_dir: Path) -> str:
    engine = SimpleNamespace(module=torch.nn.Linear(1, 1), device="cpu", compute_dtype=torch.float32, zero_stage=2)
    try:
        make_evaluator(ranks, tiny_dir, [Questions("any", 1)], engine)
    except ModelError as error:
        return str(error)
    return "no error"


def test_a_model_that_cannot_generate_is_refused_at_once(tiny_dir: Path) -> None:
    (message,) = run_ranks(cannot_generate, 1, tiny_dir)
    assert "predict_with_generate: Linear cannot generate" in message


def test_generation_ends_with_what_the_labels_end_with() -> None:
    special, newline, text = {7, 8, 9}, 5, 3
    labels = torch.tensor(
        [[-100, text, text, 7, newline], [-100, -100, text, 8, -100], [text, 9, text, text, text], [-100] * 5]
    )
    assert learned_ends(labels, special, -100) == {7, 8}


def generated_ends(ranks: Ranks, tiny_dir: Path) -> list[Any]:
    """What ends generation where the checkpoint knows of token 2 alone."""
    engine, seen = make_engine(tiny_dir), []
    engine.module.generation_config.eos_token_id = 2
    generate = engine.module.generate

    def watched(**kwargs: Any) -> Any:
        seen.append(kwargs["generation_config"].eos_token_id)
        return generate(**kwargs)

    engine.module.generate = watched
    make_evaluator(ranks, tiny_dir, [Questions("few", 1)], engine).run(0)
    return seen


def test_the_checkpoints_own_idea_of_an_end_does_not_decide_alone(tiny_dir: Path) -> None:
    im_end = load_processor(str(tiny_dir), ENTRY).tokenizer.convert_tokens_to_ids("<|im_end|>")
    for seen in run_ranks(generated_ends, 2, tiny_dir):  # one rank has no labels at all
        assert seen == [sorted({2, im_end})]

"""The configuration fragments of the user's guide: each loads, and all together train."""

from __future__ import annotations

import pytest
import yaml

from tests.e2e.preloaded import Preloaded
from tests.tiny_run import TinyRun, make_tiny_run
from vlm_dist.config import load_run

pytestmark = pytest.mark.e2e

#: The fragments of the user's guide, in its order: section, and the text as it stands there.
GUIDE = [
    (
        "model",
        """
model_classes:
    # Qwen2-VL 시리즈
    "Qwen/Qwen2-VL-2B-Instruct":
        model_class: "Qwen2VLForConditionalGeneration"
        processor_class: "Qwen2VLProcessor"
        import_path: "transformers"

    # LLaVA 시리즈
    "llava-hf/llava-1.5-7b-hf":
        model_class: "LlavaForConditionalGeneration"
        processor_class: "LlavaProcessor"
        import_path: "transformers"

    # InternVL 시리즈
    "OpenGVLab/InternVL2-2B":
        model_class: "InternVLChatModel"
        processor_class: "InternVLChatProcessor"
        import_path: "transformers"

    # PaliGemma 시리즈
    "google/paligemma-3b-pt-448":
        model_class: "PaliGemmaForConditionalGeneration"
        processor_class: "PaliGemmaProcessor"
        import_path: "transformers"

    # Phi-3-Vision 시리즈
    "microsoft/Phi-3-vision-128k-instruct":
        model_class: "Phi3VForCausalLM"
        processor_class: "Phi3VProcessor"
        import_path: "transformers"
""",
    ),
    (
        "model",
        """
model_classes:
    "your-org/your-vlm-model":
        model_class: "YourVLMModelClass" # 모델 클래스명
        processor_class: "YourVLMProcessorClass" # 프로세서 클래스명
        import_path: "transformers" # 임포트 경로
""",
    ),
    (
        "model",
        """
# 공통 로딩 파라미터
loading_params:
    torch_dtype: "torch.bfloat16" # 데이터 타입: torch.float16, torch.bfloat16
    device_map: "auto" # 디바이스 매핑: auto, cuda, cpu
    trust_remote_code: true # 원격 코드 신뢰 여부

# 프로세서 공통 설정
processor_params:
    trust_remote_code: true # 프로세서 원격 코드 신뢰 여부
""",
    ),
    (
        "collator",
        """
dataset_columns:
    image_column: "image" # 데이터셋의 이미지 컬럼명
    question_column: "question" # 데이터셋의 질문 컬럼명
    answer_column: "answer" # 데이터셋의 답변 컬럼명
    video_column: "video" # 데이터셋의 비디오 컬럼명 (선택사항)
    context_column: null # 추가 컨텍스트 컬럼 (선택사항)
""",
    ),
    (
        "collator",
        """
data_processing:
    image_data: true # 이미지 데이터 처리 활성화 (기본값: true)
    video_data: false # 비디오 데이터 처리 활성화 (기본값: false)
""",
    ),
    ("collator", "data_processing:\n    image_data: false\n    video_data: true\n"),
    ("collator", "data_processing:\n    image_data: true\n    video_data: true\n"),
    (
        "collator",
        """
message_format:
    system_prompt: "Answer briefly." # 시스템 프롬프트

    # 학습용 메시지 구조
    training_messages:
        - role: "user"
          content:
              - type: "text"
                text: "{system_prompt}"
              - type: "image" # 이미지 플레이스홀더
              - type: "text"
                text: "{question_column}"
        - role: "assistant"
          content:
              - type: "text"
                text: "{answer_column}"
""",
    ),
    (
        "collator",
        """
image_processing:
    convert_to_rgb: true # RGB 변환 (권장: true)
    resize_mode: "keep_aspect" # 리사이즈 모드: keep_aspect, crop, stretch
    max_size: null # 최대 크기 제한 (픽셀, null=제한없음)
""",
    ),
    (
        "collator",
        """
video_processing:
    enabled: true # 비디오 처리 기능 활성화

    # 프레임 추출 설정
    frame_extraction:
        library: "decord" # 비디오 라이브러리: decord (권장), cv2
        sampling_strategy: "uniform" # 샘플링 전략: uniform (균등 샘플링)
        num_frames: 8 # 추출할 프레임 수

    # 비디오 파일 처리
    file_processing:
        convert_to_rgb: true # RGB 변환
        max_duration: null # 최대 비디오 길이 (초)
""",
    ),
    (
        "collator",
        """
text_processing:
    padding: true # 패딩 적용
    truncation: true # 자르기 적용
    max_length: 2048 # 최대 토큰 길이
    add_generation_prompt: false # generation prompt 추가 (학습시 false)
""",
    ),
    (
        "collator",
        """
label_masking:
    mask_pad_token: true # 패딩 토큰 마스킹
    mask_image_token: true # 이미지 토큰 마스킹
    mask_input_tokens: false # 입력 토큰 마스킹 (instruction tuning시 false)
    ignore_index: -100 # 마스킹된 토큰의 라벨 값
""",
    ),
    (
        "train",
        """
# 배치 크기 설정
per_device_train_batch_size: 8 # 훈련 배치 크기 (GPU 메모리에 따라 조정)
per_device_eval_batch_size: 8 # 평가 배치 크기
gradient_accumulation_steps: 2 # 그래디언트 누적 스텝

# 학습률 및 에포크
learning_rate: 1.0e-05 # 학습률 (VLM은 보통 낮은 학습률 사용)
num_train_epochs: 1.0 # 훈련 에포크 수

# 로깅 및 저장
logging_steps: 0.1 # 로깅 주기 (0.1 = 10%마다)
eval_steps: 0.1 # 평가 주기
save_steps: 0.1 # 모델 저장 주기
save_total_limit: 2 # 저장할 체크포인트 개수

# 메모리 최적화
gradient_checkpointing: true # 그래디언트 체크포인팅 (메모리 절약)
bf16: true # bfloat16 사용 (권장)
fp16: false # float16 사용 (bf16과 배타적)

# 데이터 처리
group_by_length: true # 길이별 그룹화 (효율성 향상)
remove_unused_columns: false # VLM에서는 false로 설정
dataloader_pin_memory: false # 메모리 핀닝
""",
    ),
    (
        "train",
        """
# Weights & Biases 로깅
report_to: ["wandb"] # 로깅 서비스
run_name: "qwen2-vl-2b-vqa-finetuning" # 실험 이름
""",
    ),
    (
        "peft",
        """
# PEFT (LoRA) Configuration
task_type: "CAUSAL_LM" # 태스크 타입
r: 64 # LoRA rank (높을수록 더 많은 파라미터)
target_modules: "all-linear" # 타겟 모듈 (all-linear 권장)
lora_alpha: 16 # LoRA alpha (일반적으로 r의 1/4)
lora_dropout: 0.05 # LoRA 드롭아웃
bias: "none" # 바이어스 설정
use_rslora: false # RS-LoRA 사용 여부
use_dora: false # DoRA 사용 여부
""",
    ),
    (
        "collator",
        """
dataset_columns:
    image_column: "image_path" # 실제 이미지 컬럼명으로 변경
    question_column: "query" # 실제 질문 컬럼명으로 변경
    answer_column: "response" # 실제 답변 컬럼명으로 변경
""",
    ),
    (
        "collator",
        """
data_processing:
    image_data: false # 이미지 비활성화
    video_data: true # 비디오 활성화

dataset_columns:
    video_column: "video_path" # 비디오 컬럼명 설정
""",
    ),
    ("collator", "video_processing:\n    frame_extraction:\n        num_frames: 16 # 더 많은 프레임 추출\n"),
    (
        "train",
        """
per_device_train_batch_size: 4 # 배치 크기 줄이기
gradient_accumulation_steps: 4 # 누적 스텝 늘리기
gradient_checkpointing: true # 체크포인팅 활성화
""",
    ),
    ("peft", "r: 32 # rank 줄이기 (64 → 32)\nlora_alpha: 8 # alpha도 비례해서 줄이기\n"),
    ("collator", 'dataset_columns:\n    image_column: "실제_이미지_컬럼명" # 데이터셋에 맞게 수정\n'),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return make_tiny_run(tmp_path_factory.mktemp("guide"))


def leaves(value: object, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], object]:
    if isinstance(value, dict):
        return {key: leaf for name, child in value.items() for key, leaf in leaves(child, (*path, name)).items()}
    return {path: value}


@pytest.mark.parametrize("number", range(len(GUIDE)), ids=lambda number: f"{number}-{GUIDE[number][0]}")
def test_every_fragment_of_the_guide_loads_as_overrides(number: int, run: TinyRun) -> None:
    section, text = GUIDE[number]
    fragment = yaml.safe_load(text)
    run_file = run.directory / "configs" / f"guide-{number}.yaml"
    shipped = yaml.safe_load((run.directory / "configs" / "run.yaml").read_text())
    run_file.write_text(yaml.safe_dump(shipped | {"overrides": {section: fragment}}, allow_unicode=True))
    loaded = load_run(run_file).dump()[section]
    for path, wanted in leaves(fragment).items():
        found = loaded
        for key in path:
            found = found[key]
        if path == ("message_format", "training_messages"):
            found = [
                message | {"content": [{k: v for k, v in part.items() if v is not None} for part in message["content"]]}
                for message in found
            ]
        if path == ("loading_params", "torch_dtype"):
            found = "torch." + str(found).removeprefix("torch.")
        assert found == wanted or [found] == wanted, (path, found, wanted)


def test_the_whole_guide_at_once_trains(run: TinyRun, process: Preloaded) -> None:
    """All first fragments as one run file, on the tiny model: as a user who copies the guide would have it."""
    overrides: dict = {}
    for section, text in [*GUIDE[:5], *GUIDE[7:15]]:
        overrides.setdefault(section, {}).update(yaml.safe_load(text))
    overrides["data"] = {
        "train": [{"type": "tar", "path": "data/images", "columns": {"image": "png"}}],
        "eval": [{"type": "tar", "path": "data/images-heldout", "columns": {"image": "png"}}],
        "index_dir": "index",
    }
    overrides["train"] |= {"output_dir": "guide", "dataloader_num_workers": 0}
    run_file = {"model": "model", "deepspeed": "../ds_configs/zero2.json", "overrides": overrides}
    (run.directory / "configs" / "guide.yaml").write_text(yaml.safe_dump(run_file))
    ended = process.run("vlm_dist.train", ["--config", "configs/guide.yaml"], run.directory, timeout_seconds=120)
    assert ended.exit_code == 0, ended.output
    assert "Traceback" not in ended.output
    assert len(run.losses("guide")) == 3  # 40 samples in steps of 16, the last one with empty slots
    assert len(run.metrics("guide", "eval")) == 3
    assert sorted(path.name for path in (run.directory / "guide").glob("checkpoint-*")) == [
        "checkpoint-2",
        "checkpoint-3",
    ]
    assert (run.directory / "guide" / "wandb").is_dir()  # no network: recorded offline
    adapter = yaml.safe_load((run.directory / "guide" / "adapter" / "adapter_config.json").read_text())
    assert (adapter["r"], adapter["lora_alpha"], adapter["lora_dropout"]) == (64, 16, 0.05)
    assert (run.directory / "guide" / "adapter" / "adapter_model.safetensors").is_file()

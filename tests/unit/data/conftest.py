"""A real Qwen2-VL processor of tiny geometry."""

from typing import Any

import pytest


@pytest.fixture(scope="session")
def processor() -> Any:
    from vlm_dist.demo.tiny_model import TinyShape, build_processor

    return build_processor(TinyShape(max_pixels=14 * 14 * 4 * 1280))

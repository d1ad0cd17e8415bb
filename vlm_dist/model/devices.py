"""What GPUs can do at most: the dense bfloat16 rate that MFU is a share of, by name."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """A GPU, as its vendor describes it.

    Attributes:
        name: short, as people say it.
        pattern: of the names that the driver gives, without regard to case.
        tflops: dense bfloat16 tensor-core rate with float32 sums, in 10^12 operations per second. Vendors print twice
            of it, "with sparsity", for the newer ones.
        memory_gb: as printed on the box; the smallest where there are several.
    """

    name: str
    pattern: str
    tflops: float
    memory_gb: float


#: The first row that fits a name counts. Where a data sheet gives the rate with sparsity, it is halved here.
GPUS: tuple[Gpu, ...] = (
    # NVIDIA Blackwell Architecture Technical Brief (per GPU, dense)
    Gpu("GB200", r"\bGB200\b", 2500, 186),
    Gpu("B200", r"\bB200\b", 2250, 180),
    Gpu("B100", r"\bB100\b", 1750, 192),
    # NVIDIA H100 and H200 Tensor Core GPU data sheets: 1979 (SXM), 1513 (PCIe), 1671 (NVL) with sparsity
    Gpu("H200 NVL", r"\bH200 NVL\b", 835.5, 141),
    Gpu("H200", r"\bH200\b", 989.4, 141),
    Gpu("GH200", r"\bGH200\b", 989.4, 96),
    Gpu("H100 NVL", r"\bH100 NVL\b", 835.5, 94),
    Gpu("H100 PCIe", r"\bH100 PCIe\b", 756.5, 80),
    Gpu("H100", r"\bH100\b", 989.4, 80),
    # the same chips for China: full rate with slower links (H800, A800), or a reduced one (H20)
    Gpu("H800 PCIe", r"\bH800 PCIe\b", 756.5, 80),
    Gpu("H800", r"\bH800\b", 989.4, 80),
    Gpu("H20", r"\bH20\b", 148, 96),
    # NVIDIA A100 Tensor Core GPU Architecture (white paper): every form of it
    Gpu("A100", r"\bA100\b", 312, 40),
    Gpu("A800", r"\bA800\b", 312, 80),
    # data sheets of A30, A40, A10; A10G by its measured clocks is what AWS states (70)
    Gpu("A30", r"\bA30\b", 165, 24),
    Gpu("A40", r"\bA40\b", 149.7, 48),
    Gpu("A10G", r"\bA10G\b", 70, 24),
    Gpu("A10", r"\bA10\b", 125, 24),
    # data sheets of L40S (733 with sparsity), L40 (362), L4 (242)
    Gpu("L40S", r"\bL40S\b", 366.5, 48),
    Gpu("L40", r"\bL40\b", 181, 48),
    Gpu("L4", r"\bL4\b", 121, 24),
    # NVIDIA Ada, Ampere and RTX Blackwell GPU architecture white papers: FP16 tensor with FP32 accumulate, dense
    Gpu("RTX PRO 6000", r"\bRTX PRO 6000\b", 503.8, 96),
    Gpu("RTX 6000 Ada", r"\bRTX 6000 Ada\b", 364.2, 48),
    Gpu("RTX A6000", r"\bRTX A6000\b", 154.8, 48),
    Gpu("RTX 5090", r"\bRTX 5090\b(?! D| Laptop)", 209.5, 32),
    Gpu("RTX 4090", r"\bRTX 4090\b(?! D| Laptop)", 165.2, 24),
    Gpu("RTX 3090 Ti", r"\bRTX 3090 Ti\b", 80, 24),
    Gpu("RTX 3090", r"\bRTX 3090\b", 71, 24),
    # AMD Instinct data sheets (MI250X: of one of its two dies, which is what the driver shows as a GPU)
    Gpu("MI355X", r"\bMI355X\b", 2516.6, 288),
    Gpu("MI325X", r"\bMI325X\b", 1307.4, 256),
    Gpu("MI300X", r"\bMI300X\b", 1307.4, 192),
    Gpu("MI250X", r"\bMI250X\b", 191.5, 64),
)


def find_gpu(device_name: str) -> Gpu | None:
    """The row of a GPU.

    Args:
        device_name: as `torch.cuda.get_device_name` tells it ("NVIDIA H100 80GB HBM3"), or as people do ("H100").

    Returns:
        None for a GPU without a row, and for a part of one (MIG).
    """
    name = device_name.replace("-", " ").replace("_", " ")
    if re.search(r"\bMIG\b", name):
        return None
    return next((gpu for gpu in GPUS if re.search(gpu.pattern, name, re.IGNORECASE)), None)


def peak_flops(device_name: str) -> float | None:
    """Peak dense bfloat16 operations per second of a GPU; None where nobody knows. See `find_gpu`."""
    gpu = find_gpu(device_name)
    return None if gpu is None else gpu.tflops * 1e12

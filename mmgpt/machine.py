"""What this machine is good at: precision and threads are chosen by looking."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def cpu_has_bf16() -> bool:
    """Whether the CPU multiplies bf16 in hardware; without, a bf16 product is a hundred times slower than fp32."""
    import torch

    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "avx10_2", "bf16", "arm_bf16"))


def physical_cores() -> int:
    """Cores this process may use, hyper-threads counted once."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    cores = set()
    for cpu in allowed:
        try:
            with open(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") as file:
                cores.add(file.read().strip())
        except OSError:
            cores.add(str(cpu))
    return max(1, len(cores))


def set_threads(threads: int | None = None) -> None:
    """Use `threads`, or one a physical core; a number in OMP_NUM_THREADS is respected."""
    import torch

    if threads is not None or "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads or physical_cores())


def pick_device(name: str = "auto") -> torch.device:
    """`auto` is the first GPU, else the CPU."""
    import torch

    from mmgpt.errors import UsageError

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type != "cpu":
            torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device {name!r} cannot be used on this machine: {str(error).splitlines()[0]}") from error
    return device


def has_bf16(device: torch.device) -> bool:
    import torch

    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return device.type == "cpu" and cpu_has_bf16()


def pick_precision(name: str, device: torch.device) -> str:
    """Lightning's word for a precision; `auto` is bf16 where the hardware has it, else fp32."""
    words = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}
    if name == "auto":
        return words["bf16"] if has_bf16(device) else words["fp32"]
    return words[name]


def keep_in_bf16(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Round weights that do not learn, where autocast would convert them again in every forward.

    Parameters alone: rotary frequencies, which are buffers, would lose their low bits.
    """
    import torch

    for parameter in parameters:
        parameter.data = parameter.data.to(torch.bfloat16)

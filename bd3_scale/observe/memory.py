"""Peak memory of this process."""

from __future__ import annotations

from pathlib import Path


def peak_rss_bytes() -> int:
    """The most resident memory this process has had, in bytes (VmHWM of proc(5), Linux).

    getrusage(2) is no substitute: its maximum survives exec, so that a small program started by a large one looks
    large.
    """
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmHWM"].split()[0]) * 1024


def peak_cuda_bytes() -> int | None:
    """The most memory that PyTorch has allocated on the current CUDA device, in bytes; None without CUDA."""
    import torch

    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None

"""Make PyTorch behave as if there were a GPU, for fake tensors only.

This changes torch for the whole process, so `plan` runs it in processes of its own. A CPU build of torch has no device
guard for CUDA, and a CUDA build without a GPU has one that asks the driver. Fifty lines of C++, compiled here, register
a guard that answers without a driver.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

_SOURCE = Path(__file__).with_suffix(".cpp")
# Operators that are one kernel in a CUDA build, and are decomposed into several in a CPU build.
_ONE_KERNEL = ("_fused_rms_norm", "_fused_rms_norm_backward", "silu_backward")
_libraries: list[Any] = []
_listeners: list[Callable[[str], None]] = []


def obstacle() -> str | None:
    """Return why there can be no fake GPU here, or None."""
    if not torch.cuda.is_available() and shutil.which(_compiler()[0]) is None:
        return f"torch finds no CUDA, and there is no compiler {_compiler()[0]}: install g++, or set CXX"
    return None


def install(name: str, memory_bytes: int) -> None:
    """Make torch behave as if there were GPUs of this name and memory.

    OSError: the C++ part cannot be compiled.
    """
    # Import first the modules that look for CUDA functions at import: a CPU build does not have these functions.
    import torch._dynamo
    import torch._inductor.config

    if not torch.cuda.is_available():
        ctypes.CDLL(str(_shim()))
    properties = SimpleNamespace(
        name=name, major=9, minor=0, total_memory=memory_bytes, multi_processor_count=132, gcnArchName=""
    )
    _answer(torch.cuda, properties)
    install_without_gpu()
    library = torch.library.Library("aten", "IMPL", "CUDA")
    for operator in _ONE_KERNEL:
        library.impl(operator, _never_run)
    _libraries.append(library)


def install_without_gpu() -> None:
    """Let DeepSpeed and this package work on fake tensors of the CPU."""
    fake_tensor.init_gpu_context = lambda _: None  # type: ignore[assignment]
    FakeTensorMode.avoid_device_init = property(lambda _: True)  # type: ignore[assignment,method-assign]
    # DeepSpeed calls `.to` with the device that the model is on, and fake weights cannot be replaced.
    torch.nn.Module._apply = lambda self, fn, recurse=True: self  # type: ignore[method-assign]
    # `record_stream` refuses our stream objects. `tolist` would read the values of a fake tensor one by one.
    torch.Tensor.record_stream = lambda *_: None  # type: ignore[method-assign]
    FakeTensor.tolist = _tolist  # type: ignore[assignment,method-assign]


def watch(listener: Callable[[str], None]) -> None:
    """Call `listener` with the name of each function by which the host would wait for the device."""
    _listeners[:] = [listener]


def _waited(call: str) -> None:
    for listener in _listeners:
        listener(call)


def _tolist(tensor: torch.Tensor) -> Any:
    """Return zeros of the tensor's shape: a fake tensor has no values."""
    if tensor.device.type == "cuda":
        _waited("tolist")
    return np.zeros(tuple(tensor.shape), np.float64 if tensor.is_floating_point() else np.int64).tolist()


def _answer(cuda: Any, properties: SimpleNamespace) -> None:
    """Replace the functions of torch.cuda that Python code calls."""

    class Event:
        def __init__(self, *_: Any, **__: Any) -> None: ...
        def record(self, *_: Any) -> None: ...
        def wait(self, *_: Any) -> None: ...
        def query(self) -> bool:
            return True

        def synchronize(self) -> None:
            _waited("Event.synchronize")

        def elapsed_time(self, _: Any) -> float:
            return 0.0

    class Stream:
        cuda_stream = 0

        def __init__(self, *_: Any, **__: Any) -> None: ...
        def wait_stream(self, *_: Any) -> None: ...
        def wait_event(self, *_: Any) -> None: ...
        def record_event(self, event: Any = None) -> Any:
            return event or Event()

        def query(self) -> bool:
            return True

        def synchronize(self) -> None:
            _waited("Stream.synchronize")

        def __enter__(self) -> Stream:
            return self

        def __exit__(self, *_: Any) -> None: ...

    stream = Stream()
    answers: dict[str, Any] = {
        "is_available": True,
        "_is_compiled": True,
        "is_initialized": True,
        "device_count": 8,
        "current_device": 0,
        "get_device_capability": (properties.major, properties.minor),
        "get_device_properties": properties,
        "get_device_name": properties.name,
        "is_bf16_supported": True,
        "is_current_stream_capturing": False,
        "current_stream": stream,
        "default_stream": stream,
        **dict.fromkeys(("init", "_lazy_init", "set_device", "empty_cache", "set_rng_state", "manual_seed")),
        **dict.fromkeys(("manual_seed_all", "reset_peak_memory_stats", "reset_max_memory_allocated")),
        **dict.fromkeys(("reset_max_memory_cached", "set_stream")),
        **dict.fromkeys(("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"), 0),
        **dict.fromkeys(("memory_cached", "max_memory_cached"), 0),
    }
    for name, answer in answers.items():
        setattr(cuda, name, lambda *_, _answer=answer, **__: _answer)
    for name in ("range_push", "range_pop", "mark", "range_start", "range_end"):
        setattr(cuda.nvtx, name, lambda *_, **__: 0)
    cuda.get_rng_state = lambda *_: torch.zeros(16, dtype=torch.uint8)
    cuda.synchronize = lambda *_, **__: _waited("torch.cuda.synchronize")
    cuda.Stream, cuda.Event = Stream, Event
    inside: Callable[..., AbstractContextManager[None]] = lambda *_: nullcontext()  # noqa: E731
    cuda.stream = cuda.device = inside


def _never_run(*_: Any, **__: Any) -> None:
    raise AssertionError("tensors of a fake GPU are fake")


def _shim() -> Path:
    """Compile the C++ part, once for each version of torch; return the path of its shared library."""
    key = hashlib.sha256(_SOURCE.read_bytes() + f"{torch.__version__} {torch.__file__}".encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bd3_scale"
    target = folder / f"fake_gpu-{key}.so"
    if not target.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        root = Path(torch.__file__).parent
        with tempfile.TemporaryDirectory(dir=folder) as partial:
            built = Path(partial) / target.name
            _compile(["-I", str(root / "include"), str(_SOURCE), "-o", str(built), "-L", str(root / "lib")])
            built.replace(target)
    return target


def _compile(arguments: list[str]) -> None:
    flags = ["-O1", "-std=c++17", "-w", "-shared", "-fPIC"]
    command = [*_compiler(), *flags, *arguments, "-lc10", "-ltorch_cpu"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = " ".join(done.stderr.split())[:400]
        raise OSError(f"{command[0]} cannot compile {_SOURCE.name} against torch {torch.__version__}: {said}")


def _compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "")) or ["g++"]

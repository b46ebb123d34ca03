"""Call llama.cpp's C API by ctypes, in the library of one pinned wheel: models, passes and quantised rows.

The structures are those of that release's `llama.h`. The API has no stable ABI: a release may insert a field, and every
field behind it would be read at the wrong offset, without an error. So a library of another release is refused, and
also one whose default values are not at the offsets where these structures have them.

Legend: N rows of a pass, W rows whose logits are wanted, V entries of the vocabulary.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, Structure, c_bool, c_char_p, c_float, c_int8, c_int32, c_int64, c_size_t, c_uint32, c_void_p
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

PACKAGE, RELEASE = "xllamacpp", "2026.10.11549"
F32, F16 = 0, 1  # values of `ggml_type`, for caches
MOST_SEQUENCES = 256  # LLAMA_MAX_SEQ of the release
_NON_CAUSAL = 1  # LLAMA_ATTENTION_TYPE_NON_CAUSAL
_FLASH_OFF, _FLASH_AUTO = 0, -1  # LLAMA_FLASH_ATTN_TYPE_*
_ERROR = 4  # GGML_LOG_LEVEL_ERROR
_LOG_LINES = 4  # that are kept for messages


class _Batch(Structure):
    """`llama_batch` of llama.h."""

    _fields_ = (
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", POINTER(c_float)),
        ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)),
        ("seq_id", POINTER(POINTER(c_int32))),
        ("logits", POINTER(c_int8)),
    )


class ModelParams(Structure):
    """`llama_model_params` of llama.h."""

    _fields_ = (
        ("devices", c_void_p),
        ("tensor_buft_overrides", c_void_p),
        ("n_gpu_layers", c_int32),
        ("split_mode", c_int32),
        ("load_mode", c_int32),
        ("lazy_mode", c_int32),
        ("main_gpu", c_int32),
        ("tensor_split", c_void_p),
        ("progress_callback", c_void_p),
        ("progress_callback_user_data", c_void_p),
        ("kv_overrides", c_void_p),
        ("vocab_only", c_bool),
        ("check_tensors", c_bool),
        ("use_extra_bufts", c_bool),
        ("no_host", c_bool),
        ("no_alloc", c_bool),
        ("load_mtp", c_bool),
    )


class ContextParams(Structure):
    """`llama_context_params` of llama.h."""

    _fields_ = (
        ("n_ctx", c_uint32),
        ("n_batch", c_uint32),
        ("n_ubatch", c_uint32),
        ("n_seq_max", c_uint32),
        ("n_rs_seq", c_uint32),
        ("n_outputs_max", c_uint32),
        ("n_outputs_max_per_seq", c_uint32),
        ("n_threads", c_int32),
        ("n_threads_batch", c_int32),
        ("ctx_type", c_int32),
        ("rope_scaling_type", c_int32),
        ("pooling_type", c_int32),
        ("attention_type", c_int32),
        ("flash_attn_type", c_int32),
        ("rope_freq_base", c_float),
        ("rope_freq_scale", c_float),
        ("yarn_ext_factor", c_float),
        ("yarn_attn_factor", c_float),
        ("yarn_beta_fast", c_float),
        ("yarn_beta_slow", c_float),
        ("yarn_orig_ctx", c_uint32),
        ("defrag_thold", c_float),
        ("cb_eval", c_void_p),
        ("cb_eval_user_data", c_void_p),
        ("type_k", c_int32),
        ("type_v", c_int32),
        ("moe_cache_size", c_size_t),
        ("abort_callback", c_void_p),
        ("abort_callback_data", c_void_p),
        ("embeddings", c_bool),
        ("offload_kqv", c_bool),
        ("no_perf", c_bool),
        ("op_offload", c_bool),
        ("swa_full", c_bool),
        ("kv_unified", c_bool),
        ("samplers", c_void_p),
        ("n_samplers", c_size_t),
        ("ctx_other", c_void_p),
    )


# The release's default values: if a field has moved, another value is found at its offset.
DEFAULTS: dict[type[Structure], dict[str, Any]] = {
    ModelParams: {
        "devices": None, "n_gpu_layers": -1, "split_mode": 1, "load_mode": -1, "lazy_mode": 1, "main_gpu": 0,
        "kv_overrides": None, "vocab_only": False, "check_tensors": False, "use_extra_bufts": True, "no_host": False,
    },
    ContextParams: {
        "n_ctx": 512, "n_batch": 2048, "n_ubatch": 512, "n_seq_max": 1, "n_outputs_max": 0, "n_outputs_max_per_seq": 1,
        "pooling_type": -1, "attention_type": -1, "flash_attn_type": -1, "yarn_ext_factor": -1.0, "yarn_orig_ctx": 0,
        "defrag_thold": -1.0, "cb_eval": None, "type_k": F16, "type_v": F16, "embeddings": False, "offload_kqv": True,
        "no_perf": True, "swa_full": True, "kv_unified": False, "n_samplers": 0, "ctx_other": None,
    },
}  # fmt: skip

_Log = ctypes.CFUNCTYPE(None, ctypes.c_int, c_char_p, c_void_p)
_P, _I, _B = c_void_p, c_int32, c_bool
# Name -> return type and argument types. Without them ctypes passes and returns C ints, which cut pointers.
_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "llama_backend_init": (None, []),
    "llama_log_set": (None, [_Log, _P]),
    "llama_model_default_params": (ModelParams, []),
    "llama_context_default_params": (ContextParams, []),
    "llama_model_load_from_file": (_P, [c_char_p, ModelParams]),
    "llama_model_free": (None, [_P]),
    "llama_model_meta_val_str": (_I, [_P, c_char_p, c_char_p, c_size_t]),
    "llama_model_get_vocab": (_P, [_P]),
    "llama_vocab_n_tokens": (_I, [_P]),
    "llama_tokenize": (_I, [_P, c_char_p, _I, POINTER(_I), _I, _B, _B]),
    "llama_init_from_model": (_P, [_P, ContextParams]),
    "llama_free": (None, [_P]),
    "llama_set_causal_attn": (None, [_P, _B]),
    "llama_batch_init": (_Batch, [_I, _I, _I]),
    "llama_batch_free": (None, [_Batch]),
    "llama_decode": (_I, [_P, _Batch]),
    "llama_synchronize": (None, [_P]),
    "llama_get_logits": (POINTER(c_float), [_P]),
    "llama_get_memory": (_P, [_P]),
    "llama_memory_clear": (None, [_P, _B]),
    "llama_memory_seq_rm": (_B, [_P, _I, _I, _I]),
    "llama_memory_seq_cp": (None, [_P, _I, _I, _I, _I]),
    "ggml_quantize_chunk": (c_size_t, [_I, _P, _P, c_int64, c_int64, c_int64, _P]),
}


class _Library:
    """The functions of the wheel's library, and the last errors of its log: functions return NULL or a bare code."""

    def __init__(self, path: Path) -> None:
        loaded = ctypes.CDLL(str(path))
        for name, (result, arguments) in _FUNCTIONS.items():
            function = getattr(loaded, name)
            function.restype, function.argtypes = result, arguments
            setattr(self, name, function)
        self._log: list[str] = []
        self._callback = _Log(self._keep)  # the library calls it as long as it is loaded: it must not be collected
        loaded.llama_log_set(self._callback, None)
        loaded.llama_backend_init()

    def _keep(self, level: int, text: bytes | None, _: Any) -> None:
        if level == _ERROR:
            self._log = [*self._log[1 - _LOG_LINES :], (text or b"").decode(errors="replace").strip()]

    def last_errors(self) -> str:
        """Return the last errors of the log, in one line."""
        return "; ".join(self._log)[-300:]


@cache
def library() -> Any:
    """Return the functions of llama.cpp's library. ValueError: it is not installed, or of another release.

    The wheel's Python module is not imported, only the library in it is loaded.
    """
    way_out = f"pip install 'bd3_scale[gguf]' installs {PACKAGE} {RELEASE}"
    spec = find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise ValueError(f"files for llama.cpp need {PACKAGE}, which is not installed: {way_out}")
    if (installed := metadata.version(PACKAGE)) != RELEASE:
        raise ValueError(f"{PACKAGE} {installed} is installed, and its structures may differ: {way_out}")
    (path,) = Path(spec.origin).parent.glob(f"{PACKAGE}*.so")
    loaded = _Library(path)
    for kind, defaults in DEFAULTS.items():
        name = "llama_model_default_params" if kind is ModelParams else "llama_context_default_params"
        given = getattr(loaded, name)()
        wrong = {field: getattr(given, field) for field in defaults if getattr(given, field) != defaults[field]}
        if wrong:
            raise ValueError(
                f"the installed library of {PACKAGE} {RELEASE} has other defaults than that release ({wrong})"
            )
    return loaded


class Model:
    """A GGUF file that llama.cpp has opened. ValueError: it cannot open it; the message holds its log's errors."""

    def __init__(self, path: Path, *, vocabulary_only: bool = False) -> None:
        self.library = library()
        params = self.library.llama_model_default_params()
        params.n_gpu_layers, params.vocab_only = 0, vocabulary_only
        self.pointer = self.library.llama_model_load_from_file(str(path).encode(), params)
        if not self.pointer:
            raise ValueError(f"llama.cpp cannot open {path}: {self.library.last_errors()}")
        self._vocabulary = self.library.llama_model_get_vocab(self.pointer)
        self.num_tokens = int(self.library.llama_vocab_n_tokens(self._vocabulary))

    def close(self) -> None:
        """Free its memory; its contexts must be closed before."""
        if self.pointer:
            self.library.llama_model_free(self.pointer)
            self.pointer = None

    def metadata(self, key: str) -> str | None:
        """Return the value of a key as text; None if the key is missing or its value is an array."""
        size = self.library.llama_model_meta_val_str(self.pointer, key.encode(), None, 0)
        if size < 0:
            return None
        buffer = ctypes.create_string_buffer(size + 1)
        self.library.llama_model_meta_val_str(self.pointer, key.encode(), buffer, size + 1)
        return buffer.value.decode(errors="replace")

    def tokenize(self, text: str) -> list[int]:
        """Tokenise plain text with llama.cpp's tokeniser, without special tokens."""
        data = text.encode()
        room = len(data) + 8  # a token has at least one byte; some tokenisers put a space before the text
        ids = (c_int32 * room)()
        count = self.library.llama_tokenize(self._vocabulary, data, len(data), ids, room, False, False)
        if count < 0:
            raise ValueError(f"llama.cpp cannot tokenise {text[:60]!r}: it returned {count}")
        return list(ids[:count])


class Context:
    """A key/value cache of a model and passes over it. Rows of a pass see the cache and each other, not causally.

    A row belongs to one or several sequences and sees the rows of one of them; see `generate.llama_model`. All rows of
    a pass go through the layers together (`n_ubatch` equals `n_batch`): in two halves, the first would not see the
    second.

    Args:
        cells: rows that the cache holds. rows: most rows of a pass.
        exact: keys and values in float32 without flash attention; else in float16 with flash attention, which change
            logits by about 0.01 and 0.03.
    """

    def __init__(self, model: Model, *, cells: int, rows: int, sequences: int, threads: int, exact: bool) -> None:
        assert sequences <= MOST_SEQUENCES
        self._library, self._vocabulary_size, self._rows = model.library, model.num_tokens, rows
        params = self._library.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = cells, rows, rows, sequences
        params.n_threads = params.n_threads_batch = threads
        params.attention_type, params.kv_unified = _NON_CAUSAL, True
        params.type_k = params.type_v = F32 if exact else F16
        params.flash_attn_type = _FLASH_OFF if exact else _FLASH_AUTO
        self._pointer = self._library.llama_init_from_model(model.pointer, params)
        if not self._pointer:
            raise ValueError(f"llama.cpp cannot allocate a cache of {cells} tokens: {self._library.last_errors()}")
        self._library.llama_set_causal_attn(self._pointer, False)
        self._memory = self._library.llama_get_memory(self._pointer)
        self._batch = self._library.llama_batch_init(rows, 0, sequences)

    def close(self) -> None:
        """Free its memory."""
        if self._pointer:
            self._library.llama_batch_free(self._batch)
            self._library.llama_free(self._pointer)
            self._pointer = None

    def decode(
        self,
        tokens: Sequence[int],
        positions: Sequence[int],
        sequences: Sequence[Sequence[int]],
        wanted: Sequence[bool],
    ) -> NDArray[np.float32]:
        """Write N rows into the cache and return the logits of the wanted ones, float32 [W, V], a copy.

        ValueError: llama.cpp refuses the pass, for instance because the cache is full.
        """
        batch, count = self._batch, len(tokens)
        assert 0 < count <= self._rows, (count, self._rows)
        batch.n_tokens = count
        for row, (token, position, row_sequences, want) in enumerate(
            zip(tokens, positions, sequences, wanted, strict=True)
        ):
            batch.token[row], batch.pos[row], batch.logits[row] = token, position, want
            batch.n_seq_id[row] = len(row_sequences)
            for index, sequence in enumerate(row_sequences):
                batch.seq_id[row][index] = sequence
        if (code := self._library.llama_decode(self._pointer, batch)) != 0:
            raise ValueError(f"llama.cpp refuses a pass of {count} rows ({code}): {self._library.last_errors()}")
        outputs = sum(map(bool, wanted))
        if not outputs:
            self._library.llama_synchronize(self._pointer)
            return np.empty((0, self._vocabulary_size), dtype=np.float32)
        logits = self._library.llama_get_logits(self._pointer)  # waits for the pass; the next pass overwrites them
        return cast(NDArray[np.float32], np.ctypeslib.as_array(logits, (outputs, self._vocabulary_size)).copy())

    def remove(self, sequence: int, start: int = -1, end: int = -1) -> None:
        """Remove a sequence's rows at positions [start, end); −1: from the beginning, or to the end."""
        if not self._library.llama_memory_seq_rm(self._memory, sequence, start, end):
            raise ValueError(f"llama.cpp cannot remove positions {start} to {end} from its cache")

    def copy(self, source: int, to: int, start: int = -1) -> None:
        """Add the rows of sequence `source` from position `start` on to sequence `to`. No keys or values are copied:
        the cells of a unified cache only get another sequence id.
        """
        self._library.llama_memory_seq_cp(self._memory, source, to, start, -1)

    def clear(self) -> None:
        """Empty the cache."""
        self._library.llama_memory_clear(self._memory, True)


def quantized_rows(
    kind: int, rows: NDArray[np.float32], row_bytes: int, importance: NDArray[np.float32] | None = None
) -> NDArray[np.uint8]:
    """Quantise rows with ggml; returns uint8 [R, row_bytes].

    Args:
        kind: a value of `ggml_type`, whose block size divides a row. rows: float32 [R, columns], contiguous.
        importance: float32 [columns], mean squares of the activations that the columns are multiplied with.
    """
    assert rows.dtype == np.float32
    assert rows.flags.c_contiguous
    out = np.zeros((len(rows), row_bytes), dtype=np.uint8)
    weights = None if importance is None else np.ascontiguousarray(importance, dtype=np.float32)
    written = library().ggml_quantize_chunk(
        kind, rows.ctypes.data, out.ctypes.data, 0, *rows.shape, None if weights is None else weights.ctypes.data
    )
    assert written == out.nbytes, (written, out.nbytes)
    return out

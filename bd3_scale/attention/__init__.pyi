from bd3_scale.attention.backends import Backend as Backend
from bd3_scale.attention.backends import KernelBackend as KernelBackend
from bd3_scale.attention.backends import choose_backend as choose_backend
from bd3_scale.attention.dispatch import block_attention as block_attention
from bd3_scale.attention.dispatch import decode_attention as decode_attention
from bd3_scale.attention.spans import make_spans as make_spans
from bd3_scale.attention.spans import take_ranges as take_ranges

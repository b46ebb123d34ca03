"""The products of a layer, split over tensor-parallel ranks, with a backward of our own; and laid out for decoding.

megatron-core's linears hold, place and save the weights. What they compute is here: a rank's rows or sums travel in
pieces beside the product of the next piece, a weight's gradient is added to its fp32 sum by the product itself, and
an activation's output is made again in backward instead of kept.

Legend: N rows of all ranks, n of this one (all of them without sequence parallelism), in pieces, see `exchange`;
B sequences.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.tensor_parallel import layers
from torch import Tensor
from torch.distributed import ProcessGroup

from bd3_scale.model.exchange import Gather, Reduction
from bd3_scale.model.products import (
    add_weight_gradient,
    few_rows_by_onednn,
    input_gradient,
    product,
    product_into,
    weight_gradient,
)

# What oneDNN calls the activations that it applies to a product it still has in registers.
_FUSED = {"gelu": ("gelu", "none"), "gelu_tanh": ("gelu", "tanh")}


class Activation(NamedTuple):
    """A function of each row.

    Attributes:
        backward: from the gradient of its output, and its input: the gradient of the input, and the output again.
    """

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class _How(NamedTuple):
    """How a product is split over the ranks of `group`, where there are several.

    Attributes:
        sequence: ranks have their rows of what is not split by features; otherwise all rows.
        pieces: in which rows travel.
        activation: of the input, before the product.
    """

    group: ProcessGroup
    sequence: bool
    pieces: int
    activation: Activation | None = None

    @property
    def is_split(self) -> bool:
        return self.group.size() > 1

    def activate(self, x: Tensor) -> Tensor:
        return x if self.activation is None else self.activation.forward(x)

    def activate_backward(self, gradient: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradient of x, and what it was made of."""
        return (gradient, x) if self.activation is None else self.activation.backward(gradient, x)


class ColumnLinear(layers.ColumnParallelLinear):
    """x ↦ x Wᵀ + b, of whose features each tensor-parallel rank makes its share.

    x is whole on every rank; under sequence parallelism a rank has its rows, and makes its features of all.
    """

    weight: Tensor
    tp_group: ProcessGroup

    def __init__(
        self, inputs: int, outputs: int, *, bias: bool, config: ModelParallelConfig, group: ProcessGroup
    ) -> None:
        super().__init__(inputs, outputs, config=config, init_method=None, bias=bias, tp_group=group)

    def forward(self, x: Tensor, pieces: int = 1, *, select: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Return [N, B, outputs of the rank] for x [n, B, inputs].

        select: rows of weight and bias to use.
        """
        weight, bias = self.weight, self.bias
        if select is not None:
            weight, bias = select(weight), None if bias is None else select(bias)
        return _apply(_Column, x, weight, bias, _How(self.tp_group, self.sequence_parallel, pieces))

    def for_decoding(self, activation: str | None = None) -> Callable[..., Tensor]:
        """Return `forward` with the weights of now, and activation(·) of it; see `packed`."""
        return packed(self.weight, self.bias, activation)


class RowLinear(layers.RowParallelLinear):
    """x ↦ x Wᵀ + b, summed over tensor-parallel ranks, each of which has its share of the features of x.

    Under sequence parallelism a rank keeps its rows of the sum.
    """

    weight: Tensor
    tp_group: ProcessGroup

    def __init__(
        self, inputs: int, outputs: int, *, bias: bool, config: ModelParallelConfig, group: ProcessGroup
    ) -> None:
        how = {"input_is_parallel": True, "skip_bias_add": False, "tp_group": group}
        super().__init__(inputs, outputs, config=config, init_method=None, bias=bias, **how)

    def forward(self, x: Tensor, pieces: int = 1, *, activation: Activation | None = None) -> Tensor:
        """Return [n, B, outputs] for x [N, B, inputs of the rank].

        activation: of x before the product; backward makes its output again instead of keeping it.
        """
        how = _How(self.tp_group, self.sequence_parallel, pieces, activation)
        if not how.is_split:
            return _apply(_Column, x, self.weight, self.bias, how)
        out = _apply(_Row, x, self.weight, None, how)
        return out if self.bias is None else out + self.bias

    def for_decoding(self) -> Callable[..., Tensor]:
        """Return `forward` with the weights of now; see `packed`."""
        if self.tp_group.size() == 1:
            return packed(self.weight, self.bias)
        product, bias, group = packed(self.weight, None), self.bias, self.tp_group

        def summed(x: Tensor, *_: Any, **__: Any) -> Tensor:
            out = product(x)
            dist.all_reduce(out, group=group)
            return out if bias is None else out + bias

        return summed


def _apply(kind: type[_Column] | type[_Row], x: Tensor, weight: Tensor, bias: Tensor | None, how: _How) -> Tensor:
    if not torch.is_grad_enabled():
        return kind.product(x, weight, bias, how)
    found: Tensor = kind.apply(x, weight, bias, how)
    return found


class _Product(torch.autograd.Function):
    """What both kinds keep, and the gradients of weight and bias."""

    @staticmethod
    def keep(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, how: _How) -> None:
        ctx.how, ctx.with_bias = how, bias is not None
        # The sum of gradients is no part of the graph, and changes while that is there.
        ctx.total = getattr(weight, "main_grad", None)
        ctx.save_for_backward(x, weight)

    @staticmethod
    def parameter_gradients(ctx: Any, gradient: Tensor, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return the gradients of weight and bias, of gradients and inputs of all rows; None for a weight whose sum
        they were added to.
        """
        gradient, x = gradient.flatten(0, -2), x.flatten(0, -2)
        grad_weight = grad_bias = None
        if ctx.needs_input_grad[1]:
            if ctx.total is None:
                grad_weight = weight_gradient(gradient, x)
            else:
                add_weight_gradient(ctx.total, gradient, x)
        if ctx.with_bias and ctx.needs_input_grad[2]:
            grad_bias = gradient.sum(0)
        return grad_weight, grad_bias


class _Column(_Product):
    """Features are split, where there are ranks to split them over."""

    @staticmethod
    def product(x: Tensor, weight: Tensor, bias: Tensor | None, how: _How) -> Tensor:
        if not (how.is_split and how.sequence):
            return product(how.activate(x).flatten(0, -2), weight, bias).unflatten(0, x.shape[:-1])
        gather = Gather(x, how.pieces, how.group)
        out = x.new_empty((len(x) * how.group.size(), *x.shape[1:-1], len(weight)))
        gather.begin(0)
        for index, piece in enumerate(out.unflatten(0, (how.pieces, -1))):
            arrived = gather.piece(index)
            gather.begin(index + 1)
            _into(piece, arrived, weight, bias)
        return out

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, how: _How) -> Tensor:
        _Product.keep(ctx, x, weight, bias, how)
        return _Column.product(x, weight, bias, how)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        how: _How = ctx.how
        gradient = gradient.contiguous()
        x, weight = ctx.saved_tensors
        if not how.is_split:
            grad_x = None
            if ctx.needs_input_grad[0]:
                grad_x, x = how.activate_backward(_input_gradient(gradient, weight), x)
            else:
                x = how.activate(x)
            return grad_x, *_Product.parameter_gradients(ctx, gradient, x), None
        gather = Gather(x, how.pieces, how.group) if how.sequence else None
        if gather is not None:
            gather.begin_all()
        # Whole: rows arrive beside the one product, and gradients leave beside the other.
        grad_rows = _input_gradient(gradient, weight)
        x = x if gather is None else gather.rows()
        reduction = Reduction(grad_rows, how.pieces, how.group, scattered=how.sequence)
        reduction.add_all()
        of_parameters = _Product.parameter_gradients(ctx, gradient, x)
        return reduction.result(), *of_parameters, None


class _Row(_Product):
    """Features of the input are split, and the product summed over ranks."""

    @staticmethod
    def product(x: Tensor, weight: Tensor, bias: Tensor | None, how: _How) -> Tensor:
        assert bias is None, "it is added to the sum, once"
        out = x.new_empty((*x.shape[:-1], len(weight)))
        reduction = Reduction(out, how.pieces, how.group, scattered=how.sequence)
        x = how.activate(x)
        for index, piece in enumerate(x.unflatten(0, (how.pieces, -1))):
            _into(reduction.piece(index), piece, weight)
            reduction.add(index)
        return reduction.result()

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, how: _How) -> Tensor:
        _Product.keep(ctx, x, weight, bias, how)
        return _Row.product(x, weight, bias, how)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        how: _How = ctx.how
        x, weight = ctx.saved_tensors
        if not how.sequence:
            grad_x, x = how.activate_backward(_input_gradient(gradient, weight), x)
            return grad_x, *_Product.parameter_gradients(ctx, gradient, x), None
        gather = Gather(gradient, how.pieces, how.group)
        gather.begin(0)
        grad_x = x.new_empty((*x.shape[:-1], weight.shape[1]))
        for index, piece in enumerate(grad_x.unflatten(0, (how.pieces, -1))):
            arrived = gather.piece(index)
            gather.begin(index + 1)
            _into(piece, arrived, weight.t())
        grad_x, x = how.activate_backward(grad_x, x)
        return grad_x, *_Product.parameter_gradients(ctx, gather.rows(), x), None


def _input_gradient(gradient: Tensor, weight: Tensor) -> Tensor:
    return input_gradient(gradient.flatten(0, -2), weight).unflatten(0, gradient.shape[:-1])


def _into(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    product_into(out.flatten(0, -2), x.flatten(0, -2), weight, bias)


def packed(weight: Tensor, bias: Tensor | None, activation: str | None = None) -> Callable[..., Tensor]:
    """Return x ↦ activation(x Wᵀ + b) for few rows and without gradients, as long as the weights do not change.

    On CPU the weight is laid out once: for oneDNN, whose product of few rows takes half as long as torch's own, which
    lays it out at each call (bf16), or takes a library that is slow on AMD (fp32); small fp32 ones where MKL
    multiplies, inputs by outputs, see `few_rows_by_onednn`.

    activation: None, or one of a linear that `fuses` it.
    """
    if not _onednn_takes(weight):
        assert activation is None
        if weight.device.type != "cpu" or weight.dtype != torch.float32:
            return lambda x, *_, **__: F.linear(x, weight, bias)
        columns, constant = weight.detach().t().contiguous(), bias
        return (
            (lambda x, *_, **__: x @ columns)
            if constant is None
            else (lambda x, *_, **__: (x @ columns).add_(constant))
        )
    laid_out = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)
    name, algorithm = _FUSED[activation] if activation else ("none", "")
    product = torch.ops.mkldnn._linear_pointwise.default
    return lambda x, *_, **__: product(x, laid_out, bias, name, [], algorithm)


def fuses(activation: str, linear: ColumnLinear) -> bool:
    """Return whether decoding can apply this activation of a recipe along with the linear's product."""
    return type(linear) is ColumnLinear and activation in _FUSED and _onednn_takes(linear.weight)


def _onednn_takes(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32 and few_rows_by_onednn(weight)

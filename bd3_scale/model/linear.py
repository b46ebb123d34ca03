"""Compute the matrix products of a layer, split over tensor-parallel ranks (Megatron-LM: Shoeybi et al., 2019).

A `ColumnLinear` splits its output features over ranks, and the `RowLinear` after it its input features: the pair needs
one sum over ranks. megatron-core's linears hold, place and save the weights. The computation is our own, because of
three things that theirs do not do:

- pieces of rows are sent while the product of the next piece is computed;
- the product itself adds a weight's gradient to its fp32 sum;
- an activation's output is computed again in backward instead of kept.

`packed` lays weights out for decoding.

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

# oneDNN's names of the activations that it applies to a product while that is in registers.
_FUSED = {"gelu": ("gelu", "none"), "gelu_tanh": ("gelu", "tanh")}


class Activation(NamedTuple):
    """A function of each row.

    Attributes:
        backward: maps the output's gradient, and the input, to the input's gradient, and the output once more.
    """

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class _Split(NamedTuple):
    """The split of a product over the ranks of `group`.

    Attributes:
        sequence: whether tensors that are not split by features are split by rows (sequence parallelism).
        pieces: the number of pieces in which rows are exchanged.
        activation: applied to the input before the product.
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
        """Return the gradient of x, and the input of the product."""
        return (gradient, x) if self.activation is None else self.activation.backward(gradient, x)


class ColumnLinear(layers.ColumnParallelLinear):
    """x ↦ x Wᵀ + b; each tensor-parallel rank computes its share of the output features.

    x is whole on every rank. Under sequence parallelism a rank has its part of the rows, and they are gathered.
    """

    weight: Tensor
    tp_group: ProcessGroup

    def __init__(
        self, inputs: int, outputs: int, *, bias: bool, config: ModelParallelConfig, group: ProcessGroup
    ) -> None:
        super().__init__(inputs, outputs, config=config, init_method=None, bias=bias, tp_group=group)

    def forward(self, x: Tensor, pieces: int = 1, *, select: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Return [N, B, outputs of the rank] for x [n, B, inputs].

        select: takes the rows of weight and bias to use.
        """
        weight, bias = self.weight, self.bias
        if select is not None:
            weight, bias = select(weight), None if bias is None else select(bias)
        return _apply(_Column, x, weight, bias, _Split(self.tp_group, self.sequence_parallel, pieces))

    def for_decoding(self, activation: str | None = None) -> Callable[..., Tensor]:
        """Return `forward`, followed by the activation, with the present weights; see `packed`."""
        return packed(self.weight, self.bias, activation)


class RowLinear(layers.RowParallelLinear):
    """x ↦ x Wᵀ + b, summed over tensor-parallel ranks; each has its share of the features of x.

    Under sequence parallelism a rank keeps its part of the rows of the sum.
    """

    weight: Tensor
    tp_group: ProcessGroup

    def __init__(
        self, inputs: int, outputs: int, *, bias: bool, config: ModelParallelConfig, group: ProcessGroup
    ) -> None:
        options = {"input_is_parallel": True, "skip_bias_add": False, "tp_group": group}
        super().__init__(inputs, outputs, config=config, init_method=None, bias=bias, **options)

    def forward(self, x: Tensor, pieces: int = 1, *, activation: Activation | None = None) -> Tensor:
        """Return [n, B, outputs] for x [N, B, inputs of the rank].

        activation: applied to x before the product; backward computes its output again instead of keeping it.
        """
        split = _Split(self.tp_group, self.sequence_parallel, pieces, activation)
        if not split.is_split:
            return _apply(_Column, x, self.weight, self.bias, split)
        out = _apply(_Row, x, self.weight, None, split)
        return out if self.bias is None else out + self.bias

    def for_decoding(self) -> Callable[..., Tensor]:
        """Return `forward` with the present weights; see `packed`."""
        if self.tp_group.size() == 1:
            return packed(self.weight, self.bias)
        product, bias, group = packed(self.weight, None), self.bias, self.tp_group

        def summed(x: Tensor, *_: Any, **__: Any) -> Tensor:
            out = product(x)
            dist.all_reduce(out, group=group)
            return out if bias is None else out + bias

        return summed


def _apply(kind: type[_Column] | type[_Row], x: Tensor, weight: Tensor, bias: Tensor | None, split: _Split) -> Tensor:
    if not torch.is_grad_enabled():
        return kind.product(x, weight, bias, split)
    out: Tensor = kind.apply(x, weight, bias, split)
    return out


class _Product(torch.autograd.Function):
    """The common part of `_Column` and `_Row`: the saved tensors, and the gradients of weight and bias."""

    @staticmethod
    def keep(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, split: _Split) -> None:
        ctx.split, ctx.with_bias = split, bias is not None
        # Not through `save_for_backward`: other micro-batches add to it before this backward runs, and autograd refuses
        # a saved tensor that has changed.
        ctx.total = getattr(weight, "main_grad", None)
        ctx.save_for_backward(x, weight)

    @staticmethod
    def parameter_gradients(ctx: Any, gradient: Tensor, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return the gradients of weight and bias, from the gradients and inputs of all rows.

        The weight's is None where it was added to the weight's sum of gradients.
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
    """A product whose output features are split over ranks, or that is whole where there is one rank."""

    @staticmethod
    def product(x: Tensor, weight: Tensor, bias: Tensor | None, split: _Split) -> Tensor:
        if not (split.is_split and split.sequence):
            return product(split.activate(x).flatten(0, -2), weight, bias).unflatten(0, x.shape[:-1])
        gather = Gather(x, split.pieces, split.group)
        out = x.new_empty((len(x) * split.group.size(), *x.shape[1:-1], len(weight)))
        gather.begin(0)
        for index, piece in enumerate(out.unflatten(0, (split.pieces, -1))):
            arrived = gather.piece(index)
            # One piece is sent while the one before is computed. Starting all at once would let the gathers take the
            # GPU's multiprocessors and memory bandwidth from the first product.
            gather.begin(index + 1)
            _into(piece, arrived, weight, bias)
        return out

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, split: _Split) -> Tensor:
        _Product.keep(ctx, x, weight, bias, split)
        return _Column.product(x, weight, bias, split)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        split: _Split = ctx.split
        gradient = gradient.contiguous()
        x, weight = ctx.saved_tensors
        if not split.is_split:
            grad_x = None
            if ctx.needs_input_grad[0]:
                grad_x, x = split.activate_backward(_input_gradient(gradient, weight), x)
            else:
                x = split.activate(x)
            return grad_x, *_Product.parameter_gradients(ctx, gradient, x), None
        gather = Gather(x, split.pieces, split.group) if split.sequence else None
        if gather is not None:
            gather.begin_all()
        # Not by pieces: the rows arrive during the product for grad_x, and its sum is sent during that for the weight.
        grad_rows = _input_gradient(gradient, weight)
        x = x if gather is None else gather.rows()
        reduction = Reduction(grad_rows, split.pieces, split.group, scattered=split.sequence)
        reduction.add_all()
        of_parameters = _Product.parameter_gradients(ctx, gradient, x)
        return reduction.result(), *of_parameters, None


class _Row(_Product):
    """A product whose input features are split over ranks, and whose result is summed over them."""

    @staticmethod
    def product(x: Tensor, weight: Tensor, bias: Tensor | None, split: _Split) -> Tensor:
        assert bias is None, "it is added once, to the sum over ranks"
        out = x.new_empty((*x.shape[:-1], len(weight)))
        reduction = Reduction(out, split.pieces, split.group, scattered=split.sequence)
        x = split.activate(x)
        for index, piece in enumerate(x.unflatten(0, (split.pieces, -1))):
            _into(reduction.piece(index), piece, weight)
            reduction.add(index)
        return reduction.result()

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, split: _Split) -> Tensor:
        _Product.keep(ctx, x, weight, bias, split)
        return _Row.product(x, weight, bias, split)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        split: _Split = ctx.split
        x, weight = ctx.saved_tensors
        if not split.sequence:
            grad_x, x = split.activate_backward(_input_gradient(gradient, weight), x)
            return grad_x, *_Product.parameter_gradients(ctx, gradient, x), None
        gather = Gather(gradient, split.pieces, split.group)
        gather.begin(0)
        grad_x = x.new_empty((*x.shape[:-1], weight.shape[1]))
        for index, piece in enumerate(grad_x.unflatten(0, (split.pieces, -1))):
            arrived = gather.piece(index)
            gather.begin(index + 1)
            _into(piece, arrived, weight.t())
        grad_x, x = split.activate_backward(grad_x, x)
        return grad_x, *_Product.parameter_gradients(ctx, gather.rows(), x), None


def _input_gradient(gradient: Tensor, weight: Tensor) -> Tensor:
    return input_gradient(gradient.flatten(0, -2), weight).unflatten(0, gradient.shape[:-1])


def _into(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    product_into(out.flatten(0, -2), x.flatten(0, -2), weight, bias)


def packed(weight: Tensor, bias: Tensor | None, activation: str | None = None) -> Callable[..., Tensor]:
    """Return x ↦ activation(x Wᵀ + b) for few rows, without gradients; it is valid while the weights do not change.

    On CPU the weight is laid out once, in oneDNN's own format. Its product of few rows then takes half as long as
    torch's, which lays a bf16 weight out at each call and takes a library that is slow on AMD for fp32. Small fp32
    weights on CPUs where MKL multiplies are transposed instead, see `few_rows_by_onednn`.

    activation: None, or the activation of a linear that `fuses` it.
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
    """Say whether decoding can apply this activation in the same kernel as the linear's product."""
    return type(linear) is ColumnLinear and activation in _FUSED and _onednn_takes(linear.weight)


def _onednn_takes(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32 and few_rows_by_onednn(weight)

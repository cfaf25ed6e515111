"""Products of a block of queries with keys, f of them weighed by lag: in torch, or in one pass by the compiled core.

Torch weighs rows in reverse, for which the weights are a view of the reversed filter; the core takes them in order.

Shapes: as in `masked`.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from operators.convolution.causal import compute_dtype


def block_order(core: bool) -> Callable[[Tensor], Tensor]:
    """What puts positions, the last axis, into the order of a block's rows, and back."""
    return torch.Tensor.contiguous if core else _flip


def weigh(products_BHRS: Tensor, h_HS: Tensor, degree: int | None, core: bool) -> Tensor:
    """f of the products of the last R of S positions times h by lag, 0 for keys behind their query; overwrites."""
    if core:
        torch.ops.layerswap.weigh(products_BHRS, h_HS.float().flip(-1), degree or 0)
        return products_BHRS
    h_HS = h_HS.to(products_BHRS.dtype) if degree is None else h_HS
    scores_BHRS = _f_of(products_BHRS, degree)
    scores_BHRS *= lag_weights(h_HS, products_BHRS.shape[-2])
    return scores_BHRS.to(products_BHRS.dtype)


def weigh_backward(
    products_BHRS: Tensor, grad_BHRS: Tensor, h_HS: Tensor, degree: int | None, core: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """What `weigh` gives, and from the gradient of that the gradients of the products and of h; overwrites both."""
    dtype, rows = products_BHRS.dtype, products_BHRS.shape[-2]
    if core:
        reversed_HS = h_HS.float().flip(-1)
        dreversed_HS = torch.zeros_like(reversed_HS)
        torch.ops.layerswap.weigh_backward(products_BHRS, grad_BHRS, reversed_HS, dreversed_HS, degree or 0)
        return products_BHRS, grad_BHRS, dreversed_HS.flip(-1)
    weights_HRS = lag_weights(h_HS.to(dtype) if degree is None else h_HS, rows)
    scores_BHRS, slope_BHRS = _f_and_slope(products_BHRS, degree)
    grad_BHRS = grad_BHRS.to(scores_BHRS.dtype)
    dh_HS = lag_sums(_over_batch(grad_BHRS * scores_BHRS))
    scores_BHRS *= weights_HRS
    grad_BHRS *= weights_HRS
    if slope_BHRS is not None:
        grad_BHRS *= slope_BHRS
    return scores_BHRS.to(dtype), grad_BHRS.to(dtype), dh_HS


def lag_weights(h_HS: Tensor, rows: int) -> Tensor:
    """Weights (H, R, S) of the last R rows over S keys, rows in reverse: a unit-stride view of h reversed."""
    padded = torch.nn.functional.pad(h_HS.flip(-1), (0, rows - 1))
    return padded.unfold(-1, h_HS.shape[-1], 1)


def lag_sums(dweights_HRS: Tensor) -> Tensor:
    """Adjoint of `lag_weights`: sums (H, S) over equal lags, by writing row r shifted by r places."""
    heads, rows, keys = dweights_HRS.shape
    width = keys + rows - 1
    skewed = dweights_HRS.new_zeros(heads, rows, width)
    skewed.as_strided((heads, rows, keys), (rows * width, width + 1, 1)).copy_(dweights_HRS)
    return skewed.sum(1, dtype=compute_dtype(skewed.dtype))[:, :keys].flip(-1)


def power(base: Tensor, degree: int) -> Tensor:
    """base^degree, a power of two, in its place."""
    for _ in range(degree.bit_length() - 1):
        base *= base
    return base


def _flip(x: Tensor) -> Tensor:
    """Time reversed; as integers, for torch is slow at it in bfloat16."""
    return x.view(torch.int16).flip(-1).view(x.dtype) if x.dtype == torch.bfloat16 else x.flip(-1)


def _over_batch(x_BHRS: Tensor) -> Tensor:
    return x_BHRS[0] if x_BHRS.shape[0] == 1 else x_BHRS.sum(0)  # which a sum of one is slow at


def _base(products: Tensor, degree: int) -> Tensor:
    return products.to(compute_dtype(products.dtype)).mul_(1 / degree).add_(1.0)


def _f_of(products: Tensor, degree: int | None) -> Tensor:
    """f of products, in their place; powers at least in float32."""
    return products if degree is None else power(_base(products, degree), degree)


def _f_and_slope(products: Tensor, degree: int | None) -> tuple[Tensor, Tensor | None]:
    """f of products and its derivative, None where that is 1."""
    if degree is None:
        return products, None
    base = _base(products, degree)
    slope, square = base.clone(), base
    for _ in range(degree.bit_length() - 2):
        square = square.square()
        slope *= square
    return slope * base, slope

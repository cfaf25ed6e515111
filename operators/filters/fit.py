"""Any long filter as nearly a sum of decaying exponentials, so that it can decode from a constant state too.

The poles are those of a matrix pencil (Hua and Sarkar 1990): the Hankel matrices h(i + j) and h(i + j + 1) of a sum of
r exponentials have rank r and differ by the poles alone. Rows i and columns j are a few hundred lags, dense near 0 and
log-spaced beyond, so the cost hardly depends on the length. The residues are least squares over all lags.

Shapes: C filters, L lags, S modes, R rank, I rows and J columns of the Hankel matrices.
"""

import torch
from torch import Tensor

from operators.decoding.recurrence import first_lags
from operators.filters.modes import Modes

ROWS, COLUMNS = 512, 128
SLOWEST = 1e-3  # decay over all L lags
SMALLEST_POLE = 1e-8  # the logarithm of 0 is not finite
REAL = 1e-9  # imaginary part of a pole that counts as real


def fit_modes(h_CL: Tensor, modes: int) -> tuple[Modes, Tensor]:
    """Modes whose sums are near to filters, and how near.

    Smooth filters are met to a few digits with 8 to 16 modes; rough ones, and those that do not decay, are not.

    Args:
        h_CL: filters, L >= 1.
        modes: exponentials of a filter, complex: a pair of conjugate ones is one of them.

    Returns:
        Modes (C, S), complex64 or, for float64 filters, complex128; and the relative error of every filter, (C,)
        float64: the norm of the difference over the norm, over all L lags.
    """
    exact_CL = h_CL.detach().double().cpu()
    poles_CS = _poles(exact_CL, modes)
    log_poles_CS = torch.where(poles_CS.abs() < SMALLEST_POLE, SMALLEST_POLE, poles_CS).log()
    slowest = -SLOWEST / exact_CL.shape[1]
    log_poles_CS = torch.complex(log_poles_CS.real.clamp(max=slowest), log_poles_CS.imag)
    residues_CS = _residues(exact_CL, log_poles_CS)
    precision = torch.complex128 if h_CL.dtype == torch.float64 else torch.complex64
    found = Modes(log_poles_CS.to(precision), residues_CS.to(precision))
    wide = Modes(found.log_poles_CS.to(torch.complex128), found.residues_CS.to(torch.complex128))
    missed_CL = first_lags(wide, exact_CL.shape[1]) - exact_CL
    error_C = missed_CL.norm(dim=1) / exact_CL.norm(dim=1).clamp_min(torch.finfo(torch.float64).tiny)
    return Modes(found.log_poles_CS.to(h_CL.device), found.residues_CS.to(h_CL.device)), error_C


def _poles(h_CL: Tensor, modes: int) -> Tensor:
    """Poles (C, S) of the highest rank that gives no more than S of them, conjugates not counted; 0 fills up."""
    half = max(1, h_CL.shape[1] // 2)
    padded = torch.nn.functional.pad(h_CL, (0, max(0, 2 - h_CL.shape[1])))
    lags_IJ = _lags(half, ROWS)[:, None] + _lags(half, COLUMNS)
    u_CIR, sigma_CR, v_CRJ = torch.linalg.svd(padded[:, lags_IJ], full_matrices=False)
    shifted_CRR = u_CIR.transpose(1, 2) @ padded[:, lags_IJ + 1] @ v_CRJ.transpose(1, 2)
    smallest_C1 = sigma_CR[:, :1] * torch.finfo(sigma_CR.dtype).eps + torch.finfo(sigma_CR.dtype).tiny
    shifted_CRR /= sigma_CR.maximum(smallest_C1)[:, None]
    poles_CS = h_CL.new_zeros((len(h_CL), modes), dtype=torch.complex128)
    ranks = sigma_CR.shape[1]
    for rank in range(min(modes, ranks), min(2 * modes, ranks) + 1):
        found_CR = torch.linalg.eigvals(shifted_CRR[:, :rank, :rank].contiguous())
        upper_CR = found_CR.imag > -REAL
        first_CR = upper_CR.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
        kept_CR = (found_CR * upper_CR).gather(1, first_CR)[:, :modes]
        kept_CS = torch.nn.functional.pad(kept_CR, (0, modes - kept_CR.shape[1]))
        poles_CS = torch.where(upper_CR.sum(1, keepdim=True) <= modes, kept_CS, poles_CS)
    return poles_CS


def _lags(count: int, most: int) -> Tensor:
    """At most `most` of the first `count` lags: the first ones, and log-spaced ones."""
    if count <= most:
        return torch.arange(count)
    spaced = torch.logspace(0, torch.tensor(count - 1.0).log10().item(), most // 2, dtype=torch.float64)
    chosen: Tensor = torch.cat([torch.arange(most // 2), spaced.round().long().clamp(max=count - 1)]).unique()
    return chosen


def _residues(h_CL: Tensor, log_poles_CS: Tensor) -> Tensor:
    """Least squares over all lags, one filter at a time: the matrices are large."""
    lags_L = torch.arange(h_CL.shape[1], dtype=torch.float64)
    residues = []
    for h_L, log_poles_S in zip(h_CL, log_poles_CS, strict=True):
        values_LS = torch.exp(lags_L[:, None] * log_poles_S)
        parts_LS = torch.cat([values_LS.real, -values_LS.imag], dim=1)
        solved = torch.linalg.lstsq(parts_LS, h_L[:, None], driver="gelsd").solution[:, 0]
        residues.append(torch.complex(*solved.chunk(2)))
    return torch.stack(residues)

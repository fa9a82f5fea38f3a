"""What a layer's factors are compared with: the same at every size, so found once.

Plain SVD leaves D = sum over i >= r of u_i (s_i v_i)^T, so its errors at all ranks are tail sums of
one matrix: tr(F D G D^T) = sum over i, j >= r of (U^T F U)_ij (S V^T G V S)_ij. The second factor
is W G W^T in a basis of W's range, so its eigenvalues are those of the least output error.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lrc_cli.engine.linalg import eigenvalues
from lrc_cli.engine.problem import Errors, Metric, Statistics
from lrc_cli.engine.svd import svd_directions


class References(NamedTuple):
    """By rank, all float64."""

    output_spectrum: Tensor
    """(k,): [r:].sum() is the least plain output error of rank r."""
    svd_metric: Tensor
    """(j + 1,): Errors.metric of plain SVD of rank r, for r up to the numerical rank j."""
    svd_output: Tensor
    """(j + 1,): Errors.output of it."""

    def svd_errors(self, rank: int) -> Errors:
        """The errors of plain SVD of a rank."""
        rank = min(rank, len(self.svd_metric) - 1)
        return Errors(self.svd_metric[rank].item(), self.svd_output[rank].item())


def find_references(
    weight: Tensor, statistics: Statistics, metric: Metric, output_spectrum: Tensor | None = None
) -> References:
    """The references of a problem with weight W (m, n) on inputs of a Gram matrix.

    Args:
        output_spectrum: (k,), where it is known already.

    Raises:
        SolveError: an eigenproblem did not converge.
    """
    u, rows = svd_directions(weight)
    weighted = metric.times_gram(rows)
    if output_spectrum is not None and metric.fisher is None:  # the u_i are orthonormal
        form = plain = _tail_sums(torch.sum(weighted * rows, dim=1))
        return References(output_spectrum, metric.scale * form, plain)
    outputs = weighted @ rows.T
    if output_spectrum is None:
        output_spectrum = torch.zeros(min(weight.shape)).to(outputs)
        output_spectrum[: len(outputs)] = eigenvalues(outputs)
    plain = _tail_sums(outputs.diagonal())
    form = plain if metric.fisher is None else _tail_sums(outputs * (u.T @ metric.fisher @ u))
    return References(output_spectrum, metric.scale * form, plain)


def _tail_sums(terms: Tensor) -> Tensor:
    """(k + 1,): entry r sums the terms (k,) or (k, k) whose indices are all r or more."""
    sums = terms.flip(0).cumsum(0)
    if terms.ndim == 2:
        sums = sums.flip(1).cumsum(1).diagonal()
    return torch.cat([sums.flip(0).clamp(min=0.0), sums.new_zeros(1)])

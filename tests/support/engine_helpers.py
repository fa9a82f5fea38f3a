"""Small layers have known statistics here, and float64 references written without the engine."""

import torch
from torch import Tensor

from lrc_cli.engine import STORAGES, Approximation, Choice, LowRankStorage, Statistics, Stored

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]

SHAPES = {"tall": (40, 24), "wide": (24, 40), "square": (32, 32)}


LOW_RANK = {name: form for name, form in STORAGES.items() if isinstance(form, LowRankStorage)}


def granted(storage: str, rank: int | None) -> Choice:
    """Returns a choice of which nothing but its form and its rank counts."""
    return Choice(storage, rank, 0, 0.0)


def pack(
    problem: Approximation,
    rank: int,
    dtype: torch.dtype,
    storage: str = "auto",
    rank_multiple: int = 1,
) -> Stored:
    """Packs one layer at a granted rank, in a storage by its name."""
    choice = granted(storage, rank)
    return STORAGES[storage].pack(problem, choice, dtype, rank_multiple=rank_multiple)


def storage_bytes(storage: str, m: int, n: int, rank: int, itemsize: int, block: int) -> int:
    """Returns bytes by name; "auto" starts from interpolative."""
    name = "interpolative" if storage == "auto" else storage
    return LOW_RANK[name].num_bytes(m, n, rank, itemsize, block)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=generator(seed))


def second_moments(size: int, seed: int, decades: float = 3.0, num_samples: int = 4096) -> Tensor:
    """Returns the Gram matrix of samples whose principal axes spread over `decades` of energy."""
    axes, _ = torch.linalg.qr(gaussian(size, size, seed=seed))
    scales = torch.logspace(0, -decades / 2, size, dtype=torch.float64)
    samples = (axes * scales) @ gaussian(size, num_samples, seed=seed + 1)
    return samples @ samples.T / num_samples


def case(name: str, seed: int = 0) -> tuple[Tensor, Statistics]:
    """Returns a weight (m, n) float64 and its statistics, by name."""
    m, n = SHAPES.get(name.split("-")[0], (24, 40))
    if name == "one-row":
        m, n = 1, 24
    weight = gaussian(m, n, seed=seed)
    gram, fisher = second_moments(n, seed + 10), second_moments(m, seed + 20)
    if name.endswith("deficient"):
        inputs = gaussian(n, 10, seed=seed + 30)
        gram = inputs @ inputs.T / 10
    if name.endswith("zero-columns"):
        gram[::3], gram[:, ::3] = 0, 0
    if name.endswith("outlier"):
        channel = torch.ones(n, dtype=torch.float64)
        channel[5] = 1e3
        gram = channel[:, None] * gram * channel
    return weight, Statistics(gram=gram, fisher=1e-12 * fisher)


CASES = [
    "tall",
    "wide",
    "square",
    "one-row",
    *(f"{shape}-{data}" for shape in SHAPES for data in ("deficient", "zero-columns", "outlier")),
]


def damped(fisher: Tensor) -> Tensor:
    return fisher + 1e-3 * fisher.diagonal().mean() * torch.eye(len(fisher), dtype=torch.float64)


def reference_error(method: str, difference: Tensor, statistics: Statistics) -> float:
    """Returns the quadratic form each method minimises, as a sum of squares over explicit roots."""
    gram, fisher = statistics.gram, statistics.fisher
    assert gram is not None and fisher is not None
    if method == "svd":
        return difference.square().sum().item()
    outputs = difference @ square_root(gram)
    if method == "frobenius":
        return outputs.square().sum().item()
    return 0.5 * (square_root(damped(fisher)) @ outputs).square().sum().item()


def square_root(matrix: Tensor) -> Tensor:
    """Returns the symmetric root of a positive semidefinite matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def eckart_young(method: str, weight: Tensor, statistics: Statistics, rank: int) -> Tensor:
    """Returns the optimum by an explicit SVD in the whitened space, if it is well conditioned."""
    m, n = weight.shape
    left, right = torch.eye(m, dtype=torch.float64), torch.eye(n, dtype=torch.float64)
    assert statistics.gram is not None and statistics.fisher is not None
    if method != "svd":
        right = square_root(statistics.gram)
    if method == "curvature":
        left = square_root(damped(statistics.fisher))
    u, s, vt = torch.linalg.svd(left @ weight @ right, full_matrices=False)
    truncated = (u[:, :rank] * s[:rank]) @ vt[:rank]
    return torch.linalg.solve(left, truncated) @ torch.linalg.inv(right)

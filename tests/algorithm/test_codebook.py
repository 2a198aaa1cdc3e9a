"""k-means in the metric of the Hessian, against brute force in double precision."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from crvq_hf.algorithm.codebook import centroid_metrics, group_metrics, kmeans, nearest_codes


def metrics_of(num_groups: int, d: int, generator: torch.Generator) -> torch.Tensor:
    x = torch.randn(num_groups, 3 * d, d, generator=generator) * torch.rand(d, generator=generator).add(0.1)
    return x.transpose(1, 2) @ x / (3 * d)


def distances(vectors: torch.Tensor, book: torch.Tensor, metrics: torch.Tensor) -> torch.Tensor:
    """Returns `[N, G, C]`, fp64: the squared distance of every vector to every codeword in its group's metric."""
    difference = vectors.double()[:, :, None] - book.double()
    return torch.einsum("ngcd,gde,ngce->ngc", difference, metrics.double(), difference)


def error(vectors, book, metrics, row_weight=None) -> float:
    """Returns the weighted quantization error with the best code for every vector."""
    best = distances(vectors, book, metrics).amin(-1)
    return float((best if row_weight is None else best * row_weight[:, None].double()).sum())


def test_group_metrics_are_the_diagonal_blocks():
    hessian = torch.randn(24, 24)
    blocks = group_metrics(hessian, 8)
    assert blocks.shape == (3, 8, 8)
    assert all(torch.equal(blocks[g], hessian[8 * g : 8 * g + 8, 8 * g : 8 * g + 8]) for g in range(3))


@given(
    d=st.sampled_from([4, 8, 16]),
    n=st.integers(1, 6),
    num_groups=st.integers(1, 5),
    size=st.integers(1, 40),
    seed=st.integers(0, 1000),
)
def test_nearest_codes_are_nearest(d, n, num_groups, size, seed):
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(n, num_groups, d, generator=generator)
    book, metrics = torch.randn(size, d, generator=generator), metrics_of(num_groups, d, generator)
    codes = nearest_codes(vectors, book, metrics)
    assert codes.shape == (n, num_groups) and codes.dtype == torch.int64
    all_distances = distances(vectors, book, metrics)
    chosen = all_distances.gather(-1, codes[..., None])[..., 0]
    # Two codewords may be as near as fp32 can tell.
    assert (chosen <= all_distances.amin(-1) * (1 + 1e-4) + 1e-5).all()
    assert (codes == all_distances.argmin(-1)).float().mean() > 0.8


def test_a_codeword_finds_itself(generator):
    book = torch.randn(60, 4)
    codes = torch.randint(60, (9, 11))
    assert torch.equal(nearest_codes(book[codes], book, metrics_of(11, 4, generator())), codes)


def test_centroid_metrics(generator):
    codes, row_weight, metrics = torch.randint(4, (5, 3)), torch.rand(5), metrics_of(3, 4, generator())
    expected = torch.zeros(6, 4, 4)
    for n in range(5):
        for g in range(3):
            expected[codes[n, g]] += row_weight[n] * metrics[g]
    torch.testing.assert_close(centroid_metrics(codes, row_weight, metrics, 6), expected)


@pytest.mark.parametrize("d", [4, 8, 16])
def test_kmeans_improves_on_random_vectors_with_every_iteration(d, generator):
    vectors, metrics, row_weight = torch.randn(64, 6, d), metrics_of(6, d, generator()), torch.rand(64) + 0.1
    errors = [
        error(vectors, kmeans(vectors, metrics, row_weight, 8, iterations, generator(1)), metrics, row_weight)
        for iterations in range(6)
    ]
    assert all(later <= earlier * (1 + 1e-4) for earlier, later in zip(errors, errors[1:], strict=False))
    assert errors[-1] < 0.9 * errors[0]


def test_one_centroid_is_the_least_squares_solution(generator):
    vectors, metrics, row_weight = torch.randn(10, 5, 8), metrics_of(5, 8, generator()), torch.rand(10) + 0.1
    weighted = row_weight.double()[:, None, None, None] * metrics.double()
    right = (weighted @ vectors.double()[..., None]).sum((0, 1))[:, 0]
    expected = torch.linalg.solve(weighted.sum((0, 1)), right)
    book = kmeans(vectors, metrics, row_weight, 1, 1, generator())
    torch.testing.assert_close(book[0].double(), expected, rtol=1e-3, atol=1e-4)


def test_heavy_rows_count_more(generator):
    vectors = torch.zeros(2, 1, 4)
    vectors[1] = 1.0
    book = kmeans(vectors, torch.eye(4)[None], torch.tensor([1.0, 3.0]), 1, 1, generator())
    torch.testing.assert_close(book, torch.full((1, 4), 0.75))


def test_only_whole_rows_are_drawn(generator):
    vectors = torch.arange(40.0)[:, None, None].expand(40, 6, 4).contiguous()
    book = kmeans(vectors, torch.eye(4).expand(6, 4, 4), torch.ones(40), 8, 20, generator(), max_vectors=12)
    # Two rows of six equal vectors are all there is to see.
    assert len(book.round(decimals=3).unique(dim=0)) == 2


def test_a_sample_is_enough_for_a_good_codebook(generator):
    vectors, metrics, ones = torch.randn(400, 4, 8), metrics_of(4, 8, generator()), torch.ones(400)
    sampled = error(vectors, kmeans(vectors, metrics, ones, 16, 8, generator(), max_vectors=800), metrics)
    start = error(vectors, kmeans(vectors, metrics, ones, 16, 0, generator()), metrics)
    assert sampled < 0.9 * start


@pytest.mark.parametrize("count", [1, 3, 15])
def test_fewer_vectors_than_centroids(count, generator):
    vectors = torch.randn(count, 1, 8)
    metrics = metrics_of(1, 8, generator())
    book = kmeans(vectors, metrics, torch.ones(count), 16, 5, generator())
    assert book.shape == (16, 8) and book.isfinite().all()
    assert error(vectors, book, metrics) < 1e-6 * error(vectors, torch.zeros(1, 8), metrics)


@pytest.mark.parametrize("value", [0.0, 3.0, 1e-12, 1e8])
def test_constant_vectors(value, generator):
    vectors = torch.full((6, 5, 8), value)
    book = kmeans(vectors, metrics_of(5, 8, generator()), torch.ones(6), 4, 5, generator())
    assert book.isfinite().all()
    nearest = (book - value).abs().amax(1).min()
    assert float(nearest) <= 1e-4 * value


def test_centroids_that_serve_nothing_are_moved(generator):
    values = torch.tensor([[1.0] * 4, [5.0] * 4, [9.0] * 4])
    vectors = values[torch.arange(30) // 10][:, None]
    # The draw takes copies of the same value: ties leave all but one of them empty.
    book = kmeans(vectors, torch.eye(4)[None], torch.ones(30), 3, 30, generator(2))
    assert not torch.equal(
        kmeans(vectors, torch.eye(4)[None], torch.ones(30), 3, 0, generator(2)).unique(dim=0), values
    )
    torch.testing.assert_close(book.unique(dim=0), values, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("metric", ["zero", "rank one"])
def test_metrics_that_see_nothing(metric, generator):
    x = torch.randn(1, 8)
    one = torch.zeros(8, 8) if metric == "zero" else x.T @ x
    book = kmeans(torch.randn(6, 4, 8), one.expand(4, 8, 8), torch.ones(6), 4, 5, generator())
    assert book.isfinite().all() and book.abs().max() < 1e4


def test_the_generator_decides(generator):
    vectors, metrics, ones = torch.randn(40, 4, 8), metrics_of(4, 8, generator()), torch.ones(40)
    books = [kmeans(vectors, metrics, ones, 8, 3, generator(seed), max_vectors=80) for seed in (5, 5, 6)]
    assert torch.equal(books[0], books[1]) and not torch.equal(books[0], books[2])
    torch.manual_seed(99)
    assert torch.equal(kmeans(vectors, metrics, ones, 8, 3, generator(5), max_vectors=80), books[0])

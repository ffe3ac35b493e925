"""FID, Inception Score, KID and CMMD on random features."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from minigpt5_jax.evaluation.metrics import statistics as st
from minigpt5_jax.weights.errors import WeightFileError


def features(n: int, d: int = 32, seed: int = 0, shift: float = 0.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((n, d)) @ rng.standard_normal((d, d)) / 4 + shift).astype(np.float32)


def frechet_by_eigenvalues(one: np.ndarray, other: np.ndarray) -> float:
    """The formula of torchmetrics 1.9 and torch-fidelity 0.4, in their order."""
    a, b = one.astype(np.float64), other.astype(np.float64)
    s1, s2 = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    roots = np.sqrt(np.linalg.eigvals(s1 @ s2).astype(complex)).real.sum()
    return np.square(a.mean(0) - b.mean(0)).sum() + np.trace(s1) + np.trace(s2) - 2 * roots


def test_frechet_distance_in_both_forms():
    one, other = features(100), features(80, seed=1, shift=0.3)
    want = frechet_by_eigenvalues(one, other)
    assert st.frechet_distance(st.moments(one), st.moments(other)) == pytest.approx(want, rel=1e-9)
    assert st.frechet_distance_of_few(one, other) == pytest.approx(want, rel=1e-9)
    assert st.frechet_distance(st.moments(one), st.moments(one)) == pytest.approx(0, abs=1e-6)


def test_frechet_distance_of_fewer_features_than_dimensions():
    one, other = features(5, 64), features(4, 64, seed=1)
    want = frechet_by_eigenvalues(one, other)
    assert st.frechet_distance_of_few(one, other) == pytest.approx(want, rel=1e-4)
    assert st.frechet_distance(st.moments(one), st.moments(other)) == pytest.approx(want, rel=1e-4)


def test_a_story_of_five_in_many_dimensions():
    """The nuclear norm agrees with the eigenvalues in all digits that are printed."""
    one, other = features(5, 256), features(5, 256, seed=1)
    want = frechet_by_eigenvalues(one, other)
    assert st.frechet_distance_of_few(one, other) == pytest.approx(want, rel=1e-5)


def test_fid_of_one_distribution_falls_with_the_number_of_images():
    """About c / n: recorded 0.47, 0.19 and 0.093 at 200, 400 and 800."""
    rng = np.random.default_rng(0)
    sides = {n: rng.standard_normal((2, n, 32)).astype(np.float32) for n in (200, 400, 800)}
    found = [n * st.frechet_distance_of_few(*pair) for n, pair in sides.items()]
    assert found == pytest.approx([np.mean(found)] * 3, rel=0.25)


def test_fid_of_known_normal_distributions():
    """Of independent dimensions it is the sum of squared differences of means and deviations."""
    corners = np.array([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]])  # covariance 4/3 by n - 1
    one, other = corners * [1, 2], corners * [3, 5] + [7, 11]
    want = 7**2 + 11**2 + (3 - 1) ** 2 * 4 / 3 + (5 - 2) ** 2 * 4 / 3
    assert st.frechet_distance(st.moments(one), st.moments(other)) == pytest.approx(want, rel=1e-12)
    assert st.frechet_distance_of_few(one, other) == pytest.approx(want, rel=1e-12)


def test_moments_gather_by_batches():
    x, sums = features(50), st.Sums(32)
    for start in range(0, 50, 7):
        sums.add(x[start : start + 7])
    got = sums.moments()
    np.testing.assert_allclose(got.mean, x.astype(np.float64).mean(0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(got.covariance, np.cov(x.astype(np.float64), rowvar=False), atol=1e-10)


def test_too_few_images_are_named():
    with pytest.raises(ValueError, match="at least 2 images on each side, here is 1"):
        st.moments(features(1))
    with pytest.raises(ValueError, match="here are 1 and 5"):
        st.frechet_distance_of_few(features(1), features(5))
    with pytest.raises(ValueError, match="width 32 and of width 16"):
        st.frechet_distance(st.moments(features(9)), st.moments(features(9, 16)))


def test_statistics_as_minigpt5_ships_them(tmp_path):
    x = features(40).astype(np.float64)
    path = tmp_path / "fid_real_feaures.pt"
    torch.save([torch.tensor(x.sum(0)), torch.tensor(x.T @ x), torch.tensor(40)], path)
    got, want = st.read_moments(path), st.moments(x.astype(np.float32))
    assert got.n == 40
    np.testing.assert_allclose(got.covariance, want.covariance, atol=1e-6)
    torch.save([torch.zeros(3), torch.zeros(2, 2), torch.tensor(4)], path)
    with pytest.raises(WeightFileError, match=r"no sums for FID"):
        st.read_moments(path)
    torch.save({"a": torch.zeros(3)}, path)
    with pytest.raises(WeightFileError, match="sum of outer products"):
        st.read_moments(path)


def inception_score_of_torch(logits: np.ndarray, chunks: str) -> tuple[float, float]:
    """torchmetrics and torch-fidelity, written in torch, after the permutation that ours draws."""
    x = torch.tensor(logits[np.random.RandomState(2020).permutation(len(logits))]).double()
    n = len(x)
    parts = (
        x.chunk(10) if chunks == "torchmetrics" else [x[i * n // 10 : (i + 1) * n // 10] for i in range(10)]
    )
    scores = []
    for part in parts:
        p, log_p = part.softmax(1), part.log_softmax(1)
        scores.append((p * (log_p - p.mean(0, keepdim=True).log())).sum(1).mean().exp())
    scores = torch.stack(scores)
    return float(scores.mean()), float(scores.std(correction=int(chunks == "torchmetrics")))


@pytest.mark.parametrize("chunks", st.IS_CHUNKS)
@pytest.mark.parametrize("n, pieces", [(11, 6), (101, 10)])
def test_inception_score_by_both_rules(chunks, n, pieces):
    logits = 3 * features(n, 16)
    got = st.inception_score(logits, chunks)
    assert got.n == (pieces if chunks == "torchmetrics" else 10)
    assert (got.mean, got.std) == pytest.approx(inception_score_of_torch(logits, chunks), rel=1e-9)


def test_inception_score_of_too_few():
    with pytest.raises(ValueError, match="of 4 images cannot be cut into 10"):
        st.inception_score(features(4), "fidelity")
    with pytest.raises(ValueError, match="of 0 images"):
        st.inception_score(features(4)[:0])
    with pytest.raises(ValueError, match="torchmetrics, fidelity"):
        st.inception_score(features(4), "scipy")
    assert st.inception_score(features(1)).std is None  # of one chunk


def test_statistics_are_those_of_torch_fidelity():
    kid = pytest.importorskip(
        "torch_fidelity.metric_kid", reason="torch-fidelity is not installed (optional)"
    )
    from torch_fidelity.metric_isc import isc_features_to_metric

    one, other = features(60), features(50, seed=1, shift=0.1)
    kwargs = dict(kid_subsets=5, kid_subset_size=30, kid_kernel="poly", kid_kernel_poly_degree=3)
    kwargs |= dict(kid_kernel_poly_gamma=None, kid_kernel_poly_coef0=1, rng_seed=2020, verbose=False)
    theirs = kid.kid_features_to_metric(torch.tensor(one), torch.tensor(other), **kwargs)
    got = st.kernel_distance(one, other, subsets=5, size=30)
    assert [got.mean, got.std] == pytest.approx(list(theirs.values()), rel=1e-4)
    isc = isc_features_to_metric(torch.tensor(one))
    got = st.inception_score(one, "fidelity")
    assert [got.mean, got.std] == pytest.approx(list(isc.values()), rel=1e-9)


def test_kid_by_its_formula():
    one, other = features(6, 8).astype(np.float64), features(6, 8, seed=1).astype(np.float64)
    k = lambda x, y: (x @ y / 8 + 1) ** 3  # noqa: E731
    within = sum(np.mean([k(s[i], s[j]) for i in range(6) for j in range(6) if i != j]) for s in (one, other))
    want = within - 2 * np.mean([k(x, y) for x in one for y in other])
    got = st.kernel_distance(one.astype(np.float32), other.astype(np.float32), subsets=3, size=6)
    assert got.mean == pytest.approx(want, rel=1e-5) and got.std == pytest.approx(0, abs=1e-9)
    with pytest.raises(ValueError, match="subsets of 1000 from 6 and 6"):
        st.kernel_distance(one, other)


def test_cmmd_by_its_formula(monkeypatch):
    unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)  # noqa: E731
    one, other = unit(features(9)), unit(features(7, seed=1))
    k = lambda a, b: np.mean([np.exp(-np.square(x - y).sum() / 200) for x in a for y in b])  # noqa: E731
    want = 1000 * (k(one, one) + k(other, other) - 2 * k(one, other))
    monkeypatch.setattr(st, "BLOCK", 4)
    assert st.cmmd(one, other) == pytest.approx(want, rel=1e-3)
    with pytest.raises(ValueError, match="CMMD of 0 and 7"):
        st.cmmd(one[:0], other)

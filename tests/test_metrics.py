"""evaluate.py's scores: recorded numbers of the official code (golden/metrics and
golden/inception_fid), and cases with a known answer."""
import numpy as np
import pytest
import torch
from conftest import load_case
from PIL import Image

import evaluate
import models

METRICS = load_case("metrics", "cases").info


def gaussian(recipe, dtype):
    """[seed, n, d, scale, shift, decay] -> features (n, d)."""
    seed, n, d, scale, shift, decay = recipe
    x = np.random.RandomState(seed).standard_normal((n, d))
    return (x * scale / (1 + np.arange(d)) ** decay + shift).astype(dtype)


def named(cases):
    return pytest.mark.parametrize("case", cases, ids=lambda case: case["name"])


# ---------------------------------------------------------------- Frechet distance
@named(METRICS["fid"])
def test_frechet_distance_equals_pytorch_fid(case):
    """Also with fewer samples than dimensions, where older scipy releases stop on an imaginary
    part."""
    tolerances = {"float32_features": 1e-7, "fewer_samples_than_dims": 1e-5,
                  "fewer_samples_than_dims_both_small": 1e-5, "dim512_small_n": 1e-5}
    tolerance = tolerances.get(case["name"], 1e-9)
    x, y = (gaussian(case[key], case["dtype"]) for key in "xy")
    distance = evaluate.frechet_distance(*evaluate.statistics(x), *evaluate.statistics(y))
    assert abs(distance - case["fid"]) < tolerance
    assert abs(distance - case["fid_eig_form"]) < tolerance


@pytest.mark.parametrize("rank", [0, 1, 5, 20])
def test_frechet_distance_of_equal_covariances_is_the_squared_distance_of_the_means(rank):
    """Zero for equal statistics, whether or not the covariance is singular."""
    mu1, mu2 = np.random.RandomState(1).standard_normal((2, 20))
    A = np.random.RandomState(0).standard_normal((20, rank))
    distance = evaluate.frechet_distance(mu1, A @ A.T, mu2, A @ A.T)
    assert distance == pytest.approx(((mu1 - mu2) ** 2).sum(), rel=1e-9)
    assert abs(evaluate.frechet_distance(mu1, A @ A.T, mu1, A @ A.T)) < 1e-9


@pytest.mark.parametrize("n, m", [(30, 30), (30, 400), (400, 30)])
def test_frechet_distance_is_exact_for_singular_covariances(n, m):
    """The trace of the root is the nuclear norm of A^T B, for any factors A A^T and B B^T. Without
    care, the roots of rounding errors add up to 1e-5."""
    A, B = (np.random.RandomState(seed).standard_normal((300, k)) for seed, k in ((1, n), (2, m)))
    expected = (A ** 2).sum() + (B ** 2).sum() - 2 * np.linalg.norm(A.T @ B, "nuc")
    zero = np.zeros(300)
    distance = evaluate.frechet_distance(zero, A @ A.T, zero, B @ B.T)
    assert distance == pytest.approx(expected, rel=1e-11)


def test_statistics_are_the_mean_and_the_unbiased_covariance():
    x = np.array([[0., 0], [2, 2], [4, 1]])
    for features in (x, x.astype(np.float32)):
        mu, sigma = evaluate.statistics(features)
        assert np.allclose(mu, [2, 1]) and np.allclose(sigma, [[4, 1], [1, 1]])
        assert mu.dtype == sigma.dtype == np.float64


# ---------------------------------------------------------------- Inception Score
@named(METRICS["inception_score"])
def test_inception_score_equals_torch_fidelity(case):
    logits = np.random.RandomState(case["seed"]).standard_normal((case["n"], case["c"]))
    logits = logits * case["scale"]
    mean, std = evaluate.inception_score(logits, case["splits"])
    assert mean == pytest.approx(case["shuffled"]["mean"], rel=1e-6)
    assert std == pytest.approx(case["shuffled"]["std"], rel=1e-4)
    mean = case["one_split"]["mean"]
    assert evaluate.inception_score(logits, 1) == pytest.approx((mean, 0), rel=1e-6)


def test_inception_score_runs_from_one_to_the_number_of_classes():
    """1 when all images look alike, C when each is surely of one class and all classes are equally
    frequent, so sure that the other probabilities underflow."""
    assert evaluate.inception_score(np.ones((100, 7))) == pytest.approx((1, 0))
    one_hot = 1e4 * np.eye(8)[np.arange(80) % 8]
    assert evaluate.inception_score(one_hot, 1) == pytest.approx((8, 0))


# ---------------------------------------------------------------- precision and recall
@named(METRICS["precision_recall"])
@pytest.mark.parametrize("k", [3, 5])
@pytest.mark.parametrize("block", [1000, 37])
def test_precision_recall_equals_prdc(case, k, block, monkeypatch):
    """To the last image, and whatever the size of the blocks."""
    monkeypatch.setattr(evaluate, "BLOCK", block)
    real, fake = gaussian(case["real"], case["dtype"]), gaussian(case["fake"], case["dtype"])
    expected = case["k"][str(k)]["precision"], case["k"][str(k)]["recall"]
    assert evaluate.precision_recall(real, fake, k) == pytest.approx(expected, abs=1e-12)


def test_precision_and_recall_by_brute_force():
    real, fake = np.random.RandomState(3).standard_normal((2, 60, 4))
    fake = fake[:40] + 0.5

    def share(points, centres, k):
        inside = 0
        for point in points:
            for centre in centres:
                radius = np.sort(np.linalg.norm(centres - centre, axis=1))[k]
                if np.linalg.norm(point - centre) < radius:
                    inside += 1
                    break
        return inside / len(points)
    expected = share(fake, real, 3), share(real, fake, 3)
    assert evaluate.precision_recall(real, fake) == expected and 0 < min(expected) < 1
    assert evaluate.precision_recall(real, real) == (1, 1)
    assert evaluate.precision_recall(real, real + 100) == (0, 0)


@pytest.mark.parametrize("seed", range(10))
def test_a_fake_on_the_sphere_of_a_real_image_is_outside(seed):
    """The radius is a distance that occurs again between the sets: the two must compare as equal in
    spite of rounding."""
    points = np.random.RandomState(seed).standard_normal((2, 2048))
    a, b = points.astype(np.float32).astype(np.float64)
    # exact in float64; as far from a (b) as b (a) is
    mirrored = np.stack([2 * a - b, 2 * b - a])
    assert evaluate.precision_recall(np.stack([a, b]), mirrored, k=1)[0] == 0


def test_copies_of_training_images_are_found():
    """By the measure of images that nothing was trained on."""
    generator = torch.Generator().manual_seed(0)
    training, held_out, new = (torch.randn(n, 8, generator=generator) for n in (500, 200, 1000))
    nearly = training + 0.01 * torch.randn(500, 8, generator=generator)
    half = torch.cat([nearly, new[:500]])
    assert evaluate.memorised_share(training, held_out, training) == 1
    assert evaluate.memorised_share(nearly, held_out, training) == 1
    assert evaluate.memorised_share(half, held_out, training) == pytest.approx(0.5, abs=0.05)
    assert evaluate.memorised_share(new, held_out, training) == pytest.approx(0.05, abs=0.03)
    # A share of the held-out images is stored twice, also among those trained on: the limit is then
    # 0, and the copies' distances are rounding errors
    held_out[:50] = training[:50]
    rounded = (training * (1 + 1e-6)).float()
    assert evaluate.memorised_share(rounded, held_out, training) == 1
    assert evaluate.memorised_share(new, held_out, training) == 0


# ---------------------------------------------------------------- the Inception network
@pytest.fixture(scope="module")
def inception():
    return models.load_inception(load_case("inception_fid", "full").weights())


def images(name):
    if name == "noise256":
        return torch.from_numpy(load_case("inception_fid", "full").inputs["image_noise256"])
    cells = np.random.RandomState(62).randint(0, 256, size=(2, 3, 13, 20)).astype(np.uint8)
    return torch.from_numpy(cells.repeat(16, 2).repeat(16, 3)[:, :, :200, :312].copy())


@pytest.mark.parametrize("name", ["noise256", "blocks200x312"])
def test_inception_equals_pytorch_fid(inception, name):
    """Features, logits and the three maps on the way, at full size."""
    case = load_case("inception_fid", "full")
    # which module is the first to see each map; of a block that pools, its branches are called, not
    # the block itself
    readers = {"block0": "Conv2d_3b_1x1", "block1": "Mixed_5b.branch1x1", "block2": "Mixed_7a"}
    maps, hooks = {}, []
    for key, module in readers.items():
        def keep(module, args, key=key):
            maps[key] = args[0]
        hooks.append(inception.net.get_submodule(module).register_forward_pre_hook(keep))
    features, logits = inception(images(name))
    for hook in hooks:
        hook.remove()
    for key in readers:
        case.check(f"{key}_{name}", maps[key])
    case.check(f"pool3_{name}", features)
    case.check(f"logits_{name}", logits)


@pytest.mark.parametrize("name", ["noise256", "blocks200x312"])
def test_inception_legacy_path_equals_torch_fidelity(inception, name):
    """TensorFlow's resize and scaling, logits without bias."""
    case = load_case("inception_fid", "torch_fidelity_variant")
    features, logits = inception(images(name), path="legacy")
    case.check(f"resized_{name}", models.resize_tensorflow1(images(name).float(), 299))
    case.check(f"pool3_{name}", features)
    case.check(f"logits_unbiased_{name}", logits)


def test_inception_refuses_float_images(inception):
    """Rounding to 8 bits is part of the score."""
    with pytest.raises(ValueError, match="uint8.*float32"):
        inception(torch.zeros(1, 3, 64, 64))


# ---------------------------------------------------------------- references
def extract(x):
    """A stand-in for the network: colour means and the top left pixel."""
    x = x.float()
    return torch.cat([x.mean((2, 3)), x[:, :, 0, 0]], 1), x.mean((2, 3))


def test_a_folder_an_npz_of_images_and_an_npz_of_statistics_agree(tmp_path):
    """PNG files are read as they are, in batches, subfolders included. Where ADM's file has mu and
    sigma beside its images, they are kept."""
    pictures = np.random.RandomState(0).randint(0, 256, (7, 10, 12, 3)).astype(np.uint8)
    expected, _ = extract(torch.from_numpy(pictures).permute(0, 3, 1, 2))
    (tmp_path / "png" / "more").mkdir(parents=True)
    for i, image in enumerate(pictures):
        Image.fromarray(image).save(tmp_path / "png" / ("more" if i > 3 else "") / f"{i}.png")
    np.savez(tmp_path / "images.npz", arr_0=pictures)
    mu, sigma = evaluate.statistics(expected)
    np.savez(tmp_path / "statistics.npz", mu=mu, sigma=sigma)
    np.savez(tmp_path / "both.npz", mu=mu + 1, sigma=sigma, arr_0=pictures)
    for name, shift in (("png", 0), ("images.npz", 0), ("statistics.npz", 0), ("both.npz", 1)):
        m, s, features = evaluate.reference(tmp_path / name, extract, batch=3)
        assert np.allclose(m, mu + shift) and np.allclose(s, sigma)
        if name == "statistics.npz":
            assert features is None
        else:
            assert np.array_equal(np.sort(features, 0), np.sort(expected.numpy(), 0))

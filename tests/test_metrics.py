"""evaluate.py's scores equal recorded numbers of the official code (golden/metrics and
golden/inception_fid), and those of cases with a known answer."""
import contextlib
import json

import numpy as np
import pytest
import torch
from conftest import check_frozen, in_process, load_case
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
    """With fewer samples than dimensions, older scipy releases stop on an imaginary part."""
    tolerances = {"float32_features": 1e-7, "fewer_samples_than_dims": 1e-5,
                  "fewer_samples_than_dims_both_small": 1e-5, "dim512_small_n": 1e-5}
    tolerance = tolerances.get(case["name"], 1e-9)
    x, y = (gaussian(case[key], case["dtype"]) for key in "xy")
    distance = evaluate.frechet_distance(*evaluate.statistics(x), *evaluate.statistics(y))
    assert abs(distance - case["fid"]) < tolerance
    assert abs(distance - case["fid_eig_form"]) < tolerance


@pytest.mark.parametrize("n, m, seed", [(30, 30, 2), (30, 400, 2), (400, 30, 2), (30, 30, 1)])
def test_frechet_distance_is_exact_for_singular_covariances(n, m, seed):
    """The trace of the root is the nuclear norm of A^T B, for any factors A A^T and B B^T, equal
    ones (seed 1) included. Without care, the roots of rounding errors would add up to 1e-5."""
    A = np.random.RandomState(1).standard_normal((300, n))
    B = np.random.RandomState(seed).standard_normal((300, m))
    mu = np.random.RandomState(0).standard_normal((2, 300))
    expected = ((mu[0] - mu[1]) ** 2).sum() + (A ** 2).sum() + (B ** 2).sum()
    expected -= 2 * np.linalg.norm(A.T @ B, "nuc")
    distance = evaluate.frechet_distance(mu[0], A @ A.T, mu[1], B @ B.T)
    assert distance == pytest.approx(expected, rel=1e-11)


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
    """It is 1 when all images look alike, and C when each is surely of one of C equally frequent
    classes, so surely that the other probabilities underflow."""
    assert evaluate.inception_score(np.ones((100, 7))) == pytest.approx((1, 0))
    one_hot = 1e4 * np.eye(8)[np.arange(80) % 8]
    assert evaluate.inception_score(one_hot, 1) == pytest.approx((8, 0))


# ---------------------------------------------------------------- precision and recall
@named(METRICS["precision_recall"])
@pytest.mark.parametrize("k", [3, 5])
@pytest.mark.parametrize("block", [1000, 37])
def test_precision_recall_equals_prdc(case, k, block, monkeypatch):
    """Every image counts, whatever the size of the blocks."""
    monkeypatch.setattr(evaluate, "BLOCK", block)
    real, fake = gaussian(case["real"], case["dtype"]), gaussian(case["fake"], case["dtype"])
    expected = case["k"][str(k)]["precision"], case["k"][str(k)]["recall"]
    assert evaluate.precision_recall(real, fake, k) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("seed", range(10))
def test_a_fake_on_the_sphere_of_a_real_image_is_outside(seed):
    """The radius occurs again as a distance between the sets, and the two must be equal in spite of
    rounding."""
    points = np.random.RandomState(seed).standard_normal((2, 2048))
    a, b = points.astype(np.float32).astype(np.float64)
    # These are exact in float64, and as far from a (b) as b (a) is.
    mirrored = np.stack([2 * a - b, 2 * b - a])
    assert evaluate.precision_recall(np.stack([a, b]), mirrored, k=1)[0] == 0


def test_copies_of_training_images_are_found():
    """The limit comes from held-out images."""
    generator = torch.Generator().manual_seed(0)
    training, held_out, new = (torch.randn(n, 8, generator=generator) for n in (500, 200, 1000))
    nearly = training + 0.01 * torch.randn(500, 8, generator=generator)
    half = torch.cat([nearly, new[:500]])
    assert evaluate.memorised_share(training, held_out, training) == 1
    assert evaluate.memorised_share(nearly, held_out, training) == 1
    assert evaluate.memorised_share(half, held_out, training) == pytest.approx(0.5, abs=0.05)
    assert evaluate.memorised_share(new, held_out, training) == pytest.approx(0.05, abs=0.03)
    # Where some held-out images are also trained on, the limit is 0, and copies differ by rounding
    # errors.
    held_out[:50] = training[:50]
    rounded = (training * (1 + 1e-6)).float()
    assert evaluate.memorised_share(rounded, held_out, training) == 1
    assert evaluate.memorised_share(new, held_out, training) == 0


# ---------------------------------------------------------------- the Inception network
@pytest.fixture(scope="module")
def inception():
    return check_frozen(models.load_inception(load_case("inception_fid", "full").weights()))


def images(name):
    if name == "noise256":
        return load_case("inception_fid", "full").tensors["image_noise256"].byte()
    cells = np.random.RandomState(62).randint(0, 256, size=(2, 3, 13, 20)).astype(np.uint8)
    return torch.from_numpy(cells.repeat(16, 2).repeat(16, 3)[:, :, :200, :312].copy())


@pytest.mark.parametrize("path, recorded", [("pytorch-fid", "full"),
                                            ("legacy", "torch_fidelity_variant")])
@pytest.mark.parametrize("name", ["noise256", "blocks200x312"])
def test_inception_equals_the_official_network(inception, name, path, recorded):
    """Features, logits without bias, and for pytorch-fid three maps on the way, for torch-fidelity
    the resized image, at full size."""
    case, maps = load_case("inception_fid", recorded), {}
    # The first module that sees each map; of a block that pools, only the branches are called.
    readers = {"block0": "Conv2d_3b_1x1", "block1": "Mixed_5b.branch1x1", "block2": "Mixed_7a"}
    with contextlib.ExitStack() as hooks:
        for key, module in readers.items():
            def keep(module, args, key=key):
                maps[key] = args[0]
            module = inception.net.get_submodule(module)
            hooks.callback(module.register_forward_pre_hook(keep).remove)
        features, logits = inception(images(name), path=path)
    case.check(f"pool3_{name}", features)
    case.check(f"logits_unbiased_{name}", logits)
    if path == "legacy":
        maps = {"resized": models.resize_tensorflow1(images(name).float(), 299)}
    for key, value in maps.items():
        case.check(f"{key}_{name}", value)


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
    """PNG files are read as they are, in batches, with subfolders. Mu and sigma of ADM's file
    are kept, although it also has its images."""
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


@pytest.mark.slow
def test_scores_of_a_folder(inception, tmp_path):
    """For the same images the distance is 0 and everything is precise and recalled. Mu and sigma
    alone give no precision; here mu is moved by 0.1 in each of 2048 directions."""
    torch.save(inception.net.state_dict(), tmp_path / models.INCEPTION)
    cells = np.random.RandomState(0).randint(0, 256, (12, 4, 4, 3)).astype(np.uint8)
    pictures = cells.repeat(8, 1).repeat(8, 2)
    (tmp_path / "png").mkdir()
    for i, image in enumerate(pictures):
        Image.fromarray(image).save(tmp_path / "png" / f"{i:02d}.png")
    np.savez(tmp_path / "adm.npz", arr_0=pictures)
    line = "evaluate.py --folder png --weights . --inception-path legacy --reference "
    done = in_process(line + "adm.npz", tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "fewer than the 2048 features" in done.stdout
    assert "does not hold the published weights" in done.stdout
    report = json.loads((tmp_path / "report.jsonl").read_text())
    (row,) = report["rows"]
    assert row["fid"] == pytest.approx(0, abs=1e-3)
    assert (row["precision"], row["recall"]) == (1, 1) and row["inception_score"] >= 1
    assert report["protocol"]["inception_path"] == "legacy"
    features, _ = inception(torch.from_numpy(pictures).permute(0, 3, 1, 2), path="legacy")
    features = features.double().numpy()
    np.savez(tmp_path / "statistics.npz", mu=features.mean(0) + 0.1, sigma=np.cov(features.T))
    assert in_process(line + "statistics.npz", tmp_path).returncode == 0
    line = (tmp_path / "report.jsonl").read_text().splitlines()[1]
    (row,) = json.loads(line)["rows"]
    assert row["fid"] == pytest.approx(2048 * 0.01, abs=1e-3) and "precision" not in row

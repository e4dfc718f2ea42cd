"""evaluate.py's scores: recorded numbers of the official code (golden/metrics and
golden/inception_fid), and cases with a known answer."""
import zipfile
import zlib

import numpy as np
import pytest
import torch
from conftest import golden_fill, load_case
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


def covariance(d, rank, seed=0):
    A = np.random.RandomState(seed).standard_normal((d, rank))
    return A @ A.T


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


def test_frechet_distance_of_equal_covariances_is_the_squared_distance_of_the_means():
    mu1, mu2 = np.random.RandomState(1).standard_normal((2, 20))
    sigma = covariance(20, 20)
    expected = ((mu1 - mu2) ** 2).sum()
    assert evaluate.frechet_distance(mu1, sigma, mu2, sigma) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("rank", [0, 1, 5, 20])
def test_frechet_distance_of_equal_statistics_is_zero_even_if_singular(rank):
    mu, sigma = np.ones(20), covariance(20, rank)
    assert abs(evaluate.frechet_distance(mu, sigma, mu, sigma)) < 1e-9


def test_frechet_distance_of_diagonal_covariances():
    """Commuting covariances: the sum of (sqrt a - sqrt b)^2, zeros on either side included."""
    a, b = np.array([0, 0, 1e-12, 1, 4, 9.]), np.array([0, 2, 3, 0, 1, 1e-9])
    expected = ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    zero = np.zeros(6)
    distance = evaluate.frechet_distance(zero, np.diag(a), zero, np.diag(b))
    assert distance == pytest.approx(expected, rel=1e-12)


def test_frechet_distance_is_symmetric_and_exact_for_singular_covariances():
    """The trace of the root is the nuclear norm of A^T B, for any factors A A^T and B B^T."""
    A, B = np.random.RandomState(2).standard_normal((2, 300, 30))
    expected = (A ** 2).sum() + (B ** 2).sum() - 2 * np.linalg.norm(A.T @ B, "nuc")
    zero = np.zeros(300)
    for a, b in ((A, B), (B, A)):
        distance = evaluate.frechet_distance(zero, a @ a.T, zero, b @ b.T)
        assert distance == pytest.approx(expected, rel=1e-11)


@pytest.mark.parametrize("arguments, words", [
    ((np.zeros(3), np.eye(3), np.zeros(4), np.eye(4)), "3 and 4 wide"),
    ((np.zeros(3), np.eye(4), np.zeros(3), np.eye(3)), r"first statistics.*\(3,\) and \(4, 4\)"),
    ((np.zeros(3), np.eye(3), np.zeros((3, 1)), np.eye(3)), "second statistics"),
    ((np.zeros(3), np.eye(3) * np.nan, np.zeros(3), np.eye(3)), "not finite"),
    ((np.zeros(3), np.eye(3), np.array([0, np.inf, 0]), np.eye(3)), "second.*not finite")])
def test_frechet_distance_names_what_is_wrong(arguments, words):
    with pytest.raises(ValueError, match=words):
        evaluate.frechet_distance(*arguments)


def test_statistics_are_the_mean_and_the_unbiased_covariance():
    x = np.array([[0., 0], [2, 2], [4, 1]])
    for features in (x, torch.tensor(x, dtype=torch.float32, requires_grad=True)):
        mu, sigma = evaluate.statistics(features)
        assert np.allclose(mu, [2, 1]) and np.allclose(sigma, [[4, 1], [1, 1]])
        assert mu.dtype == sigma.dtype == np.float64
    assert evaluate.statistics(x[:, :1])[1].shape == (1, 1)
    with pytest.raises(ValueError, match="at least 2 rows"):
        evaluate.statistics(x[:1])
    with pytest.raises(ValueError, match="not finite"):
        evaluate.statistics(np.where(x == 1, np.nan, x))


# ---------------------------------------------------------------- Inception Score
@named(METRICS["inception_score"])
def test_inception_score_equals_torch_fidelity(case):
    logits = np.random.RandomState(case["seed"]).standard_normal((case["n"], case["c"]))
    logits = logits * case["scale"]
    for kind in (np.asarray, torch.from_numpy):
        mean, std = evaluate.inception_score(kind(logits), case["splits"])
        assert mean == pytest.approx(case["shuffled"]["mean"], rel=1e-6)
        assert std == pytest.approx(case["shuffled"]["std"], rel=1e-4)
    mean = case["one_split"]["mean"]
    assert evaluate.inception_score(logits, 1) == pytest.approx((mean, 0), rel=1e-6)


def test_inception_score_runs_from_one_to_the_number_of_classes():
    """1 when all images look alike, C when each is surely of one class and all classes are equally
    frequent."""
    assert evaluate.inception_score(np.ones((100, 7))) == pytest.approx((1, 0))
    # so sure that the other probabilities underflow
    one_hot = 1e4 * np.eye(8)[np.arange(80) % 8]
    assert evaluate.inception_score(one_hot, 1) == pytest.approx((8, 0))
    with pytest.raises(ValueError, match="at least 10 rows"):
        evaluate.inception_score(np.ones((9, 7)))


# ---------------------------------------------------------------- precision and recall
@named(METRICS["precision_recall"])
@pytest.mark.parametrize("k", [3, 5])
@pytest.mark.parametrize("block", [1000, 37])
def test_precision_recall_equals_prdc(case, k, block):
    """To the last image, and whatever the size of the blocks."""
    real, fake = gaussian(case["real"], case["dtype"]), gaussian(case["fake"], case["dtype"])
    expected = case["k"][str(k)]["precision"], case["k"][str(k)]["recall"]
    for kind in (np.asarray, torch.from_numpy):
        found = evaluate.precision_recall(kind(real), kind(fake), k, block)
        assert found == pytest.approx(expected, abs=1e-12)


def test_precision_recall_by_hand():
    """Balls of radius 1 around 0, 1, 2, 3; the edge is outside. Fakes at 0.5 and 3.5 are in, 4 and
    9 are out."""
    real, fake = np.array([[0.], [1], [2], [3]]), np.array([[0.5], [3.5], [4], [9]])
    # the fakes' balls: radius 3 around 0.5, 0.5 around 3.5 and 4 and 5 around 9; real 3 is inside
    # the first alone, at 2.5
    assert evaluate.precision_recall(real, fake, k=1) == (0.5, 1.0)


def test_precision_and_recall_are_one_for_identical_sets_and_zero_for_distant_ones():
    x = np.random.RandomState(3).standard_normal((50, 4))
    assert evaluate.precision_recall(x, x) == (1, 1)
    assert evaluate.precision_recall(x, x + 100) == (0, 0)


@pytest.mark.parametrize("seed", range(10))
def test_a_fake_on_the_sphere_of_a_real_image_is_outside(seed):
    """The radius is a distance that occurs again between the sets: the two must compare as equal in
    spite of rounding."""
    points = np.random.RandomState(seed).standard_normal((2, 2048))
    a, b = points.astype(np.float32).astype(np.float64)
    # exact in float64; as far from a (b) as b (a) is
    mirrored = np.stack([2 * a - b, 2 * b - a])
    assert evaluate.precision_recall(np.stack([a, b]), mirrored, k=1)[0] == 0


def test_precision_recall_names_what_is_wrong():
    x = np.zeros((5, 4))
    with pytest.raises(ValueError, match="4 and 3"):
        evaluate.precision_recall(x, np.zeros((5, 3)))
    with pytest.raises(ValueError, match="fake features.*at least 4 rows"):
        evaluate.precision_recall(x, x[:3])


# ---------------------------------------------------------------- the Inception network
@pytest.fixture(scope="module")
def weights():
    return load_case("inception_fid", "full").weights()


@pytest.fixture(scope="module")
def inception(weights):
    return evaluate.load_inception(weights)


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
    case.check(f"logits_unbiased_{name}", logits - inception.net.fc.bias)


@pytest.mark.parametrize("name", ["noise256", "blocks200x312"])
def test_inception_legacy_path_equals_torch_fidelity(inception, name):
    """TensorFlow's resize and scaling, logits without bias."""
    case = load_case("inception_fid", "torch_fidelity_variant")
    features, logits = inception(images(name), path="legacy")
    case.check(f"resized_{name}", models.resize_tensorflow1(images(name).float(), 299))
    case.check(f"pool3_{name}", features)
    case.check(f"logits_unbiased_{name}", logits)
    case.check(f"logits_{name}", logits + inception.net.fc.bias)


def test_inception_refuses_float_images_and_unknown_paths(inception):
    with pytest.raises(ValueError, match="uint8.*float32"):
        inception(torch.zeros(1, 3, 64, 64))
    with pytest.raises(ValueError, match="'legacy'"):
        inception(torch.zeros(1, 3, 64, 64, dtype=torch.uint8), path="clean")


def test_inception_loads_from_a_file_with_or_without_batch_counters(inception, weights, tmp_path):
    info = load_case("inception_fid", "full").info
    assert len(info["manifest"]) == len(inception.net.state_dict()) == 566
    assert not inception.training and not any(p.requires_grad for p in inception.parameters())
    counters = info["nonfloat_keys"]
    assert len(counters) > 0
    with_counters = weights | {key: torch.tensor(5) for key in counters}
    for state in (weights, with_counters):
        torch.save(state, tmp_path / "inception.pth")
        loaded = evaluate.load_inception(tmp_path / "inception.pth")
        assert torch.equal(loaded.net.fc.weight, weights["fc.weight"])


def test_a_wrong_weight_file_ends_in_one_clear_line(weights, tmp_path):
    path = tmp_path / "inception.pth"

    def message(content):
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)
        with pytest.raises(ValueError) as error:
            evaluate.load_inception(path)
        text = str(error.value)
        assert str(path) in text and "\n" not in text and len(text) < 400
        return text

    small = {"fc.weight": weights["fc.weight"][:9].clone()}
    torch.save(small, path)
    whole = path.read_bytes()
    # the format of the official file's time
    torch.save(small, path, _use_new_zipfile_serialization=False)
    old = path.read_bytes()
    for damaged in (b"", b"not a weight file", whole[:-500], whole[:100], old[:-500], old[:30]):
        assert "cannot be read" in message(damaged)
    without_bias = {key: value for key, value in weights.items() if key != "fc.bias"}
    assert "fc.bias is missing" in message(without_bias)
    unknown = {"AuxLogits.fc.bias": torch.zeros(3)}
    assert "AuxLogits.fc.bias is unknown" in message(weights | unknown)
    other_shape = {"fc.weight": torch.zeros(1000, 2048)}
    words = "fc.weight has shape (1000, 2048) instead of (1008, 2048)"
    assert words in message(weights | other_shape)
    words = "Conv2d_1a_3x3.conv.weight is missing (the first of 473 faults)"
    assert words in message({"state_dict": torch.zeros(1)})
    assert "no state dict: it is empty" in message({"state_dict": {}})
    assert "no state dict: it is of type list" in message([1, 2])
    with pytest.raises(ValueError, match="no such file"):
        evaluate.load_inception(tmp_path / "absent.pth")


# ---------------------------------------------------------------- references
def extract(x):
    """A stand-in for the network: colour means and the top left pixel."""
    x = x.float()
    return torch.cat([x.mean((2, 3)), x[:, :, 0, 0]], 1), x.mean((2, 3))


@pytest.fixture
def pictures():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (7, 3, 10, 12), dtype=torch.uint8, generator=generator)


def test_a_folder_an_npz_of_images_and_an_npz_of_statistics_agree(pictures, tmp_path):
    """PNG files are read as they are, in batches, subfolders included."""
    expected, logits = evaluate.collect(pictures, extract, batch=3)
    assert np.array_equal(expected, extract(pictures)[0].numpy()) and logits.shape == (7, 3)
    hwc = pictures.permute(0, 2, 3, 1).numpy()
    (tmp_path / "png" / "more").mkdir(parents=True)
    for i, image in enumerate(hwc):
        Image.fromarray(image).save(tmp_path / "png" / ("more" if i > 3 else "") / f"{i}.png")
    np.savez(tmp_path / "images.npz", arr_0=hwc)
    mu, sigma = evaluate.statistics(expected)
    np.savez(tmp_path / "statistics.npz", mu=mu, sigma=sigma)
    np.savez(tmp_path / "both.npz", mu=mu + 1, sigma=sigma, arr_0=hwc)
    for name, shift in (("png", 0), ("images.npz", 0), ("statistics.npz", 0), ("both.npz", 1)):
        m, s, features = evaluate.reference(tmp_path / name, extract, batch=3)
        assert np.allclose(m, mu + shift) and np.allclose(s, sigma)
        if name == "statistics.npz":
            assert features is None
        else:
            assert np.array_equal(np.sort(features, 0), np.sort(expected, 0))


def test_a_wrong_reference_ends_in_one_clear_line(pictures, tmp_path):
    hwc = pictures.permute(0, 2, 3, 1).numpy()

    def message(name, **arrays):
        if arrays:
            np.savez(tmp_path / name, **arrays)
        with pytest.raises(ValueError) as error:
            evaluate.reference(tmp_path / name, extract)
        assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)
        return str(error.value)

    assert "does not exist" in message("absent")
    (tmp_path / "empty").mkdir()
    assert "no images there" in message("empty")
    (tmp_path / "notes.txt").write_text("hello")
    assert "folder of images or a .npz" in message("notes.txt")
    assert "mu and sigma" in message("mean.npz", mu=np.zeros(3))
    assert "(3,) and (4, 4)" in message("mixed.npz", mu=np.zeros(3), sigma=np.eye(4))
    assert "(N, H, W, 3) uint8" in message("float.npz", arr_0=hwc / 255)
    assert "(N, H, W, 3) uint8" in message("channels_first.npz", arr_0=pictures.numpy())
    assert "cannot be read" in message("objects.npz", mu=np.array([None]), sigma=np.eye(1))
    np.savez(tmp_path / "cut.npz", arr_0=hwc)
    (tmp_path / "cut.npz").write_bytes((tmp_path / "cut.npz").read_bytes()[:-100])
    assert "cannot be read" in message("cut.npz")
    with zipfile.ZipFile(tmp_path / "zip.npz", "w") as archive:
        archive.writestr("readme.txt", "hello")
    assert "mu and sigma" in message("zip.npz")
    (tmp_path / "png").mkdir()
    Image.fromarray(hwc[0]).save(tmp_path / "png" / "0.png")
    (tmp_path / "png" / "1.png").write_bytes(b"not a picture")
    assert "1.png cannot be read as an image" in message("png")
    Image.fromarray(hwc[1, :5]).save(tmp_path / "png" / "1.png")
    assert "0.png on differ in size" in message("png")


# ---------------------------------------------------------------- the weight rule itself
def test_golden_fill_follows_its_rule():
    """One entry of each kind, by hand; tied entries share their value and integer buffers are left
    out."""
    manifest = {"a.weight": [4, 3], "b.weight": [4], "bn.running_var": [2], "n": [], "tie": [4, 3]}
    state = golden_fill(manifest, 0, {"tie": "a.weight"}, ["n"])
    assert set(state) == {"a.weight", "b.weight", "bn.running_var", "tie"}
    assert state["tie"] is state["a.weight"]
    v = np.random.RandomState(zlib.crc32(b"a.weight")).standard_normal((4, 3)).astype(np.float32)
    assert torch.allclose(state["a.weight"], torch.from_numpy(v / np.sqrt(3).astype(np.float32)))
    assert (state["bn.running_var"] >= 1).all() and abs(state["b.weight"] - 1).max() < 0.5
    other = golden_fill({"a.weight": [4, 3]}, fill_xor=1)
    assert not torch.equal(other["a.weight"], state["a.weight"])

"""The reports of evaluate.py: whose images, which rows, in which files, beside which protocol. The
runs are tiny untrained networks."""
import hashlib
import json

import numpy as np
import pytest
import torch
from conftest import fake_run, in_process, refused
from PIL import Image

import evaluate
import fpd
import sample
import tokenizer


@pytest.fixture
def load(monkeypatch, tmp_path):
    """-> function: makes the run that evaluate.py then loads, and returns it."""
    def load(dataset, names):
        nets = fake_run(tmp_path, dataset, names)
        nets.images = tokenizer.fingerprint(nets.cfg)
        monkeypatch.setattr(evaluate, "chosen_networks", lambda args, device: nets)
        return nets
    return load


def save_images(folder, labels, seed=0):
    folder.mkdir(parents=True)
    for i, image in enumerate(tokenizer.shapes(labels, seed)):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i:03d}.png")


def read_report(folder):
    """The last line of report.jsonl."""
    return json.loads((folder / "report.jsonl").read_text().splitlines()[-1])


def row_names(content):
    return [(row["model"], row["steps"]) for row in content["rows"]]


# ---------------------------------------------------------------- the table of a small world
@pytest.mark.parametrize("dataset", ["shapes", "scenes"])
def test_the_table_of_a_small_world(dataset, tmp_path, load, monkeypatch):
    """Its rows, its pictures and the protocol beside its numbers. The fixed point starts from the
    teacher's samples of most steps."""
    nets = load(dataset, tokenizer.shapes_names())
    if dataset == "scenes":
        nets.names = tokenizer.scene_captions(12, 3)
    starts, grids, original = [], [], evaluate.draw_fixed_point
    monkeypatch.setattr(evaluate, "draw_fixed_point",
                        lambda nets, z, *args: starts.append(z) or original(nets, z, *args))
    monkeypatch.setattr(evaluate, "image_grid",
                        lambda *args: grids.append(args) or sample.image_grid(*args))
    done = in_process("evaluate.py --images 48 --steps 2 4", tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    content = read_report(nets.path.parent)
    assert row_names(content) == [("real", None), ("reconstruction", None), ("teacher", 4),
                                  ("teacher", 2), ("fixed point", None), ("student", 1)]
    for row, line in zip(content["rows"], done.stdout.splitlines()[-6:], strict=True):
        assert f"{row['overall' if dataset == 'scenes' else 'fd']:.2f}" in line.split()
        assert (row["ms_per_image"] is not None) == (row["model"] in ("teacher", "student"))
    assert [title.split("  ")[0].strip() for title, _ in grids[0][0]] == [
        "real", "reconstruction", "teacher 4", "teacher 2", "fixed point", "student 1"]
    assert (nets.path.parent / "report.png").is_file()
    protocol = content["protocol"]
    assert protocol["images"] == 48 and protocol["seed"] == 0 and protocol["init_mask"] == 0.9
    assert protocol["run"] == "a/checkpoint.pt" and protocol["torch"] == torch.__version__
    _, c, _ = evaluate.scorer(nets, 48)
    drawn = list(sample.batches(nets.teacher, nets.tokenizer, c, nets.cfg, 4))
    assert len(starts) == 1 and torch.equal(starts[0], torch.cat([z for z, _, _ in drawn]))


def test_the_fixed_point_does_not_depend_on_the_batch(tmp_path):
    """And it is `fpd.fixed_point` with the run's settings, image for image."""
    nets = fake_run(tmp_path, "shapes", tokenizer.shapes_names())
    z, c = torch.randint(32, (7, 16)), torch.arange(7)
    images = evaluate.draw_fixed_point(nets, z, c, seed=3)
    assert torch.equal(images, evaluate.draw_fixed_point(nets, z, c, seed=3, batch=2))
    assert not torch.equal(images, evaluate.draw_fixed_point(nets, z, c, seed=4))
    end = fpd.fixed_point(nets.teacher, z, c, nets.cfg, fpd.generators(3, 7, 7, "cpu"), rounds=8)
    assert torch.equal(images, sample.decode(nets.tokenizer, end, c))


def test_the_spread_is_measured_within_each_class():
    """Two classes of squares on grey: the first stands still, the second moves by +-4 in x and has
    two greys; where classes differ counts for nothing."""
    images = torch.full((8, 3, 32, 32), 100, dtype=torch.uint8)
    for i, (x, grey) in enumerate([(4, 50)] * 4 + [(10, 100), (18, 151), (10, 100), (18, 151)]):
        images[i] = grey
        images[i, :, 8:16, x:x + 8] = 255
    found = evaluate.spread(images, torch.arange(8) // 4).tolist()
    deviation = np.std([-1, 1, -1, 1], ddof=1) / 2
    assert found == pytest.approx([deviation * 25.5 / 255, 0, deviation * 4, 0])


@pytest.mark.parametrize("dataset", ["shapes", "folder"])
def test_all_rows_have_one_reference_and_no_row_has_an_image_of_it(dataset, tmp_path, load,
                                                                   monkeypatch):
    """The reconstructions are compared with other originals than their own. A folder has few
    images, and that is said."""
    for label in range(10 if dataset == "folder" else 0):
        save_images(tmp_path / f"data/class {label:02d}", torch.full((40,), label), label)
    nets = load(dataset, [f"class {i:02d}" for i in range(10 if dataset == "folder" else 24)])
    references, encoded = [], []
    original, features = evaluate.frechet_distance, evaluate.reconstruct
    monkeypatch.setattr(evaluate, "frechet_distance", lambda mu, *rest: references.append(mu)
                        or original(mu, *rest))
    monkeypatch.setattr(evaluate, "reconstruct", lambda nets, images: encoded.append(images)
                        or features(nets, images))
    done = in_process("evaluate.py --images 48 --steps 1", tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    test, real = (tokenizer.world(nets.cfg, split)[0] for split in ("test", "real"))
    mu, _ = evaluate.statistics(evaluate.judged(nets.judge, test)[0])
    assert len(references) == 5 and all(np.array_equal(reference, mu) for reference in references)
    assert torch.equal(encoded[-1], real[:48])
    assert not any((test == image).flatten(1).all(1).any() for image in real[:48])
    content = read_report(nets.path.parent)
    rows, warning = content["rows"], content["protocol"]["warning"]
    assert f"{len(test)} reference images" in done.stdout and rows[0]["fd"] > 0
    assert f"{min(48, len(real))} real images: {rows[0]['fd']:.2f}" in warning
    if dataset == "folder":
        assert len(test) == len(real) == 20 and all(0 <= row["memorised"] <= 1 for row in rows)
        # In another place they are the same images. With one class more, the test could have some
        # that the run was trained on.
        (tmp_path / "data").rename(tmp_path / "pictures")
        line = "evaluate.py --images 48 --steps 1 --data pictures"
        assert in_process(line, tmp_path).returncode == 0
        save_images(tmp_path / "pictures" / "one more class", torch.arange(3))
        refused(in_process(line, tmp_path), "not the images that the run was trained on")


@pytest.mark.parametrize("n", [3, 12])
def test_few_real_images_give_the_scores_that_they_can(n, tmp_path, monkeypatch):
    """And the class without an image is shown in white."""
    nets = fake_run(tmp_path, "folderless", ["a", "b", "c", "d"])
    labels = torch.arange(n) % 3
    monkeypatch.setattr(evaluate, "world", lambda cfg, split: (
        tokenizer.shapes(labels, int(split == "real")), labels, nets.names))
    evaluate.report(nets, tmp_path, 48, 0, (1,))
    for row in read_report(tmp_path)["rows"]:
        assert row["fd"] > -1e-9 and ("precision" in row) == (n > 10)
    picture = np.asarray(Image.open(tmp_path / "report.png"))
    assert (picture[-98:-2, -98:-2] == 255).all() and (picture[-98:-2, -198:-102] < 255).any()


def test_each_evaluation_adds_a_line_whatever_is_there(tmp_path, load):
    """A line that was cut off and a foreign report are neither read nor changed."""
    nets = load("shapes", tokenizer.shapes_names())
    folder = nets.path.parent
    (folder / "report.jsonl").write_text('{"protocol": {"da')
    (folder / "report.json").write_text("")
    for words in ("48", "60 --seed 1"):
        assert in_process(f"evaluate.py --images {words} --steps 1", tmp_path).returncode == 0
    cut, *lines = (folder / "report.jsonl").read_text().splitlines()
    assert cut == '{"protocol": {"da' and (folder / "report.json").read_text() == ""
    assert [json.loads(line)["protocol"]["images"] for line in lines] == [48, 60]


def test_what_cannot_be_scored_is_refused_first(tmp_path, load):
    nets = load("shapes", tokenizer.shapes_names())
    refused(in_process("evaluate.py --images 5", tmp_path), "10 or more")
    refused(in_process("evaluate.py --geneval --prompts p.jsonl", tmp_path), "runs of captions")
    refused(in_process("evaluate.py --folder images", tmp_path), "--reference")
    nets.teacher = None
    refused(in_process("evaluate.py", tmp_path), "student alone", "checkpoint.pt")
    load("laion", sample.PROMPTS)
    refused(in_process("evaluate.py --reference images", tmp_path), "runs of labels")
    refused(in_process("evaluate.py", tmp_path), "--geneval")


# ---------------------------------------------------------------- the table of ImageNet
class Extract(torch.nn.Module):
    """A stand-in for the Inception: features that differ from path to path, 10 logits."""
    def __init__(self):
        super().__init__()
        self.matrix = torch.randn(48, 60, generator=torch.Generator().manual_seed(0)) / 10

    def forward(self, images, path):
        x = torch.nn.functional.adaptive_avg_pool2d(images.float() / 255, 4).flatten(1)
        features = x @ self.matrix + (0.5 if path == "legacy" else 0.0)
        return features, features[:, :10]


@pytest.fixture
def official(tmp_path, monkeypatch, load):
    """A folder with a run of ImageNet's kind, reference images and a stand-in for the Inception."""
    load("imagenet", [str(i) for i in range(24)])
    save_images(tmp_path / "images", torch.arange(12))
    name = f"inception-{hashlib.sha256(b'weights').hexdigest()[:8]}.pth"
    (tmp_path / name).write_bytes(b"weights")
    monkeypatch.setattr(evaluate, "INCEPTION", tmp_path / name)
    monkeypatch.setattr(evaluate, "load_inception", lambda path: Extract())
    return tmp_path, tmp_path / name


def test_an_official_table_is_written_row_by_row(official, monkeypatch):
    """With the protocol, and a warning where the FID of few images means little or the Inception is
    another one. What is done when the next row fails is on the disk."""
    folder, weights = official
    line = "evaluate.py --reference images --images 12"
    done = in_process(f"{line} --steps 4 2", folder)
    assert done.returncode == 0, done.stderr
    lines = (folder / "runs/a/report.jsonl").read_text().splitlines()
    contents = [json.loads(line) for line in lines]
    assert [row_names(content) for content in contents] == [
        [("teacher", 4)], [("teacher", 2)], [("student", 1)]]
    for row in [content["rows"][0] for content in contents]:
        assert row["fid"] > 0 and {"inception_score", "precision", "recall"} <= row.keys()
        assert f"{row['fid']:.2f}" in done.stdout
    protocol = contents[0]["protocol"]
    assert "12 images are fewer than the 2048 features" in protocol["warning"]
    assert "warning: 12 images" in done.stdout and "published" not in done.stdout
    assert str(folder / "images") in protocol["scores"]
    weights.write_bytes(b"other weights")
    done = in_process(f"{line} --steps 1 --inception-path legacy", folder)
    assert "does not hold the published weights" in done.stdout
    scores = iter([(1.0, 0.0)])
    monkeypatch.setattr(evaluate, "inception_score", lambda logits: next(scores))
    with pytest.raises(StopIteration):
        in_process(f"{line} --steps 4 2 --seed 1", folder)
    content = read_report(folder / "runs/a")
    assert row_names(content) == [("teacher", 4)] and content["protocol"]["seed"] == 1


@pytest.mark.parametrize("made", ["legacy", "pytorch-fid"])
@pytest.mark.parametrize("used", ["legacy", "pytorch-fid"])
def test_a_reference_made_in_another_way_is_told(made, used, official):
    """ADM's file has images besides mu and sigma: they say with which path these were made."""
    folder, _ = official
    images = tokenizer.shapes(torch.arange(240) % 24, 0)
    mu, sigma = evaluate.statistics(Extract()(images, made)[0])
    np.savez(folder / "adm.npz", mu=mu, sigma=sigma, arr_0=images[:60].permute(0, 2, 3, 1).numpy())
    done = in_process(f"evaluate.py --reference adm.npz --folder images --inception-path {used}",
                      folder)
    assert done.returncode == 0, done.stderr
    assert ("mu and sigma do not fit the images beside them" in done.stdout) == (made != used)
    content = read_report(folder)
    assert row_names(content) == [("folder", None)] and content["protocol"]["images"] == 12

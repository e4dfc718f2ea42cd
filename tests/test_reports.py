"""The reports of evaluate.py: whose images, which rows, in which files, beside which protocol. The
runs are tiny untrained networks."""
import hashlib
import json
import types

import numpy as np
import pytest
import torch
from conftest import in_process, refused
from PIL import Image

import evaluate
import fpd
import sample
import tokenizer
from models import ConvNet, MaskGen, MaskGIT, Words
from tokenizer import VQGAN


def run_of(folder, dataset, names):
    """A run as of sample.load_run, in folder/runs/a."""
    torch.manual_seed(0)
    cfg = types.SimpleNamespace(dataset=dataset, smoke=True, data=str(folder / "data"), seed=0,
                                sample_guidance=2.0, confidence_noise=2.0, init_mask=0.9, temperature=1.0,
                                remask=(0.1, 0.9), refine_guidance=2.0)
    sizes = dict(K=32, L=16, width=16, depth=1, heads=2)
    vqgan = VQGAN(K=32, d=4, ch=4, ch_mult=(1, 1, 1, 1), z_channels=4, groups=2)
    if dataset == "scenes":
        teacher, student = MaskGen(**sizes), MaskGen(**sizes)
    else:
        teacher, student = (MaskGIT(**sizes, num_classes=len(names), mlp=16) for _ in range(2))
    networks = dict(tokenizer=vqgan, teacher=teacher, student=student,
                    text=Words() if dataset == "scenes" else None,
                    judge=ConvNet(len(names), width=4))
    for network in networks.values():
        if network is not None:
            network.eval().requires_grad_(False)
    path = folder / "runs" / "a" / "checkpoint.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    return types.SimpleNamespace(**networks, cfg=cfg, step=4, path=path, names=names)


@pytest.fixture
def load(monkeypatch, tmp_path):
    """-> function: makes the run that evaluate.py then loads, and returns it."""
    def load(dataset, names):
        run = run_of(tmp_path, dataset, names)
        run.images = tokenizer.fingerprint(run.cfg)
        monkeypatch.setattr(evaluate, "load_models", lambda args, device: run)
        return run
    return load


def save_images(folder, labels, seed=0):
    folder.mkdir(parents=True)
    for i, image in enumerate(tokenizer.shapes(labels, seed)):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i:03d}.png")


def read_report(path):
    return json.loads(path.read_text())


def row_names(content):
    return [(row["model"], row["steps"]) for row in content["rows"]]


# ---------------------------------------------------------------- the table of a small world
@pytest.mark.parametrize("dataset", ["shapes", "scenes"])
def test_the_table_of_a_small_world(dataset, tmp_path, load, monkeypatch):
    """Its rows, its pictures and the protocol beside its numbers. The fixed point starts from the
    teacher's samples of most steps."""
    run = load(dataset, tokenizer.shapes_names())
    if dataset == "scenes":
        run.names = tokenizer.scene_captions(12, 3)
    starts, sheets, original = [], [], evaluate.draw_fixed_point
    monkeypatch.setattr(evaluate, "draw_fixed_point",
                        lambda run, z, *args: starts.append(z) or original(run, z, *args))
    monkeypatch.setattr(evaluate, "image_grid", lambda *args: sheets.append(args) or sample.image_grid(*args))
    done = in_process("evaluate.py --images 48 --steps 2 4", tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    content = read_report(tmp_path / "runs/a/report.json")
    assert row_names(content) == [("real", None), ("reconstruction", None), ("teacher", 4),
                                  ("teacher", 2), ("fixed point", None), ("student", 1)]
    for row, line in zip(content["rows"], done.stdout.splitlines()[-6:], strict=True):
        assert f"{row['overall' if dataset == 'scenes' else 'fd']:.2f}" in line.split()
        assert (row["ms_per_image"] is not None) == (row["model"] in ("teacher", "student"))
    assert [title.split("  ")[0].strip() for title, _ in sheets[0][0]] == [
        "real", "reconstruction", "teacher 4", "teacher 2", "fixed point", "student 1"]
    assert (tmp_path / "runs/a/report.png").is_file()
    protocol = content["protocol"]
    assert protocol["images"] == 48 and protocol["seed"] == 0 and protocol["init_mask"] == 0.9
    assert protocol["run"] == "a/checkpoint.pt" and protocol["torch"] == torch.__version__
    _, c, _ = evaluate.scorer(run, tokenizer.world(run.cfg, "test")[:2], 48)
    drawn = list(sample.batches(run.teacher, run.tokenizer, c, run.cfg, 4))
    assert len(starts) == 1 and torch.equal(starts[0], torch.cat([z for z, _, _ in drawn]))


def test_the_fixed_point_does_not_depend_on_the_batch(tmp_path):
    """And it is `fpd.fixed_point` with the run's settings, image for image."""
    run = run_of(tmp_path, "shapes", tokenizer.shapes_names())
    z, c = torch.randint(32, (7, 16)), torch.arange(7)
    images = evaluate.draw_fixed_point(run, z, c, seed=3)
    assert torch.equal(images, evaluate.draw_fixed_point(run, z, c, seed=3, batch=2))
    assert not torch.equal(images, evaluate.draw_fixed_point(run, z, c, seed=4))
    end = fpd.fixed_point(run.teacher, z, c, run.cfg, fpd.generators(3, 7, 7, "cpu"), rounds=8)
    assert torch.equal(images, sample.decode(run.tokenizer, end, c))


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


def test_real_images_are_compared_with_others_of_all_classes(tmp_path, load, monkeypatch):
    """40 test images of a folder for rows of 48: one half against the other, of every class in
    both, and it is said that these are few. All other rows are compared with all of them. The
    column "memorised" takes held-out images after a round trip as its measure."""
    names = [f"class {label:02d}" for label in range(10)]
    for label, name in enumerate(names):
        save_images(tmp_path / "data" / name, torch.full((40,), label), label)
    load("folder", names)
    compared, original = [], evaluate.scorer

    def record(run, real, n):
        conditions, c, metrics = original(run, real, n)
        return conditions, c, lambda *fake: compared.append((*real, *fake)) or metrics(*fake)
    monkeypatch.setattr(evaluate, "scorer", record)
    done = in_process("evaluate.py --images 48 --steps 1", tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    reference, labels, fake, label = compared[0]
    assert labels.bincount().tolist() == label.bincount().tolist() == [2] * 10
    assert not any((reference == image).flatten(1).all(1).any() for image in fake)
    reference, _, _, label = compared[-1]
    assert len(reference) == 40 and label.bincount().tolist() == [5] * 8 + [4] * 2
    rows = read_report(tmp_path / "runs/a/report.json")["rows"]
    assert f"even that of 20 real ones against the 20 others is {rows[0]['fd']:.2f}" in done.stdout
    assert rows[0]["fd"] > 0 and "memorised" in done.stdout
    assert all(0 <= row["memorised"] <= 1 for row in rows)
    assert rows[1]["model"] == "reconstruction" and rows[1]["memorised"] == pytest.approx(0.05, abs=0.03)
    # in another place they are the same images; with one more, the test could have some that the
    # run was trained on
    (tmp_path / "data").rename(tmp_path / "pictures")
    line = "evaluate.py --images 48 --steps 1 --data pictures"
    assert in_process(line, tmp_path).returncode == 0
    save_images(tmp_path / "pictures" / "one more class", torch.arange(2))
    refused(in_process(line, tmp_path), "not the images that the run was trained on")


@pytest.mark.parametrize("n", [3, 6, 12])
def test_few_real_images_give_the_scores_that_they_can(n, tmp_path):
    """And the class without an image is shown in white."""
    run = run_of(tmp_path, "folderless", ["a", "b", "c", "d"])
    labels = torch.arange(n) % 3
    content = evaluate.report(run, (tokenizer.shapes(labels, 0), labels), tmp_path, 48, 0, (1,))
    real, student = content["rows"][0], content["rows"][-1]
    assert ("fd" in real) == (n > 3) and "precision" not in real
    assert student["fd"] > 0 and ("precision" in student) == (n > 10)
    picture = np.asarray(Image.open(tmp_path / "report.png"))
    assert (picture[-98:-2, -98:-2] == 255).all() and (picture[-98:-2, -198:-102] < 255).any()


def test_a_report_of_other_settings_stays(tmp_path, load):
    """60 images, another seed, other rows, another file in the same folder: a report of its own,
    and said. The same settings, also after more training: the same report."""
    run, folder = load("shapes", tokenizer.shapes_names()), tmp_path / "runs" / "a"
    lines = [f"evaluate.py --images {words}" for words in (
        "48 --steps 1", "60 --steps 1", "48 --steps 1 --seed 1", "48 --steps 2")]
    for i, line in enumerate(lines):
        before = {path: path.read_bytes() for path in folder.iterdir()}
        done = in_process(line, tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("report.json has another protocol and stays") == (i > 0)
        assert before.items() <= {path: path.read_bytes() for path in folder.iterdir()}.items()
        assert len(list(folder.glob("report*.json"))) == len(list(folder.glob("*.png"))) == i + 1
    run.step = 8
    assert in_process(lines[0], tmp_path).returncode == 0
    assert len(list(folder.glob("report*.json"))) == 4
    run.path = folder / "sent.pt"
    assert in_process(lines[0], tmp_path).returncode == 0
    assert read_report(folder / "report-5.json")["protocol"]["run"] == "a/sent.pt"


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
    content = read_report(folder / "runs/a/report.json")
    assert row_names(content) == [("teacher", 4), ("teacher", 2), ("student", 1)]
    for row in content["rows"]:
        assert row["fid"] > 0 and {"inception_score", "precision", "recall"} <= row.keys()
        assert f"{row['fid']:.2f}" in done.stdout
    assert "12 images are fewer than the 2048 features" in content["protocol"]["warning"]
    assert "warning: 12 images" in done.stdout and "published" not in done.stdout
    assert str(folder / "images") in content["protocol"]["scores"]
    weights.write_bytes(b"other weights")
    done = in_process(f"{line} --steps 1 --inception-path legacy", folder)
    assert "does not hold the published weights" in done.stdout
    scores = iter([(1.0, 0.0)])
    monkeypatch.setattr(evaluate, "inception_score", lambda logits: next(scores))
    with pytest.raises(StopIteration):
        in_process(f"{line} --steps 4 2 --seed 1", folder)
    assert row_names(read_report(folder / "runs/a/report-3.json")) == [("teacher", 4)]


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
    content = read_report(folder / "report.json")
    assert row_names(content) == [("folder", None)] and content["protocol"]["images"] == 12

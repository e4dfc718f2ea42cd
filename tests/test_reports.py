"""Runs read from disk by sample.py, and the reports of evaluate.py: whose images, which rows, in
which files. The runs are of tiny untrained networks, in the format of train.py's checkpoints."""
import json
import os
import shutil
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import in_process, refused
from PIL import Image

import evaluate
import fpd
import sample
import tokenizer
from models import INCEPTION, ConvNet, MaskGen, MaskGIT, Words
from tokenizer import VQGAN

CONFIG = dict(dataset="shapes", smoke=True, data="", anywhere=False, seed=0, guidance=2.0,
              confidence_noise=2.0, init_mask=0.9, temperature=1.0, remask=(0.1, 0.9),
              teacher_cfg=2.0)


def part_of(cls, **args):
    """A network as train.py prepares it; a seed of its own, so that two runs differ."""
    return dict(cls=cls.__name__, args=args, state=cls(**args).state_dict())


def write_run(path, names, seed=0, saved=1.0, **config):
    """A run of tiny networks in the format of train.py: the checkpoint file `path`."""
    torch.manual_seed(seed)
    n = len(names)
    vqgan = dict(K=32, d=4, ch=4, ch_mult=(1, 1, 1, 1), z_channels=4, groups=2)
    parts = {"tokenizer": part_of(VQGAN, **vqgan)}
    if config.get("dataset") == "scenes":
        parts["text"] = part_of(Words)
        parts["teacher"] = part_of(MaskGen, K=32, L=16, width=16, depth=1, heads=2)
    else:
        parts["judge"] = part_of(ConvNet, num_classes=n, width=4)
        parts["teacher"] = part_of(MaskGIT, K=32, L=16, num_classes=n, width=16, depth=1, heads=2,
                                   mlp=16)
    student = {key: value + 0.1 * torch.randn_like(value)
               for key, value in parts["teacher"]["state"].items()}
    content = dict(format=sample.FORMAT, saved=saved, step=4, config=CONFIG | config, names=names,
                   parts=parts, student=student, ema=student, opt={},
                   rng=torch.zeros(1, 8, dtype=torch.uint8))
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path


def change_run(path, change):
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)


def save_image(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)


def write_folder(place, sizes):
    """DIR/<class>/*.png: so many images of each class, of the shapes world."""
    for label, n in enumerate(sizes):
        images = tokenizer.shapes(torch.full((n,), label), seed=label)
        for i, image in enumerate(images):
            save_image(place / f"class {label:02d}" / f"{i:03d}.png", image)


def run_of_shapes(folder, name="a", **settings):
    return write_run(folder / "runs" / name / "checkpoint.pt", tokenizer.shapes_names(), **settings)


def read_report(path):
    return json.loads(path.read_text())


def row_names(content):
    return [(row["model"], row["steps"]) for row in content["rows"]]


# ---------------------------------------------------------------- a run is one file
def test_a_run_that_was_moved_draws_the_same_pictures(tmp_path):
    """Moved, copied among other runs with prepared parts of other weights, or sent as one file."""
    path = run_of_shapes(tmp_path)
    line = "sample.py --class 3 --n 2 --out here.png"
    assert in_process(line, tmp_path).returncode == 0
    elsewhere = tmp_path / "elsewhere"
    run_of_shapes(elsewhere, "b", seed=1)
    shutil.copytree(tmp_path / "runs" / "a", elsewhere / "runs" / "copy")
    shutil.copy(path, elsewhere / "sent.pt")
    (elsewhere / "runs" / "prepared").mkdir()
    torch.save(part_of(VQGAN), elsewhere / "runs" / "prepared" / "shapes-tokenizer-0123456789.pt")
    pictures = {}
    for run in ("runs/copy", "sent.pt", "runs/copy/checkpoint.pt", "runs/b"):
        done = in_process(f"{line} --run {run}", elsewhere)
        assert done.returncode == 0, done.stderr
        pictures[run] = (elsewhere / "here.png").read_bytes()
    shutil.rmtree(tmp_path / "runs")
    expected = (tmp_path / "here.png").read_bytes()
    assert pictures["runs/copy"] == pictures["sent.pt"] == expected
    assert pictures["runs/copy/checkpoint.pt"] == expected and pictures["runs/b"] != expected


def test_a_run_says_what_is_wrong_with_one_of_its_parts(tmp_path):
    path = run_of_shapes(tmp_path)
    whole = path.read_bytes()
    for change, says in (
            (lambda c: c["parts"]["judge"].update(cls="os.system"), "judge of .*is no network"),
            (lambda c: c["parts"]["teacher"]["args"].update(K="x"), "teacher of .*is no network"),
            (lambda c: c["parts"]["teacher"]["state"].popitem(), "teacher of .*does not fit"),
            (lambda c: c["ema"].popitem(), "student of .*does not fit"),
            (lambda c: c.pop("saved"), "saved should be in it"),
            (lambda c: c.update(format=2), "has format 2, older than 4")):
        path.write_bytes(whole)
        change_run(path, change)
        with pytest.raises(ValueError, match=says):
            sample.load_run(tmp_path / "runs" / "a", "cpu")


def test_the_newest_run_is_what_its_checkpoint_says_and_is_named_first(tmp_path):
    """Not the file's time, which a copy changes. What cannot be read is left out."""
    run_of_shapes(tmp_path, "first", saved=2.0, seed=1)
    run_of_shapes(tmp_path, "last", saved=3.0)
    shutil.copytree(tmp_path / "runs" / "first", tmp_path / "runs" / "z-copy")
    (tmp_path / "runs" / "y-damaged").mkdir()
    (tmp_path / "runs" / "y-damaged" / "checkpoint.pt").write_bytes(b"PK")
    (tmp_path / "runs" / "x-folder" / "checkpoint.pt").mkdir(parents=True)
    for line in ("sample.py --n 1", "evaluate.py --images 48 --steps 1"):
        done = in_process(line, tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[0] == "run runs/last: shapes, 4 steps"
    shutil.rmtree(tmp_path / "runs" / "last")
    assert sample.newest_run(tmp_path / "runs").name == "z-copy"
    for name in ("first", "z-copy"):
        shutil.rmtree(tmp_path / "runs" / name)
    with pytest.raises(ValueError, match="y-damaged/checkpoint.pt cannot be read"):
        sample.newest_run(tmp_path / "runs")


def test_an_official_file_must_be_the_one_of_the_run(tmp_path, monkeypatch):
    """Found where it was, or else in weights/, or in the folder that is named and nowhere else: in
    each place its digest decides."""
    monkeypatch.chdir(tmp_path)
    files = {}
    for part in ("tokenizer", "teacher"):
        files[part] = tmp_path / f"{part}.pt"
        files[part].write_bytes(part.encode())
    parts = {part: dict(file=str(file), sha256=sample.file_digest(file))
             for part, file in files.items()}

    def find(weights=None):
        return sample.find_files_of_run("run.pt", "imagenet", parts, True, weights)

    def refused(weights=None):
        with pytest.raises(ValueError, match="is not the teacher that run.pt was made with") as e:
            find(weights)
        assert "DIR/MaskGIT_ImageNet_256.pth" in str(e.value) and "\n" not in str(e.value)
    assert find() == files
    for folder in ("weights", "moved"):
        (tmp_path / folder).mkdir()
        shutil.copy(files["tokenizer"], Path(folder, "last.ckpt"))
    with pytest.raises(ValueError, match="no weights for teacher.*moved.MaskGIT_ImageNet_256.pth"):
        find("moved")
    moved, place = (Path(folder, "MaskGIT_ImageNet_256.pth") for folder in ("moved", "weights"))
    shutil.copy(files["teacher"], moved)
    assert find("moved") == dict(tokenizer=Path("moved/last.ckpt"), teacher=moved)
    files["teacher"].rename(place)
    assert find() == files | dict(teacher=place)
    for wrong, named in ((place, None), (moved, "moved"), (files["teacher"], None)):
        wrong.write_bytes(b"another network")
        refused(named)


def test_digests_of_networks_tell_weights_apart():
    a, b = MaskGIT(width=16, depth=1, heads=2), MaskGIT(width=16, depth=1, heads=2)
    assert len(sample.digest(a)) == 12 and sample.digest(a) != sample.digest(b)
    b.load_state_dict(a.state_dict())
    assert sample.digest(a) == sample.digest(b)


@pytest.mark.parametrize("n", [2, 5, 10, 12, 13, 17, 23, 24, 25, 100, 1000])
def test_a_sheet_shows_no_class_twice(n):
    run = types.SimpleNamespace(text=None, names=[str(i) for i in range(n)])
    c, captions = sample.shown(run)
    assert len(c.unique()) == len(c) == len(captions) and c.max() < n
    assert captions == [str(int(i)) for i in c]
    if n <= 12:
        assert c.tolist() == list(range(n))
    if n == 24:
        # every shape, every colour
        assert c.tolist() == [0, 2, 5, 7, 8, 10, 13, 15, 16, 18, 21, 23]


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    def stop(path):
        path.write_text("half")
        raise OSError("No space left on device")
    sample.write_json(tmp_path / "x.json", dict(a=1))
    with pytest.raises(OSError, match="No space"):
        sample.write_whole(tmp_path / "x.json", stop)
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]
    assert json.loads((tmp_path / "x.json").read_text()) == dict(a=1)


def test_too_little_memory_is_one_line(tmp_path, monkeypatch):
    run_of_shapes(tmp_path)

    def no_memory(*args):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate ...")
    monkeypatch.setattr(sample, "tokens", no_memory)
    done = in_process("sample.py --n 1", tmp_path)
    # behind the bar, which is wiped out
    line = done.stderr.split("\r")[-1]
    assert done.returncode == 2 and line.startswith("error: the GPU has too little free memory")
    assert line.count("\n") == 1


# ---------------------------------------------------------------- the fixed point of Eq. 3
@pytest.mark.parametrize("dataset", ["shapes", "scenes"])
def test_the_fixed_point_stands_between_teacher_and_student(dataset, tmp_path, monkeypatch):
    """It starts from the teacher's samples of most steps."""
    names = tokenizer.shapes_names()
    if dataset == "scenes":
        names = tokenizer.scene_captions(12, 3)
    write_run(tmp_path / "runs" / "a" / "checkpoint.pt", names, dataset=dataset)
    starts, sheets = [], []

    def draw(run, z, c, seed, batch=60):
        starts.append(z)
        return original(run, z, c, seed, batch)
    original = evaluate.draw_fixed_point
    monkeypatch.setattr(evaluate, "draw_fixed_point", draw)
    monkeypatch.setattr(evaluate, "sheet", lambda *args: sheets.append(args) or sample.sheet(*args))
    done = in_process("evaluate.py --images 48 --steps 2 4", tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    content = read_report(tmp_path / "runs/a/report.json")
    assert row_names(content) == [("real", None), ("round trip", None), ("teacher", 4),
                                  ("teacher", 2), ("fixed point", None), ("student", 1)]
    assert content["rows"][4].keys() == content["rows"][5].keys()
    assert content["rows"][4]["ms_per_image"] is None
    assert "8 rounds" in content["protocol"]["fixed_point"]
    assert [title.split("  ")[0].strip() for title, _ in sheets[0][0]] == [
        "real", "round trip", "teacher 4", "teacher 2", "fixed point", "student 1"]
    run = sample.load_run(tmp_path / "runs" / "a", "cpu")
    _, c, _ = evaluate.scorer(run, evaluate.real_images(run), 48)
    drawn = list(sample.batches(run.teacher, run.tokenizer, c, run.cfg, 4))
    assert len(starts) == 1 and torch.equal(starts[0], torch.cat([z for z, _, _ in drawn]))


def test_the_fixed_point_does_not_depend_on_the_batch(tmp_path):
    """And it is `fpd.fixed_point` with the run's settings, image for image."""
    run = sample.load_run(run_of_shapes(tmp_path), "cpu")
    z, c = torch.randint(32, (7, 16)), torch.arange(7)
    images = evaluate.draw_fixed_point(run, z, c, seed=3)
    assert torch.equal(images, evaluate.draw_fixed_point(run, z, c, seed=3, batch=2))
    assert not torch.equal(images, evaluate.draw_fixed_point(run, z, c, seed=4))
    generators = fpd.generators(3, 7, 7, "cpu")
    end = fpd.fixed_point(run.teacher, z, c, run.cfg, generators, rounds=8)
    assert torch.equal(images, sample.decode(run.tokenizer, end, c))


def test_without_rows_of_the_teacher_there_is_no_fixed_point(tmp_path):
    run_of_shapes(tmp_path)
    assert in_process("evaluate.py --images 48 --steps", tmp_path).returncode == 0
    content = read_report(tmp_path / "runs/a/report.json")
    assert [name for name, _ in row_names(content)] == ["real", "round trip", "student"]


# ---------------------------------------------------------------- real images
@pytest.fixture
def own_images(tmp_path):
    """A run of a folder of 10 classes of 40 images, and the folder it runs in."""
    write_folder(tmp_path / "data", [40] * 10)
    names = [f"class {label:02d}" for label in range(10)]
    write_run(tmp_path / "runs" / "own" / "checkpoint.pt", names, dataset="folder", data="data")
    return tmp_path


def test_real_images_are_compared_with_others_of_all_classes(own_images, monkeypatch):
    """40 test images for rows of 48: one half against the other, of every class in both."""
    compared = []

    def record(run, images, labels, n):
        metrics = original(run, images, labels, n)

        def recorded(fake, label):
            compared.append((images, labels, fake, label))
            return metrics(fake, label)
        return recorded
    original = evaluate.judge_metrics
    monkeypatch.setattr(evaluate, "judge_metrics", record)
    done = in_process("evaluate.py --images 48 --steps 1", own_images)
    assert done.returncode == 0, done.stderr[-2000:]
    reference, labels, fake, label = compared[0]
    assert labels.bincount().tolist() == label.bincount().tolist() == [2] * 10
    for image in fake:
        assert not (reference == image).flatten(1).all(1).any()
    # all other rows are compared with all real images, and asked for in their shares
    reference, labels, _, label = compared[-1]
    assert len(reference) == 40 and label.bincount().tolist() == [5] * 8 + [4] * 2
    content = read_report(own_images / "runs/own/report.json")
    real = content["rows"][0]
    assert real["model"] == "real" and real["fd"] > 0
    says = f"even that of 20 real ones against the 20 others is {real['fd']:.2f}"
    assert says in content["protocol"]["warning"] and says in done.stdout


def test_rows_are_asked_for_in_the_shares_of_the_real_images(tmp_path):
    run = types.SimpleNamespace(text=None, names=["a", "b", "c"], judge=ConvNet(3, width=4),
                                cfg=types.SimpleNamespace(dataset="shapes"))
    labels = torch.tensor([0, 2, 2, 2] * 6)
    asked, c, _ = evaluate.scorer(run, (tokenizer.shapes(labels, 0), labels), 48)
    assert asked is c and asked.bincount().tolist() == [12, 0, 36]


def test_what_cannot_be_scored_is_said(tmp_path):
    """Classes without a real image, too few for precision, too few to split."""
    run = sample.load_run(run_of_shapes(tmp_path), "cpu")
    # a world without the spread of shapes
    run.names, run.cfg.dataset = ["a", "b", "c", "d"], "own"
    for n, words in ((3, ("no real images, so no scores, of 1 classes: d", "3 real images",
                          "too few to split")),
                     (6, ("of 1 classes: d", "even that of 3 real ones against the 3 others is")),
                     (2000, ("of 1 classes: d",))):
        labels = torch.arange(n) % 3
        real = tokenizer.shapes(labels, 0), labels
        row, m, others = evaluate.score_real(run, real, 960)
        says = evaluate.what_is_not_scored(run, real, row, m, others)
        assert all(word in says for word in words) and ("real ones" in says) == (n == 6), says
        assert ("precision" in row) == (n == 2000)
        content = evaluate.report(run, real, tmp_path, n=48, steps=(1,), stem=f"report of {n}")
        assert content["protocol"]["warning"] == says
        assert ("precision" in content["rows"][-1]) == (n > 3)


def test_a_class_without_an_image_shows_none():
    images = tokenizer.shapes(torch.tensor([0, 1, 1]), 0)
    shown = evaluate.first_of_each(images, torch.tensor([0, 1, 1]), torch.tensor([1, 2, 0]))
    assert torch.equal(shown[[0, 2]], images[[1, 0]]) and (shown[1] == 255).all()


def test_copies_of_training_images_are_found():
    """By the measure of images that nothing was trained on."""
    generator = torch.Generator().manual_seed(0)
    training, held_out, new = (torch.randn(n, 8, generator=generator).numpy()
                               for n in (500, 200, 1000))
    nearly = training + 0.01 * torch.randn(500, 8, generator=generator).numpy()
    half = np.concatenate([nearly, new[:500]])
    assert evaluate.copied_share(training, held_out, training) == 1
    assert evaluate.copied_share(nearly, held_out, training) == 1
    assert evaluate.copied_share(half, held_out, training) == pytest.approx(0.5, abs=0.05)
    assert evaluate.copied_share(new, held_out, training) == pytest.approx(0.05, abs=0.03)
    assert evaluate.copied_share(held_out, held_out, training) == pytest.approx(0.05)
    x = torch.randn(30, 8, generator=generator).numpy()
    expected = ((x[:, None] - training[None]) ** 2).sum(2).min(1) ** 0.5
    assert np.allclose(evaluate.nearest(x, training, block=7), expected, atol=1e-5)


def test_the_report_of_a_folder_says_how_many_drafts_are_copies(own_images):
    done = in_process("evaluate.py --images 48 --steps 1", own_images)
    assert done.returncode == 0 and "copies" in done.stdout
    content = read_report(own_images / "runs/own/report.json")
    assert all(0 <= row["copies"] <= 1 for row in content["rows"])
    # held-out images as the tokenizer draws them are the measure
    assert content["rows"][1]["model"] == "round trip"
    assert content["rows"][1]["copies"] == pytest.approx(0.05, abs=0.03)
    assert "copies" in content["protocol"]
    run = run_of_shapes(own_images, "shapes", saved=2.0)
    assert in_process("evaluate.py --images 48 --steps 1", own_images).returncode == 0
    content = read_report(run.parent / "report.json")
    assert not any("copies" in row for row in content["rows"])


def test_a_folder_whose_classes_have_changed_is_refused(own_images):
    """Every label would be another's."""
    (own_images / "data" / "class 00").rename(own_images / "data" / "class 99")
    done = in_process("evaluate.py --images 48 --steps 1", own_images)
    refused(done, "data has other classes than when runs/own/checkpoint.pt was trained", "class 99")


# ---------------------------------------------------------------- reports that stay
def test_a_report_of_other_settings_stays(tmp_path):
    """60 images, another seed, fewer rows: a file of their own, and said. The same settings, the
    same file; more rows, too."""
    path = run_of_shapes(tmp_path)
    line = "evaluate.py --images 48 --steps 1 2"
    assert in_process(line, tmp_path).returncode == 0
    folder = path.parent
    names = {"evaluate.py --images 60 --steps 1 2": "report-2",
             "evaluate.py --images 48 --steps 1 2 --seed 1": "report-3",
             "evaluate.py --images 48 --steps 1": "report-4"}
    for other, name in names.items():
        before = {p.name: p.read_bytes() for p in folder.iterdir()}
        done = in_process(other, tmp_path)
        assert done.returncode == 0, done.stderr
        assert f"report.json has other settings and stays; this report: {name}.json" in done.stdout
        after = {p.name: p.read_bytes() for p in folder.iterdir()}
        assert after.keys() - before.keys() == {f"{name}.json", f"{name}.png"}
        assert before.items() <= after.items()
    change_run(path, lambda content: content.update(step=8))
    for again in (line, "evaluate.py --images 48 --steps 1 2 4"):
        assert in_process(again, tmp_path).returncode == 0
        content = read_report(folder / "report.json")
        assert content["protocol"]["student_steps"] == 8
        assert len(list(folder.glob("report*.json"))) == 4
    assert ("teacher", 4) in row_names(content)


def test_what_is_no_report_stays_too(tmp_path):
    for content in ("", "[]", '{"rows": 3}', '{"protocol": [], "rows": []}'):
        (tmp_path / "report.json").write_text(content)
        assert evaluate.find_report(tmp_path, "report", dict(a=1)) == ("report-2", [])
    (tmp_path / "report.json").unlink()
    (tmp_path / "report.json").mkdir()
    assert evaluate.find_report(tmp_path, "report", dict(a=1)) == ("report-2", [])


def test_the_report_of_a_file_that_was_sent_has_its_name(tmp_path):
    shutil.move(run_of_shapes(tmp_path), tmp_path / "digits.pt")
    done = in_process("evaluate.py --images 48 --steps 1 --run digits.pt", tmp_path)
    assert done.returncode == 0, done.stderr
    reports = [path.name for path in tmp_path.glob("*report*")]
    assert sorted(reports) == ["digits-report.json", "digits-report.png"]


def test_settings_that_nobody_typed_are_the_run_s_own(tmp_path):
    """So `python evaluate.py` makes train.py's report again, and not another."""
    run_of_shapes(tmp_path, seed=0)
    change_run(tmp_path / "runs/a/checkpoint.pt", lambda content: content["config"].update(seed=5))
    assert in_process("evaluate.py --steps 1", tmp_path).returncode == 0
    protocol = read_report(tmp_path / "runs/a/report.json")["protocol"]
    assert protocol["seed"] == 5 and protocol["images"] == 48


# ---------------------------------------------------------------- the table of ImageNet
class Extract:
    """A stand-in for the Inception: 2048 features that differ from path to path, 10 logits."""
    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.matrix = torch.randn(3 * 16, 2048, generator=generator) / 10

    def to(self, device):
        return self

    def __call__(self, images, path):
        x = torch.nn.functional.adaptive_avg_pool2d(images.float() / 255, 4).flatten(1)
        features = x @ self.matrix + (0.5 if path == "legacy" else 0.0)
        return features, features[:, :10]


@pytest.fixture
def official(tmp_path, monkeypatch):
    """A folder with a run of ImageNet's kind, reference images and a stand-in for the Inception.
    -> the folder, a list of the rows that were computed"""
    write_run(tmp_path / "runs" / "a" / "checkpoint.pt", [str(i) for i in range(24)],
              dataset="imagenet")
    for i, image in enumerate(tokenizer.shapes(torch.arange(12), 0)):
        save_image(tmp_path / "images" / f"{i}.png", image)
    (tmp_path / "official").mkdir()
    (tmp_path / "official" / INCEPTION).write_bytes(b"weights")
    monkeypatch.setattr(evaluate, "load_inception", lambda path: Extract())
    # 2048 x 2048 eigenvalues take seconds
    monkeypatch.setattr(evaluate, "frechet_distance", lambda mu, sigma, *_: float(mu[0]))
    monkeypatch.setattr(evaluate.scipy.linalg, "eigvalsh", np.diag)
    computed, original = [], evaluate.row_of_model

    def row_of_model(args, run, model, network, steps, extract, target):
        computed.append((model, steps))
        return original(args, run, model, network, steps, extract, target)
    monkeypatch.setattr(evaluate, "row_of_model", row_of_model)
    return tmp_path, computed


LINE = "evaluate.py --reference images --weights official --images 12"


def test_an_official_table_goes_on_where_it_stopped(official, monkeypatch):
    """Each row is on the disk when it is done; the same command makes the others. Rows that are
    asked for later join their table."""
    folder, computed = official
    counted = evaluate.row_of_model

    def stopped(args, run, model, network, steps, extract, target):
        if model == "student":
            raise KeyboardInterrupt
        return counted(args, run, model, network, steps, extract, target)
    monkeypatch.setattr(evaluate, "row_of_model", stopped)
    assert in_process(f"{LINE} --steps 4 2", folder).returncode == 130
    report = folder / "runs/a/report.json"
    first = read_report(report)["rows"]
    assert row_names(read_report(report)) == [("teacher", 4), ("teacher", 2)]
    monkeypatch.setattr(evaluate, "row_of_model", counted)
    # the batch is no setting: less memory may be why it stopped
    done = in_process(f"{LINE} --steps 4 2 --batch 5", folder)
    assert done.returncode == 0 and "teacher 4: kept, of runs/a/report.json" in done.stdout
    assert computed == [("teacher", 4), ("teacher", 2), ("student", 0)]
    content = read_report(report)
    assert content["rows"][:2] == first and row_names(content)[2:] == [("student", 1)]
    assert in_process(f"{LINE} --steps 3", folder).returncode == 0
    assert computed[3:] == [("teacher", 3)]
    assert row_names(read_report(report)) == [("teacher", 4), ("teacher", 3), ("teacher", 2),
                                              ("student", 1)]
    picture = Image.open(folder / "runs/a/report.png")
    assert picture.height > 4 * 96


def test_of_an_official_table_only_rows_of_the_same_weights_are_kept(official):
    folder, computed = official
    path = folder / "runs/a/checkpoint.pt"
    assert in_process(f"{LINE} --steps 2", folder).returncode == 0

    def train_on(content):
        content["step"] = 8
        next(iter(content["ema"].values())).add_(1)
    change_run(path, train_on)
    assert in_process(f"{LINE} --steps 2", folder).returncode == 0
    assert computed == [("teacher", 2), ("student", 0), ("student", 0)]
    content = read_report(folder / "runs/a/report.json")
    assert content["protocol"]["student_steps"] == 8 and len(content["rows"]) == 2


def test_an_official_table_of_other_settings_gets_another_file(official):
    """Another seed, path or reference; and of folders, two of them."""
    folder, _ = official
    for words in ("", "--seed 1", "--inception-path legacy"):
        assert in_process(f"{LINE} --steps 1 {words}".strip(), folder).returncode == 0
    assert [path.name for path in sorted((folder / "runs/a").glob("*.json"))] == [
        "report-2.json", "report-3.json", "report.json"]
    shutil.copytree(folder / "images", folder / "other")
    for name, report in (("images", "report.json"), ("other", "report-2.json"),
                         ("images", "report.json")):
        done = in_process(f"{LINE} --folder {name}", folder)
        assert done.returncode == 0, done.stderr
        assert read_report(folder / report)["protocol"]["folder"].endswith(name)
    assert len(list(folder.glob("report*.json"))) == 2


def test_a_report_that_cannot_be_written_is_told_before_the_work(official, monkeypatch):
    """Also of --folder, in the folder of the command."""
    folder, computed = official
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK and access(path, mode))
    monkeypatch.setattr(evaluate, "collect", lambda *args: pytest.fail("features were computed"))
    for line in (f"{LINE} --steps 1", f"{LINE} --folder images"):
        refused(in_process(line, folder), "cannot be written into", "read-only")
    assert computed == []


def test_a_reference_made_in_another_way_is_told(official):
    """ADM's file has images besides mu and sigma: they say with which path these were made."""
    folder, _ = official
    images = tokenizer.shapes(torch.arange(240) % 24, 0)
    for path in ("legacy", "pytorch-fid"):
        features, _ = Extract()(images, path)
        mu, sigma = evaluate.statistics(features)
        np.savez(folder / f"{path}.npz", mu=mu, sigma=sigma,
                 arr_0=images[:60].permute(0, 2, 3, 1).numpy())
    for made, used in (("legacy", "legacy"), ("legacy", "pytorch-fid"),
                       ("pytorch-fid", "legacy"), ("pytorch-fid", "pytorch-fid")):
        line = (f"evaluate.py --reference {made}.npz --weights official --images 12 "
                f"--folder images --inception-path {used}")
        done = in_process(line, folder)
        assert done.returncode == 0, done.stderr
        says = f"do not fit its own images: they were not made with --inception-path {used}"
        assert (says in done.stdout) == (made != used)


def test_a_few_images_of_a_distribution_are_not_off():
    """And a shift of a third of a standard deviation is, in a hundred features."""
    generator = np.random.default_rng(0)
    scale = np.linspace(0.1, 1, 100)
    mu, sigma = np.zeros(100), np.diag(scale ** 2)
    off = [evaluate.mean_is_off(mu, sigma, generator.standard_normal((50, 100)) * scale)
           for _ in range(100)]
    assert not any(off)
    assert evaluate.mean_is_off(mu + scale / 3, sigma, generator.standard_normal((50, 100)) * scale)


def test_one_rule_for_image_folders(tmp_path):
    """--reference and --folder: .PNG and linked folders count, hidden files and folders do not."""
    images = tokenizer.shapes(torch.arange(6), 0)
    places = ("a.png", "B.PNG", "deep/er/c.jpg", ".Trash/d.png", "._e.png")
    for place, image in zip(places, images):
        save_image(tmp_path / "images" / place, image)
    save_image(tmp_path / "far" / "f.png", images[5])
    (tmp_path / "images" / "link").symlink_to(tmp_path / "far")
    (tmp_path / "images" / "notes.txt").write_text("hello")
    _, _, features = evaluate.reference(tmp_path / "images", lambda x: 2 * (x.float().flatten(1),))
    assert len(features) == 4
    args = types.SimpleNamespace(folder=tmp_path / "images", images=4)
    names = {path.name for path in evaluate.folder_files(args)}
    assert names == {"a.png", "B.PNG", "c.jpg", "f.png"}
    args.images = 5
    with pytest.raises(ValueError, match="has 4 images, fewer than the 5 asked for"):
        evaluate.folder_files(args)


@pytest.mark.parametrize("sigma, says", [
    (np.diag([1.0, -0.5]), "negative eigenvalues, down to -0.5"),
    (np.array([[1.0, 2.0], [2.0, 1.0]]), "negative eigenvalues, down to -1"),
    (np.array([[1.0, 0.5], [0.1, 1.0]]), "not symmetric"),
    (-np.eye(2), "negative eigenvalues")])
def test_a_covariance_that_cannot_be_gives_no_score(sigma, says, tmp_path):
    good = np.zeros(2), np.eye(2)
    for statistics in ((good, (good[0], sigma)), ((good[0], sigma), good)):
        with pytest.raises(ValueError, match=says):
            evaluate.frechet_distance(*statistics[0], *statistics[1])
    np.savez(tmp_path / "statistics.npz", mu=good[0], sigma=sigma)
    with pytest.raises(ValueError, match=f"statistics.npz: the covariance .*{says}"):
        evaluate.reference(tmp_path / "statistics.npz", None)


def test_a_covariance_of_few_images_in_float32_is_one():
    """Singular, and with the rounding that files have."""
    x = np.random.default_rng(0).standard_normal((10, 64))
    mu, sigma = evaluate.statistics(x)
    rounded = sigma.astype(np.float32)
    assert abs(evaluate.frechet_distance(mu, sigma, mu, rounded)) < 1e-3

"""The commands of the README, end to end and tiny: smoke runs of every data set, resume, pictures,
tables."""
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, command_line, in_process, own_copy, refused
from PIL import Image

import evaluate
import fpd
import models
import sample
import tokenizer
import train


def load(path):
    return torch.load(path, weights_only=True)


def same(a, b):
    """Are two nested containers of tensors equal to the last bit?"""
    if torch.is_tensor(a):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))
    return a == b


@pytest.fixture(scope="module")
def worlds(smoke_runs, tmp_path_factory):
    """-> function: name of a data set -> a folder with a smoke run of it, which tests may write
    into; GenEval's files for one prompt; DIR with images of two classes."""
    folders = {}

    def world(dataset):
        if dataset not in folders:
            folder = folders[dataset] = own_copy(tmp_path_factory, smoke_runs(dataset))
            prompt = dict(tag="single_object", include=[{"class": "dog", "count": 1}],
                          prompt="a photo of a dog")
            (folder / "evaluation_metadata.jsonl").write_text(json.dumps(prompt))
            found = dict(image="00000/samples/0000.png", detections=[])
            (folder / "FILE").write_text(json.dumps(found))
            for i, image in enumerate(tokenizer.shapes(torch.arange(40) % 2, 0)):
                place = folder / "DIR" / "ab"[i % 2]
                place.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image.permute(1, 2, 0).numpy()).save(place / f"{i}.png")
        return folders[dataset]
    return world


# ---------------------------------------------------------------- a run and what it leaves
def test_a_smoke_run_leaves_everything_and_says_that_it_learnt_nothing(smoke_runs):
    folder, done = smoke_runs("shapes")
    run = folder / "runs" / "shapes-smoke"
    for name in ("config.json", "log.jsonl", "checkpoint.pt", "student.pt", "report.jsonl",
                 "report.png", "samples/000000.png", "samples/000004.png", "samples.gif"):
        assert (run / name).is_file(), name
    assert "Nothing was learnt" in done.stdout
    # Where standard output is no terminal, lines take the place of a bar.
    assert re.findall(r"step (\d) of 4: loss", done.stdout) == ["1", "2", "3", "4"]
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log] == [1, 2, 3, 4]
    assert all("entropy" in row and "codes_used" in row for row in log)
    with Image.open(run / "samples.gif") as strip, Image.open(run / "samples/000004.png") as grid:
        # The grids of steps 0, 2 and 4
        assert strip.n_frames == 3 and strip.width == min(720, grid.width)


@pytest.mark.parametrize("dataset, flags", [
    ("shapes", ""), ("shapes", "--method sdtt"), ("imagenet", "--gan-weight 1 --data DIR"),
    ("laion", "--method dimo --captions captions.txt")])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(dataset, flags, worlds, no_pictures):
    """Student, EMA, optimiser, random numbers, auxiliary networks. The settings come from the
    checkpoint, and so do the prepared networks: their files may be gone."""
    folder = worlds(dataset)
    runs, away = folder / "runs", folder / "away"
    method = "sdtt" if "sdtt" in flags else dataset
    first = f"train.py --dataset {dataset} --smoke {flags}".split() + ["--name"]
    assert in_process([*first, f"whole-{method}"], folder).returncode == 0
    # The rounds of SDTT are quarters of the run, which therefore cannot be made longer: a signal
    # that comes in the second step stops it there.
    second, code, more = [*first, f"halves-{method}", "--steps", "2"], 0, ["--steps", "4"]
    with pytest.MonkeyPatch.context() as patch:
        if method == "sdtt":
            second, code, more = second[:-2], 143, []
            step = fpd.SDTT.step
            patch.setattr(fpd.SDTT, "step", lambda self, student, c, number, *rest: (
                number == 2 and signal.raise_signal(signal.SIGTERM),
                step(self, student, c, number, *rest))[1])
        done = in_process(second, folder)
    assert done.returncode == code, done.stderr[-2000:]
    assert load(runs / f"halves-{method}" / "checkpoint.pt")["step"] == 2
    # After kill -9, the log may have lines that the checkpoint does not know of.
    log = runs / f"halves-{method}" / "log.jsonl"
    with open(log, "a") as file:
        file.write('{"step": 3}\n{"st')
    if (runs / "prepared").exists():
        (runs / "prepared").rename(away)
    try:
        done = in_process(["train.py", "--resume", "--name", f"halves-{method}", *more], folder)
        assert done.returncode == 0, done.stderr[-2000:]
        assert not (runs / "prepared").exists()
    finally:
        if away.exists():
            away.rename(runs / "prepared")
    whole, halves = (load(runs / f"{name}-{method}" / "checkpoint.pt")
                     for name in ("whole", "halves"))
    assert log.read_text() == (runs / f"whole-{method}" / "log.jsonl").read_text()
    differs = dict(name=f"halves-{method}", resume=True)
    assert halves.pop("config") == whole.pop("config") | differs
    assert same(whole, halves)


def test_resume_keeps_the_settings_of_the_run(worlds):
    folder = worlds("shapes")
    before = (folder / "runs/shapes-smoke/config.json").read_text()
    for flag in ("--init-mask 0.5", "--tokenizer-steps 9", "--blocks 0 1", "--dataset scenes",
                 "--seed 9", "--temperature 1", "--sample-guidance 8", "--smoke"):
        refused(in_process(f"train.py --resume --name shapes-smoke --steps 9 {flag}", folder),
                "--resume keeps the run's settings", "--steps", "--weights")
    refused(in_process("train.py --resume --name shapes-smoke --steps 3", folder), "already done 4")
    assert (folder / "runs/shapes-smoke/config.json").read_text() == before


def test_a_grid_that_cannot_be_drawn_costs_no_step(worlds, no_pictures, monkeypatch):
    """The checkpoint comes first."""
    def fails(cfg, nets, ema, folder, step, rows):
        if step == 2:
            raise OSError("the disk is full")
    monkeypatch.setattr(train, "sample_grid", fails)
    refused(in_process("train.py --smoke --name grid", worlds("shapes")), "the disk is full")
    assert load(worlds("shapes") / "runs/grid/checkpoint.pt")["step"] == 2


def test_a_foreign_file_among_the_grids_is_left_alone(worlds, tmp_path):
    nets = sample.load_run(worlds("shapes") / "runs/shapes-smoke", "cpu")
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples/000004 copy.png").write_bytes(b"no picture")
    train.sample_grid(nets.cfg, nets, nets.student, tmp_path, 6, [])
    with Image.open(tmp_path / "samples.gif") as strip:
        assert strip.n_frames == 1


def test_ctrl_c_finishes_the_step_saves_and_says_how_to_go_on(worlds):
    folder = worlds("shapes")
    log = folder / "runs/stopped/log.jsonl"
    line = "train.py --smoke --steps 1000 --sample-every 2000 --save-every 1000 --name stopped"
    process = subprocess.Popen(command_line(line), cwd=folder, stdout=subprocess.PIPE,
                               stderr=subprocess.DEVNULL, text=True)
    try:
        for _ in range(1200):
            if log.exists() and log.stat().st_size or process.poll() is not None:
                break
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=100)
    finally:
        process.kill()
    assert process.returncode == 130 and "train.py --resume --name stopped" in out
    saved = load(log.parent / "checkpoint.pt")
    assert saved["step"] == json.loads(log.read_text().splitlines()[-1])["step"]


@pytest.mark.parametrize("term", ["loss", "grad_norm"])
def test_a_number_that_is_not_finite_stops_the_run_and_spares_the_checkpoint(
        worlds, no_pictures, monkeypatch, term):
    folder, step, calls = worlds("shapes"), fpd.fpd_step, []

    def spoiled(*args):
        loss, logs, images = step(*args)
        calls.append(args)
        if len(calls) == 3:
            # The root's value is 0, its gradient is not finite.
            root = (images - images.detach()).abs().sqrt().sum()
            loss = loss + root if term == "grad_norm" else loss * float("inf")
        return loss, logs, images

    monkeypatch.setattr(fpd, "fpd_step", spoiled)
    done = in_process(f"train.py --smoke --name nan-{term}", folder)
    assert done.returncode == 1
    assert re.search(f"{term} is (nan|inf) at step 3", done.stderr), done.stderr[-500:]
    saved = load(folder / f"runs/nan-{term}/checkpoint.pt")
    assert saved["step"] == 2
    assert all(x.isfinite().all() for x in saved["ema"].values())


@pytest.mark.slow
def test_own_images_in_folders_train_too(tmp_path, no_pictures):
    """Class names with spaces, or numbers."""
    for name, blue in (("one class", 20), ("2", 200)):
        place = tmp_path / "data" / name
        place.mkdir(parents=True)
        for i in range(30):
            Image.new("RGB", (40, 50), (i * 8, 100, blue)).save(place / f"{i} (copy).png")
    done = in_process("train.py --dataset folder --data data --smoke", tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "60 images" in done.stdout
    done = in_process(["sample.py", "--class", "one class", "--n", "2"], tmp_path)
    assert done.returncode == 0 and "| one class |" in done.stdout
    # They may be moved, but not changed.
    (tmp_path / "data").rename(tmp_path / "pictures")
    line = "train.py --resume --steps 5 --data pictures"
    assert in_process(line, tmp_path).returncode == 0
    (tmp_path / "pictures/2/0 (copy).png").unlink()
    refused(in_process(line, tmp_path), "not the images that the run was trained on")


@pytest.mark.parametrize("text, label", [
    ("2", 0), ("02", 0), ("café", 1), ("cafe\u0301", 1), ("1", 3), ("0", 0), ("3", 3)])
def test_a_class_is_found_by_its_name_and_then_by_its_number(text, label):
    """As it is typed: without the zeros of a folder's name, in either form of an accent."""
    names = ["02", "cafe\u0301", "crane 134", "crane 517"]
    if text == "1":
        names[3] = "01"
    assert sample.class_index(text, names) == label
    with pytest.raises(ValueError, match=r"a name \(crane 134"):
        sample.class_index("crane", names)


@pytest.mark.slow
def test_two_processes_train_one_student(worlds):
    """torchrun: rank 0 prepares and writes, and no process is left waiting for the other."""
    folder = worlds("shapes")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                "--nproc-per-node=2"]
    words = command_line("train.py --smoke --gpus 0 --steps 2 --teacher-steps 5 --name two")[1:]
    done = subprocess.run([*torchrun, *words], cwd=folder, capture_output=True, text=True,
                          timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("teacher.pt: training") == 1
    assert len((folder / "runs/two/log.jsonl").read_text().splitlines()) == 2


# ---------------------------------------------------------------- pictures and tables
def test_sample_by_number_and_by_name_is_the_same_picture(worlds):
    folder = worlds("shapes")
    for out, label in (("number.png", "1"), ("name.png", "red square")):
        words = ["sample.py", "--class", label, "--n", "4", "--out", out]
        done = in_process([*words, "--run", "runs/shapes-smoke"], folder)
        assert done.returncode == 0, done.stderr
    assert (folder / "number.png").read_bytes() == (folder / "name.png").read_bytes()
    refused(in_process("sample.py --class violet", folder), "0 to 23", "red circle")
    refused(in_process("sample.py --class 207", folder), "--dataset imagenet --class 207")
    refused(in_process("sample.py --prompt violet", folder), "--class")
    # A CPU's generator would give the images of seed 0. A large grid is too large for JPEG.
    refused(in_process("sample.py --seed 67108864", folder), "seeds are 0 to 4293")
    refused(in_process("sample.py --n 5400 --out x.jpg", folder), ".png")


def test_a_checkpoint_that_was_sent_elsewhere_draws_the_same_pictures(worlds, tmp_path):
    """It holds all that is needed: no prepared networks are looked for."""
    folder = worlds("shapes")
    sent = tmp_path / "sent.pt"
    shutil.copy(folder / "runs/shapes-smoke/checkpoint.pt", sent)
    for options in ("--n 4", "--n 2 --teacher --steps 2"):
        pictures = []
        for place, run in ((folder, "runs/shapes-smoke"), (tmp_path, "sent.pt")):
            done = in_process(f"sample.py {options} --out sent.png --run {run}", place)
            assert done.returncode == 0, done.stderr
            pictures.append((place / "sent.png").read_bytes())
        assert pictures[0] == pictures[1]


def test_a_student_is_sampled_with_the_settings_that_it_was_trained_with(worlds, monkeypatch):
    """Another share of masked tokens or another temperature would give worse pictures, and no
    error."""
    saved = load(worlds("shapes") / "runs/shapes-smoke/checkpoint.pt")
    saved["config"] |= dict(init_mask=0.5, temperature=0.7)
    path = worlds("shapes") / "changed.pt"
    torch.save(saved, path)
    nets = sample.load_run(path, "cpu")
    shares, temperatures, draw, remask = [], [], fpd.draw, fpd.remask
    monkeypatch.setattr(fpd, "remask", lambda z, r, *rest: shares.append(r) or remask(z, r, *rest))
    monkeypatch.setattr(fpd, "draw", lambda logits, temperature, generator:
                        temperatures.append(temperature) or draw(logits, temperature, generator))
    images = sample.generate(nets.student, nets.tokenizer, torch.arange(2), nets.cfg)
    assert images.shape == (2, 3, 32, 32) and images.dtype == torch.uint8
    assert [r.tolist() for r in shares] == [[0.5, 0.5]] and temperatures == [0.7]


def test_without_a_run_the_student_of_the_repository_draws(tmp_path):
    """What it is asked for, by the scorer of scenes; a network that has learnt nothing does not."""
    done = in_process(["sample.py", "--class", "red circle", "--n", "4"], tmp_path)
    assert done.returncode == 0 and done.stdout.startswith(f"run {sample.STUDENT}: shapes, 320")
    assert Image.open(tmp_path / "sample.png").size[0] > 4 * 96
    refused(in_process("sample.py --teacher", tmp_path), "student alone")
    refused(in_process(f"evaluate.py --run {sample.STUDENT}", tmp_path), "student alone")
    nets = sample.load_run(sample.STUDENT, "cpu")
    wanted = ["red circle", "green square", "blue triangle", "magenta cross"] * 24
    c = torch.tensor([nets.names.index(name) for name in wanted])

    def share(model):
        found = [evaluate.scene_objects(image)[:1]
                 for image in sample.generate(model, nets.tokenizer, c, nets.cfg)]
        drawn = [[f"{thing['colour']} {thing['shape']}" for thing in things] for things in found]
        return sum(names == [name] for names, name in zip(drawn, wanted)) / len(wanted)
    torch.manual_seed(0)
    assert share(nets.student) >= 0.9 and share(models.MaskGIT().eval()) < 0.1


def test_an_image_depends_on_its_seed_and_number_alone(worlds):
    nets = sample.load_run(worlds("shapes") / "runs/shapes-smoke", "cpu")
    c = torch.arange(5)
    one_batch = sample.generate(nets.student, nets.tokenizer, c, nets.cfg, seed=3)
    batches_of_2 = sample.generate(nets.student, nets.tokenizer, c, nets.cfg, seed=3, batch=2)
    assert torch.equal(one_batch, batches_of_2)


# ---------------------------------------------------------------- README.md
LINES = []
for block in (ROOT / "README.md").read_text().split("\n```")[1::2]:
    for text in block.splitlines():
        words = shlex.split(text, comments=True) if text.startswith("python ") else ["", ""]
        # Without comments, and each once.
        if words[1] in ("train.py", "sample.py", "evaluate.py") and words[1:] not in LINES:
            LINES.append(words[1:])


def test_commands_are_found():
    assert len(LINES) > 12 and {words[0] for words in LINES} == {"train.py", "sample.py",
                                                                 "evaluate.py"}


@pytest.mark.parametrize("words", [words for words in LINES if words[0] == "train.py"],
                         ids=shlex.join)
def test_the_trainings_of_the_readme_are_accepted(words, worlds, monkeypatch):
    """Smoke runs of each kind are made by the tests above."""
    monkeypatch.chdir(worlds("shapes"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    if words[1:] == ["--help"]:
        with pytest.raises(SystemExit, match="0"):
            train.parse(words[1:])
    else:
        assert isinstance(train.parse(words[1:]), train.Config)


@pytest.mark.parametrize("words", [words for words in LINES if words[0] != "train.py"],
                         ids=shlex.join)
def test_pictures_and_scores_are_made(words, worlds):
    """Of smoke runs. Where official files are needed, that they are missing is all that is
    wrong."""
    line = shlex.join(words)
    if "207" in line or "--reference" in line:
        dataset = "imagenet"
    elif "laion" in line or "--geneval" in line or "car" in line:
        dataset = "laion"
    else:
        dataset = "scenes" if "--prompt" in line else "shapes"
    if words[0] == "sample.py":
        words = [*words, "--n", "1"]
    elif "--geneval" not in line and "--reference" not in line:
        words = [*words, "--images", "48", "--steps", "1"]
    done = in_process(words, worlds(dataset))
    if "--dataset" in line or "--reference" in line:
        refused(done)
    else:
        assert done.returncode == 0, done.stderr[-2000:]

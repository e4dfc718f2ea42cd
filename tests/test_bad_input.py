"""Wrong uses of the three commands, files of every bad kind: each ends in one line that says what
is wrong, and nothing is overwritten.

Networks' own files are in test_official.py, test_imagenet.py and test_tatitok.py, those of GenEval
in test_geneval.py.
"""
import json
import os

import numpy as np
import pytest
import torch
from conftest import in_process, own_copy, refused
from PIL import Image

import models
import sample
import tokenizer

LONG = "very " * 80 + "long tail"


class Malicious:
    """Unpickling it would create a file."""
    def __reduce__(self):
        return os.system, ("touch marker",)


def cut(path):
    return path.read_bytes()[:-2000]


@pytest.fixture(scope="module")
def world(smoke_runs, tmp_path_factory):
    """A folder with a smoke run of each dataset, that of shapes the newest, damaged copies of it,
    and files of every bad kind."""
    datasets = ("laion", "scenes", "imagenet", "shapes")
    folder = own_copy(tmp_path_factory, *(smoke_runs(dataset) for dataset in datasets))
    damage_runs(folder)
    make_images(folder)
    make_texts(folder)
    return folder


def damage_runs(folder):
    """runs/<name>, each damaged in its own way; older than all others."""
    newest = folder / "runs/shapes-smoke/checkpoint.pt"
    good = torch.load(newest, weights_only=True)
    first, *others = good["ema"]
    parts, teacher = good["parts"], good["parts"]["teacher"]

    def run(name, content):
        """With this in place of a checkpoint, or a checkpoint with these of its entries changed."""
        path = folder / "runs" / name / "checkpoint.pt"
        path.parent.mkdir()
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif isinstance(content, list):
            torch.save(content, path)
        else:
            torch.save(good | dict(saved=-1.0) | content, path)

    def weights(value):
        return dict(student=good["student"] | value, ema=good["ema"] | value)

    def part(name, content):
        """Its teacher is another."""
        run(name, dict(parts=parts | dict(teacher=content)))

    run("cut", cut(newest))
    run("text", b"not a checkpoint")
    run("list", [1])
    run("malicious", dict(config=Malicious()))
    run("foreign", dict(student=None))
    run("later", dict(config=good["config"] | dict(unheard_of=1)))
    run("format", dict(format=99))
    run("key", {part: {key: good[part][key] for key in others} for part in ("student", "ema")})
    run("shape", weights({first: torch.zeros(3)}))
    run("nan", weights({first: good["ema"][first] * float("nan")}))
    nan = teacher["state"] | {first: teacher["state"][first] * float("nan")}
    part("part-foreign", dict(cls="os.system", args={}, state={}))
    part("part-malicious", teacher | dict(state=Malicious()))
    part("part-key", teacher | dict(state={key: teacher["state"][key] for key in others}))
    part("part-nan", teacher | dict(state=nan))
    (folder / "runs/directory/checkpoint.pt").mkdir(parents=True)


def make_images(folder):
    for name in ("empty", "few/a", "few/b", "one/class", "hollow/full", "hollow/nothing here",
                 "broken/a", "broken/b", "torn/a", "torn/b", "folder.png"):
        (folder / name).mkdir(parents=True)
    plain = Image.new("RGB", (8, 8))
    for i in range(30):
        for name in ("few/" + "ab"[i % 2], "broken/a", "broken/b", "torn/a", "torn/b", "one/class"):
            plain.save(folder / name / f"{i}.png")
    for i in range(30, 50):
        plain.save(folder / f"one/class/{i}.png")
    plain.save(folder / "hollow/full/a.png")
    (folder / "broken/a/text.png").write_text("not an image")
    noise = np.random.RandomState(0).randint(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "torn/a/b.jpg")
    (folder / "torn/a/b.jpg").write_bytes(cut(folder / "torn/a/b.jpg"))
    np.savez(folder / "adm.npz", arr_0=np.zeros((12, 8, 8, 3), np.uint8))


def make_texts(folder):
    texts = {"some.txt": "a dog\n", "empty.txt": " \n\n", "file": "",
             f"official/{models.INCEPTION}": "not weights"}
    (folder / "official").mkdir()
    for name, content in texts.items():
        (folder / name).write_text(content)
    (folder / "latin.txt").write_bytes("a dog\na café\n".encode("latin-1"))
    for name, captions in (("dog.jsonl", ["a photo of a dog"]),
                           ("purple.jsonl", ["a circle", "a purple circle"])):
        lines = []
        for caption in captions:
            include = [{"class": "dog", "count": 1}]
            lines.append(json.dumps(dict(tag="single_object", include=include, prompt=caption)))
        (folder / name).write_text("\n".join(lines) + "\n")


WRONG = [
    # flags
    ("train.py --smoke --steps", "--steps: expected one argument"),
    ("train.py --smoke --step 3", "unrecognized arguments: --step 3"),
    ("train.py --smoke now", "unrecognized arguments: now"),
    ("sample.py --n many", "invalid int value: 'many'"),
    ("sample.py --clas 3", "unrecognized arguments: --clas 3"),
    ("train.py --smoke --lr fast", "invalid float value: 'fast'"),
    # train.py: settings
    ("train.py --smoke --dataset cifar", "--dataset should be one of"),
    ("train.py --smoke --batch 1", "--batch"),
    ("train.py --smoke --batch 1 --per-class 1", "--batch should be at least 2"),
    ("train.py --smoke --method dimo --per-class 0", "--per-class should be at least 1"),
    ("train.py --smoke --steps 0", "--steps should be at least 1"),
    ("train.py --smoke --seed -3", "--seed should be between 0 and"),
    ("train.py --smoke --seed 99999999999999999999", "--seed should be between"),
    ("train.py --smoke --init-mask 0", "--init-mask"),
    ("train.py --smoke --lift-chunk 0", "--lift-chunk should be at least 1"),
    ("train.py --smoke --bandwidths 0", "--bandwidths should be positive"),
    ("train.py --smoke --bandwidths 0.1 nan", "--bandwidths should be finite"),
    ("train.py --smoke --lr nan", "--lr should be finite"),
    ("train.py --smoke --lr 0", "--lr should be positive"),
    ("train.py --smoke --temperature inf", "--temperature should be finite"),
    ("train.py --smoke --ema 1.5", "--ema is a share"),
    ("train.py --smoke --decay -1", "--decay is a share"),
    ("train.py --smoke --draft teacher", "--draft should be one of student, random"),
    ("train.py --smoke --space token", "--space should be one of feature, pixel"),
    ("train.py --smoke --grid 0", "--grid should be between 1 and 32"),
    ("train.py --smoke --grid 33", "--grid should be between 1 and 32"),
    ("train.py --smoke --blocks 2 5 8 11", "--blocks of the small Phi are 0 to 3"),
    ("train.py --gpus 999", "--gpus"),
    ("train.py --smoke --gan-weight -1", "--gan-weight should not be negative"),
    ("train.py --smoke --dataset scenes --anywhere", "--anywhere goes with --dataset shapes"),
    ("train.py --smoke --weights official", "--weights goes with --dataset imagenet or laion"),
    ("train.py --dataset imagenet --smoke --weights official", "and not with --smoke"),
    ("train.py --dataset imagenet --weights file", "--weights file is not a folder"),
    # train.py: names and runs
    ("train.py --smoke --name shapes-smoke", "exists already"),
    ("train.py --smoke --name a/b", "cannot be the name of a folder"),
    ("train.py --smoke --name ..", "cannot be the name of a folder"),
    ("train.py --smoke --name prepared", "cannot be the name of a folder"),
    ("train.py --smoke --resume --name none", "--resume: there is no"),
    ("train.py --resume --name shapes-smoke", "has done its 4 steps"),
    ("train.py --resume --name shapes-smoke --dataset imagenet",
     "'shapes' and cannot become 'imagenet'"),
    ("train.py --resume --name scenes-smoke --steps 9 --dataset laion",
     "'scenes' and cannot become 'laion'"),
    ("train.py --resume --name shapes-smoke --steps 9 --init-mask 0.5",
     "0.9 and cannot become 0.5"),
    ("train.py --resume --name later --steps 9",
     "settings that this program does not know: unheard_of"),
    ("train.py --resume --name cut --steps 9", "cannot be read as a checkpoint"),
    ("train.py --resume --name directory --steps 9", "there is no"),
    ("train.py --resume --name key --steps 9",
     "student of runs/key/checkpoint.pt does not fit: key"),
    ("train.py --resume --name nan --steps 9", "values that are not finite"),
    # train.py: images and captions
    ("train.py --smoke --dataset folder", "--dataset folder needs --data"),
    ("train.py --smoke --dataset folder --data nowhere", "is not a folder"),
    ("train.py --smoke --dataset folder --data file", "is not a folder"),
    ("train.py --smoke --dataset folder --data empty", "no subfolders"),
    ("train.py --smoke --dataset folder --data hollow", "no images in class folder 'nothing here'"),
    ("train.py --smoke --dataset folder --data few", "fewer than 40 images"),
    ("train.py --smoke --dataset folder --data one", "has one class folder, 'class'"),
    ("train.py --smoke --dataset folder --data broken", "text.png cannot be read as an image"),
    ("train.py --smoke --dataset folder --data torn", "b.jpg cannot be read as an image"),
    ("train.py --smoke --data empty", "--data goes with --dataset folder"),
    ("train.py --smoke --dataset imagenet --gan-weight 1 --data few", "not with --smoke"),
    ("train.py --dataset imagenet --gan-weight 1", "--gan-weight with imagenet needs --data DIR"),
    ("train.py --dataset imagenet --gan-weight 1 --data empty", "no images there"),
    ("train.py --dataset laion", "--dataset laion needs --captions FILE"),
    ("train.py --dataset laion --captions none.txt", "--captions none.txt: no such file"),
    ("train.py --dataset laion --captions runs", "--captions runs: no such file"),
    ("train.py --dataset laion --captions empty.txt", "--captions empty.txt has no captions"),
    ("train.py --dataset laion --captions latin.txt",
     "latin.txt is not UTF-8: line 2 has the byte 0xe9"),
    ("train.py --dataset laion --smoke --captions some.txt", "and not with --smoke"),
    ("train.py --dataset scenes --captions some.txt", "--captions goes with --dataset laion"),
    # sample.py
    ("sample.py --class 24", "not a class of this run"),
    ("sample.py --class purple", "not a class of this run"),
    ("sample.py --class -1", "not a class of this run"),
    ("sample.py --prompt dog", "this run draws classes: use --class"),
    ("sample.py --run runs/scenes-smoke --class 1", "this run draws captions: use --prompt"),
    ("sample.py --class 1 --prompt circle", "--prompt and --class exclude each other"),
    (["sample.py", "--run", "runs/scenes-smoke", "--prompt", "a purple circle"],
     "does not know the word 'purple'"),
    (["sample.py", "--run", "runs/scenes-smoke", "--prompt", "a circle a"], "but not the sentence"),
    ("sample.py --n 0", "--n should be at least 1"),
    ("sample.py --seed -1", "--seed should be between"),
    ("sample.py --seed 99999999999999", "--seed should be between"),
    ("sample.py --steps 4", "--steps goes with --teacher"),
    ("sample.py --teacher --steps 0", "--steps should be between 1 and 64"),
    ("sample.py --teacher --steps 65", "--steps should be between 1 and 64"),
    ("sample.py --out nowhere/x.png", "--out nowhere/x.png: there is no such folder"),
    ("sample.py --out x.doc", "--out x.doc should be a picture"),
    ("sample.py --out folder.png", "--out folder.png should be a picture"),
    ("sample.py --out file/x.png", "there is no such folder"),
    ("sample.py --init-mask 0.6", "--init-mask goes with --student"),
    ("sample.py --student x --init-mask 2", "--init-mask is a share"),
    ("sample.py --dataset imagenet", "add --teacher"),
    ("sample.py --dataset laion", "add --teacher, or --student FILE"),
    ("sample.py --run runs/shapes-smoke --student x", "exclude each other"),
    ("sample.py --teacher --student x", "exclude each other"),
    ("sample.py --weights official", "--weights is for imagenet and laion, and runs/shapes-smoke"),
    ("sample.py --dataset imagenet --teacher --weights none", "--weights none is not a folder"),
    ("evaluate.py --dataset imagenet --reference adm.npz --weights file",
     "--weights file is not a folder"),
    # sample.py, evaluate.py: runs
    ("sample.py --run runs/none", "there is no file runs/none/checkpoint.pt"),
    ("evaluate.py --run runs/none", "there is no file"),
    ("sample.py --run file", "file cannot be read as a checkpoint"),
    ("sample.py --run runs/directory", "there is no file"),
    ("sample.py --run runs/cut", "cannot be read as a checkpoint"),
    ("sample.py --run runs/text", "cannot be read as a checkpoint"),
    ("sample.py --run runs/list", "cannot be read as a checkpoint"),
    ("sample.py --run runs/malicious", "cannot be read as a checkpoint"),
    ("sample.py --run runs/foreign", "is not a checkpoint of train.py: student should be in it"),
    ("sample.py --run runs/format", "has format 99, newer than"),
    ("sample.py --run runs/key", "runs/key/checkpoint.pt does not fit: key"),
    ("sample.py --run runs/shape", "has shape (3,) instead of"),
    ("sample.py --run runs/nan", "values that are not finite"),
    ("evaluate.py --run runs/nan", "values that are not finite"),
    ("sample.py --run runs/part-foreign", "is no network that train.py prepared"),
    ("sample.py --run runs/part-malicious", "cannot be read as a checkpoint"),
    ("sample.py --run runs/part-key", "teacher of runs/part-key/checkpoint.pt does not fit: key"),
    ("sample.py --run runs/part-nan", "values that are not finite"),
    # evaluate.py
    ("evaluate.py --images 1", "--images should be at least 48"),
    ("evaluate.py --seed -1", "--seed should be between"),
    ("evaluate.py --steps 65", "--steps should be between 1 and 64"),
    ("evaluate.py --reference empty", "--reference is for imagenet"),
    ("evaluate.py --run runs/scenes-smoke --reference x", "--reference is for imagenet"),
    ("evaluate.py --run runs/imagenet-smoke", "imagenet needs --reference"),
    ("evaluate.py --run runs/laion-smoke", "--geneval --prompts FILE makes"),
    ("evaluate.py --folder empty", "--folder needs --reference"),
    ("evaluate.py --reference adm.npz --folder few --init-mask 7", "leave --init-mask away"),
    ("evaluate.py --reference adm.npz --folder few --seed 1", "leave --seed away"),
    ("evaluate.py --weights official", "--weights is for imagenet and laion"),
    ("evaluate.py --reference adm.npz --folder few --weights official --images 31",
     "has 30 images, fewer than the 31"),
    ("evaluate.py --reference adm.npz --folder few --weights official",
     "fewer than the 50000 asked for"),
    ("evaluate.py --reference adm.npz --folder few --weights official --images 9",
     "--images should be at least 10"),
    ("evaluate.py --reference adm.npz --folder few --images 12 --inception-path clean",
     "invalid choice: 'clean'"),
    ("evaluate.py --reference adm.npz --folder few --images 12 --weights empty",
     f"no weights for inception: put the file {models.INCEPTION}"),
    ("evaluate.py --reference adm.npz --folder few --images 12 --weights official",
     f"official/{models.INCEPTION} cannot be read as weights"),
    ("evaluate.py --reference adm.npz --folder few --images 12 --weights", "expected one argument"),
    ("evaluate.py --geneval", "--geneval needs --prompts FILE"),
    ("evaluate.py --prompts dog.jsonl", "--prompts goes with --geneval"),
    ("evaluate.py --detections x", "--detections goes with --geneval"),
    ("evaluate.py --geneval --prompts dog.jsonl --detections x --steps 4", "leave --steps away"),
    ("evaluate.py --geneval --prompts dog.jsonl --images 2", "--images goes without --geneval"),
    ("evaluate.py --out x", "--out goes with --geneval"),
    ("evaluate.py --geneval --prompts dog.jsonl --folder few", "exclude each other"),
    ("evaluate.py --geneval --prompts dog.jsonl", "--geneval needs a run with captions"),
    ("evaluate.py --geneval --prompts none.jsonl", "none.jsonl: no such file"),
    ("evaluate.py --geneval --prompts runs", "runs: no such file"),
    ("evaluate.py --geneval --prompts dog.jsonl --steps 0", "got [0]"),
    ("evaluate.py --geneval --prompts dog.jsonl --steps 2 4", "with one model"),
    ("evaluate.py --geneval --prompts dog.jsonl --seed -1", "--seed should be between"),
    ("evaluate.py --geneval --prompts dog.jsonl --run runs/laion-smoke --steps 33",
     "--steps should be between 1 and 32, got 33"),
    ("evaluate.py --geneval --prompts dog.jsonl --run runs/laion-smoke --out file",
     "file cannot be written into"),
    ("evaluate.py --geneval --prompts purple.jsonl --run runs/scenes-smoke",
     "does not know the word 'purple'")]


def contents(folder):
    """What is there, and when each file was written. Resuming writes the settings down before it
    looks at the weights."""
    return {path: path.is_file() and path.stat().st_mtime_ns for path in folder.rglob("*")
            if path.name not in ("config.json", "samples")}


def name_of(line):
    return line if isinstance(line, str) else " ".join(line)


@pytest.mark.parametrize("line, says", WRONG, ids=[name_of(line) for line, _ in WRONG])
def test_wrong_input_ends_in_one_line_and_overwrites_nothing(world, line, says):
    before = contents(world)
    refused(in_process(line, world), says)
    assert contents(world) == before and not (world / "marker").exists()


@pytest.mark.parametrize("line", ["train.py --smoke", "sample.py --n 1",
                                  "evaluate.py --images 48 --steps 1"])
def test_a_folder_that_cannot_be_written_is_told_before_the_work(world, line, monkeypatch):
    """Root may write everywhere: its permissions are acted out."""
    access, before = os.access, contents(world)
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK and access(path, mode))
    monkeypatch.setattr(sample, "batches", lambda *args: pytest.fail("images were made"))
    refused(in_process(line, world), "cannot be written into", "read-only")
    assert contents(world) == before


def test_a_file_where_the_runs_should_be_is_told_before_the_work(tmp_path):
    (tmp_path / "runs").write_text("a file")
    refused(in_process("train.py --smoke", tmp_path), "cannot be written into",
            "runs is not a folder")
    assert (tmp_path / "runs").read_text() == "a file"


def test_a_damaged_part_is_named_and_no_run_begins(smoke_runs, tmp_path_factory):
    folder = own_copy(tmp_path_factory, smoke_runs("shapes"))
    path, = folder.glob("runs/prepared/shapes-judge-*.pt")
    path.write_bytes(cut(path))
    done = in_process("train.py --smoke --name new", folder)
    refused(done, f"{path.name}, which train.py prepared, cannot be read", "remove it")
    assert not (folder / "runs/new").exists()


# ---------------------------------------------------------------- unusual, and fine
def test_a_prompt_too_long_for_clip_is_drawn_and_what_is_lost_is_said(world):
    line = ["sample.py", "--run", "runs/laion-smoke", "--n", "2", "--prompt"]
    done = in_process([*line, LONG], world)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("caption longer than 77 tokens: 'very very") == 1
    assert "long tail'" in done.stdout
    assert "longer" not in in_process([*line, "a dog"], world).stdout


def test_a_class_folder_may_have_a_number_for_a_name():
    names = ["1", "2", "one class"]
    found = [sample.class_index(text, names) for text in ("1", "2", "0", "one class")]
    assert found == [0, 1, 0, 2]


def test_images_to_be_scored_may_be_of_any_mode(tmp_path):
    path = tmp_path / "image.png"
    for mode in ("L", "RGBA", "P", "I;16"):
        if mode == "I;16":
            image = Image.fromarray(np.full((8, 8), 102 << 8, np.uint16))
        else:
            image = Image.new("RGB", (8, 8), (102,) * 3).convert(mode)
        image.save(path)
        # older Pillows say I for I;16
        assert Image.open(path).mode in (mode, mode.removesuffix(";16"))
        assert (tokenizer.read_image(path) == 102).all()


def test_a_part_of_another_kind_is_no_network():
    for content in ({}, dict(cls="os.system", args={}, state={}),
                    dict(cls="ConvNet", args=dict(width="wide"), state={})):
        with pytest.raises(ValueError, match="phi is no network that train.py prepared"):
            sample.load_part(content, "cpu", "phi")
    state = models.ConvNet(width=4).state_dict()
    part = dict(cls="ConvNet", args=dict(width=4), state=state)
    assert sample.load_part(part, "cpu", "phi").training is False

"""The commands of README.md: what a CPU can run without official files runs, training in its smoke
form; the others miss nothing else."""
import json
import shlex

import pytest
import torch
from conftest import ROOT, in_process, own_copy, refused
from PIL import Image

import tokenizer
import train

BLOCKS = (ROOT / "README.md").read_text().split("\n```")[1::2]
LINES = []
for block in BLOCKS:
    for text in block.splitlines():
        words = shlex.split(text, comments=True) if text.startswith("python ") else ["", ""]
        # without comments, each once
        if words[1].endswith(".py") and shlex.join(words[1:]) not in LINES:
            LINES.append(shlex.join(words[1:]))


@pytest.fixture(scope="module")
def worlds(smoke_runs, tmp_path_factory):
    """-> function: name of a dataset -> a folder with a smoke run of it, GenEval's files for one
    prompt, and DIR with images of two classes"""
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


def test_commands_are_found():
    assert len(LINES) > 15
    assert {line.split()[0] for line in LINES} == {"train.py", "sample.py", "evaluate.py"}


@pytest.mark.parametrize("line", [line for line in LINES if line.startswith("train.py")])
def test_training_runs(line, worlds, monkeypatch, no_pictures):
    """With --smoke in place of hours, over networks that are there. --ablations: the first row of
    its table. How --bench works is tested elsewhere."""
    monkeypatch.setattr(train, "ABLATIONS", train.ABLATIONS[:1])
    monkeypatch.setattr(train, "bench", lambda *args: None)
    words = shlex.split(line)
    if "--gpus" in words or "laion" in words:
        done = in_process(words, worlds("laion"))
        refused(done, lines=done.stderr.count("\n"))
        assert "no weights for" in done.stderr or "CUDA devices here" in done.stderr
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
        # all is well where there are GPUs
        train.parse(words[1:])
    else:
        words += ["--steps", "5"] if "--resume" in words else ["--smoke"]
        done = in_process(words, worlds("scenes" if "scenes" in words else "shapes"))
        assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("line", [line for line in LINES if not line.startswith("train.py")])
def test_pictures_and_scores_are_made(line, worlds):
    """Of smoke runs. Where official files are needed, that they are missing is all that is
    wrong."""
    if "207" in line or "--reference" in line:
        dataset = "imagenet"
    elif "laion" in line or "--geneval" in line or "car" in line:
        dataset = "laion"
    else:
        dataset = "scenes" if "--prompt" in line else "shapes"
    words = shlex.split(line)
    if words[0] == "sample.py":
        words += ["--n", "1"]
    elif "--folder" in words:
        # of which there are 40
        words += ["--images", "20"]
    elif "--geneval" not in line and "--reference" not in line:
        words += ["--images", "48", "--steps", "1"]
    done = in_process(words, worlds(dataset))
    if any(name in line for name in ("--dataset", "--student", "--reference")):
        refused(done, "no weights for", lines=done.stderr.count("\n"))
    else:
        assert done.returncode == 0, done.stderr[-2000:]

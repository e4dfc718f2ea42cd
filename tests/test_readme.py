"""The commands of README.md: every flag in them exists, and what a CPU can run without official files runs."""
import json
import shlex

import pytest
import torch
from conftest import ROOT, in_process, own_copy, refused

import evaluate
import train

BLOCKS = (ROOT / "README.md").read_text().split("\n```")[1::2]
LINES = [shlex.split(line, comments=True)[1:] for block in BLOCKS for line in block.splitlines() if line.startswith("python ")]
LINES = list(dict.fromkeys(shlex.join(words) for words in LINES if words[0].endswith(".py")))          # without comments, each once


@pytest.fixture(scope="module")
def worlds(smoke_runs, tmp_path_factory):
    """-> function: name of a dataset -> a folder with a smoke run of it and GenEval's files for one prompt"""
    folders = {}

    def world(dataset):
        if dataset not in folders:
            folder = folders[dataset] = own_copy(tmp_path_factory, smoke_runs(dataset))
            prompt = dict(tag="single_object", include=[{"class": "dog", "count": 1}], prompt="a photo of a dog")
            (folder / "evaluation_metadata.jsonl").write_text(json.dumps(prompt))
            (folder / "FILE").write_text(json.dumps(dict(image="00000/samples/0000.png", detections=[])))
        return folders[dataset]
    return world


def test_commands_are_found():
    assert len(LINES) > 15 and {line.split()[0] for line in LINES} == {"train.py", "sample.py", "evaluate.py"}


@pytest.mark.parametrize("line", [line for line in LINES if line.startswith("train.py")])
def test_settings_of_training_are_understood(line, worlds, monkeypatch):
    """On a machine with GPUs. Smoke runs of every dataset are in other files."""
    _, *words = shlex.split(line)
    if "--resume" in words:
        monkeypatch.chdir(worlds("shapes"))                              # made before there seem to be GPUs
        words += ["--steps", "9"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    train.parse(words)


@pytest.mark.parametrize("line", [line for line in LINES if not line.startswith("train.py")])
def test_pictures_and_scores_are_made(line, worlds, monkeypatch):
    """Of smoke runs. Where official files are needed, that they are missing is all that is wrong. How --bench works is tested elsewhere."""
    monkeypatch.setattr(evaluate, "bench", lambda *args: None)
    dataset = ("imagenet" if "207" in line or "--reference" in line else "laion" if "laion" in line or "--geneval" in line or "car" in line else
               "scenes" if "--prompt" in line else "shapes")
    few = {"sample.py": ["--n", "1"], "evaluate.py": ["--images", "48", "--steps", "1"]}[line.split()[0]]
    done = in_process(shlex.split(line) + few * ("--geneval" not in line and "--reference" not in line), worlds(dataset))
    if any(words in line for words in ("--dataset", "--student", "--reference")):
        refused(done, "no weights for", lines=done.stderr.count("\n"))
    else:
        assert done.returncode == 0, done.stderr[-2000:]

"""The commands of the README, end to end and tiny. What they say to wrong input is in test_bad_input.py."""
import json
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch
from conftest import command, command_line, in_process, own_copy, refused
from PIL import Image

import evaluate
import train


@pytest.fixture(scope="module")
def smoke(smoke_runs, tmp_path_factory):
    """One smoke run of the default world, shared by the tests below."""
    return own_copy(tmp_path_factory, smoke_runs("shapes")), smoke_runs("shapes")[1]


def test_smoke_run_leaves_everything_and_says_that_it_learnt_nothing(smoke):
    folder, done = smoke
    run = folder / "runs" / "shapes-smoke"
    for name in ("config.json", "log.jsonl", "checkpoint.pt", "report.json", "report.png", "samples/000004.png"):
        assert (run / name).is_file(), name
    assert "Nothing was learnt" in done.stdout
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log] == [1, 2, 3, 4] and all("entropy" in row and "codes_used" in row for row in log)


def test_prepared_parts_are_reused_and_a_second_run_overwrites_nothing(smoke, no_pictures):
    folder, _ = smoke
    before = {p: p.stat().st_mtime_ns for p in (folder / "runs").rglob("*.p*")}
    done = in_process("train.py --smoke", folder)
    assert done.returncode == 0 and "tokenizer:" not in done.stderr
    assert (folder / "runs" / "shapes-smoke-2" / "checkpoint.pt").is_file()
    assert before == {p: p.stat().st_mtime_ns for p in before}


def test_resume_is_the_uninterrupted_run_bit_for_bit(smoke, no_pictures):
    """Its settings come from the checkpoint: only --steps has to be typed."""
    folder, _ = smoke
    for line in ("train.py --smoke --steps 2 --name halves", "train.py --name halves --resume --steps 4"):
        done = in_process(line, folder)                                # as many threads as the smoke run had
        assert done.returncode == 0, done.stderr[-2000:]
    whole, halves = (torch.load(folder / "runs" / name / "checkpoint.pt", weights_only=True) for name in ("shapes-smoke", "halves"))
    for part in ("student", "ema"):
        assert all(torch.equal(whole[part][key], halves[part][key]) for key in whole[part]), part
    assert torch.equal(whole["rng"], halves["rng"])
    assert halves["config"] == {**whole["config"], "name": "halves", "resume": True}


def test_ctrl_c_finishes_the_step_saves_and_says_how_to_go_on(smoke):
    folder, _ = smoke
    log = folder / "runs" / "stopped" / "log.jsonl"
    process = subprocess.Popen(command_line("train.py --smoke --steps 1000 --sample-every 1000 --save-every 1000 --name stopped"), cwd=folder,
                               stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        for _ in range(600):
            if log.exists() and log.stat().st_size:
                break
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130 and "train.py --resume --name stopped" in out
    saved = torch.load(log.parent / "checkpoint.pt", weights_only=True)
    assert saved["step"] == json.loads(log.read_text().splitlines()[-1])["step"]


def test_sample_by_number_and_by_name_is_the_same_picture(smoke):
    folder, _ = smoke
    for out, label in (("number.png", "1"), ("name.png", "red square")):
        done = in_process(["sample.py", "--class", label, "--n", "4", "--out", out, "--run", "runs/shapes-smoke"], folder)
        assert done.returncode == 0, done.stderr
    assert (folder / "number.png").read_bytes() == (folder / "name.png").read_bytes()
    done = in_process("sample.py --teacher --steps 1 --n 2 --out teacher.png", folder)
    assert done.returncode == 0 and "teacher, 1 steps" in done.stdout


def test_evaluate_prints_the_table_of_the_paper(smoke):
    folder, _ = smoke
    done = in_process("evaluate.py --images 48 --run runs/shapes-smoke", folder)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "student" in done.stdout and "recall" in done.stdout
    rows = json.loads((folder / "runs/shapes-smoke/report.json").read_text())["rows"]
    assert [(row["model"], row["steps"]) for row in rows if row["steps"]] == [("teacher", t) for t in (16, 8, 4, 2, 1)] + [("student", 1)]


@pytest.mark.slow
def test_own_images_in_folders_train_too(tmp_path, monkeypatch):
    """Of all modes, turned by EXIF, of 16 bits; class names with spaces, or numbers."""
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in ("one class", "2"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(30):
            image = Image.new("RGB", (40, 50), (i * 8, 100, 200 if name == "2" else 20)).convert(("RGB", "L", "RGBA", "P", "1", "LA")[i % 6])
            image.save(tmp_path / "data" / name / f"{i} (copy).png", exif=exif)
        Image.fromarray(np.full((40, 50), 30_000, np.uint16)).save(tmp_path / "data" / name / "sixteen.TIF")
    monkeypatch.setattr(evaluate, "report", partial(evaluate.report, steps=(2,)))
    done = in_process("train.py --dataset folder --data data --smoke", tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    for label, name in (("one class", "one class"), ("2", "2"), ("0", "2")):     # in the order of their names
        done = in_process(["sample.py", "--class", label, "--n", "2"], tmp_path)
        assert done.returncode == 0 and f"| {name} |" in done.stdout


def test_exit_code_and_message_of_a_real_process(tmp_path):
    with ThreadPoolExecutor() as pool:                                           # all at once: they take seconds to import everything
        for done in pool.map(lambda script: command(f"{script} --run", tmp_path), ("train.py", "sample.py", "evaluate.py")):
            refused(done)
            assert not done.stdout
    assert not list(tmp_path.iterdir())

"""The commands of the README, end to end and tiny, and what they say to wrong input."""
import json
import signal
import subprocess
import time

import pytest
import torch
from conftest import command, command_line, finished_run, in_process, refused
from PIL import Image


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """One smoke run of the default world, shared by the tests below."""
    return finished_run(tmp_path_factory, "train.py --smoke")


def test_smoke_run_leaves_everything_and_says_that_it_learnt_nothing(smoke):
    folder, done = smoke
    run = folder / "runs" / "shapes-smoke"
    for name in ("config.json", "log.jsonl", "checkpoint.pt", "report.json", "report.png", "samples/000004.png"):
        assert (run / name).is_file(), name
    assert "Nothing was learnt" in done.stdout
    rows = json.loads((run / "report.json").read_text())["rows"]
    assert [(row["model"], row["steps"]) for row in rows if row["steps"]] == [("teacher", t) for t in (16, 8, 4, 2, 1)] + [("student", 1)]
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log] == [1, 2, 3, 4] and all("entropy" in row and "codes_used" in row for row in log)


def test_prepared_parts_are_reused_and_a_second_run_overwrites_nothing(smoke):
    folder, _ = smoke
    before = {p: p.stat().st_mtime_ns for p in (folder / "runs").rglob("*.p*")}
    done = in_process("train.py --smoke", folder)
    assert done.returncode == 0 and "tokenizer:" not in done.stderr
    assert (folder / "runs" / "shapes-smoke-2" / "checkpoint.pt").is_file()
    assert before == {p: p.stat().st_mtime_ns for p in before}


def test_resume_is_the_uninterrupted_run_bit_for_bit(smoke):
    """Its settings come from the checkpoint: only --steps has to be typed."""
    folder, _ = smoke
    for line in ("train.py --smoke --steps 2 --name halves", "train.py --name halves --resume --steps 4"):
        done = command(line, folder)                                   # as many threads as the smoke run had
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


def test_evaluate_prints_the_table_of_the_newest_run(smoke):
    folder, _ = smoke
    done = in_process("evaluate.py --images 48", folder)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "student" in done.stdout and "recall" in done.stdout


def test_own_images_in_folders_train_too(tmp_path):
    for name in ("one class", "another"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(30):
            Image.new("RGB", (40, 50), (i * 8, 100, 200 if name == "another" else 20)).save(tmp_path / "data" / name / f"{i}.png")
    done = in_process("train.py --dataset folder --data data --smoke", tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    done = in_process(["sample.py", "--class", "one class", "--n", "2"], tmp_path)
    assert done.returncode == 0 and "one class" in done.stdout


WRONG = [("sample.py --class 24", "not a class of this run"), ("sample.py --class purple", "not a class of this run"),
         ("sample.py --class -1", "not a class of this run"), ("sample.py --n 0", "--n should be at least 1"),
         ("sample.py --seed -1", "--seed"), ("sample.py --teacher --steps 0", "--steps should be between 1 and 64"),
         ("sample.py --run runs/none", "does not exist"), ("sample.py --run foreign", "not a checkpoint of train.py"),
         ("sample.py --run broken", "cannot be read as a checkpoint"), ("sample.py --n many", "invalid int value: 'many'"),
         ("sample.py --clas 3", "unrecognized arguments: --clas 3"), ("sample.py --out nowhere/x.png --n 1", "nowhere/x.png"),
         ("sample.py --init-mask 0.6", "--init-mask goes with --student"), ("sample.py --dataset imagenet", "add --teacher"),
         ("sample.py --run runs/shapes-smoke --student x", "exclude each other"), ("sample.py --teacher --student x", "exclude each other"),
         ("sample.py --teacher-weights x", "--teacher-weights is for imagenet"), ("sample.py --prompt dog", "use --class"),
         ("train.py --smoke --batch 1", "--batch"), ("train.py --smoke --per-class 1", "--per-class should be at least 2"),
         ("train.py --smoke --steps 0", "--steps should be at least 1"), ("train.py --smoke --seed -3", "--seed"),
         ("train.py --smoke --dataset folder", "--data"), ("train.py --smoke --dataset folder --data nowhere", "is not a folder"),
         ("train.py --smoke --dataset folder --data empty", "no subfolders"),
         ("train.py --smoke --dataset folder --data few", "fewer than 40 images"),
         ("train.py --smoke --dataset cifar", "--dataset should be one of"),
         ("train.py --smoke --name shapes-smoke", "exists already"), ("train.py --smoke --resume --name none", "--resume"),
         ("train.py --smoke --bandwidths 0", "--bandwidths"), ("train.py --smoke --init-mask 0", "--init-mask"),
         ("train.py --smoke --lift-chunk 0", "--lift-chunk should be at least 1"),
         ("train.py --smoke --draft teacher", "--draft should be one of student, random"),
         ("train.py --smoke --space token", "--space should be one of feature, pixel"),
         ("train.py --smoke --grid 0", "--grid should be between 1 and 32"), ("train.py --smoke --grid 33", "--grid should be between 1 and 32"),
         ("train.py --smoke --blocks 2 5 8 11", "--blocks of the small Phi are 0 to 3"),
         ("train.py --smoke --gan-weight -1", "--gan-weight should not be negative"),
         ("train.py --smoke --gan-weight 1 --gan-start -1", "--gan-start should not be negative"),
         ("train.py --smoke --data empty", "--data goes with --dataset folder"),
         ("train.py --smoke --dataset imagenet --gan-weight 1 --data few", "not with --smoke"),
         ("train.py --dataset imagenet --gan-weight 1", "--gan-weight with imagenet needs --data DIR"),
         ("train.py --dataset imagenet --gan-weight 1 --data empty", "no images there"),
         ("train.py --dataset imagenet --deit-weights x", "go with --gan-weight"),
         ("train.py --smoke --steps", "--steps: expected one argument"), ("train.py --smoke --step 3", "unrecognized arguments: --step 3"),
         ("train.py --smoke --backbone-weights x", "--backbone-weights goes with"),
         ("train.py --resume --name shapes-smoke", "has done its 4 steps"),
         ("train.py --resume --name shapes-smoke --dataset imagenet", "'shapes' and cannot become 'imagenet'"),
         ("train.py --resume --name shapes-smoke --steps 9 --init-mask 0.5", "0.95 and cannot become 0.5"),
         ("evaluate.py --images 1", "--images"), ("evaluate.py --run runs/none", "does not exist"),
         ("evaluate.py --folder empty", "--folder needs --reference"), ("evaluate.py --geneval", "--geneval needs --prompts FILE"),
         ("evaluate.py --steps 65", "--steps should be between 1 and 64"),
         ("evaluate.py --reference empty", "--reference is for imagenet")]


@pytest.mark.parametrize("line, says", WRONG, ids=[line for line, _ in WRONG])
def test_wrong_input_ends_in_one_line_and_overwrites_nothing(smoke, line, says):
    folder, _ = smoke
    for name, content in (("foreign", {"a": 1}), ("broken", None)):
        (folder / name).mkdir(exist_ok=True)
        torch.save(content, folder / name / "checkpoint.pt")
    (folder / "broken" / "checkpoint.pt").write_bytes((folder / "runs/shapes-smoke/checkpoint.pt").read_bytes()[:1000])
    (folder / "empty").mkdir(exist_ok=True)
    (folder / "few" / "class").mkdir(parents=True, exist_ok=True)
    for i in range(30):
        Image.new("RGB", (8, 8)).save(folder / "few" / "class" / f"{i}.png")
    before = sorted((folder / "runs").rglob("*"))
    refused(in_process(line, folder), says)
    assert sorted((folder / "runs").rglob("*")) == before


@pytest.mark.parametrize("script", ["train.py", "sample.py", "evaluate.py"])
def test_exit_code_and_message_of_a_real_process(tmp_path, script):
    done = command(f"{script} --run", tmp_path)
    refused(done)
    assert not done.stdout and not list(tmp_path.iterdir())

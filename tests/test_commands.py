"""The commands of the README, end to end and tiny. What they say to wrong input is in
test_bad_input.py."""
import json
import shutil
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch
from conftest import (command, command_line, in_process, own_copy, refused,
                      stopped_in_its_loop)
from PIL import Image

import evaluate
import sample
import train


@pytest.fixture(scope="module")
def smoke(smoke_runs, tmp_path_factory):
    """One smoke run of the default world, shared by the tests below."""
    return own_copy(tmp_path_factory, smoke_runs("shapes")), smoke_runs("shapes")[1]


def test_smoke_run_leaves_everything_and_says_that_it_learnt_nothing(smoke):
    folder, done = smoke
    run = folder / "runs" / "shapes-smoke"
    for name in ("config.json", "log.jsonl", "checkpoint.pt", "report.json", "report.png",
                 "samples/000000.png", "samples/000004.png", "samples.gif"):
        assert (run / name).is_file(), name
    assert "Nothing was learnt" in done.stdout
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log] == [1, 2, 3, 4]
    assert all("entropy" in row and "codes_used" in row for row in log)
    with Image.open(run / "samples.gif") as strip, Image.open(run / "samples/000004.png") as sheet:
        # the sheets of steps 0, 2 and 4
        assert strip.n_frames == 3 and strip.width == min(960, sheet.width)


def test_prepared_parts_are_reused_and_a_second_run_overwrites_nothing(smoke, no_pictures):
    folder, _ = smoke
    before = {p: p.stat().st_mtime_ns for p in (folder / "runs").rglob("*.p*")}
    done = in_process("train.py --smoke", folder)
    assert done.returncode == 0 and "tokenizer:" not in done.stderr
    assert (folder / "runs" / "shapes-smoke-2" / "checkpoint.pt").is_file()
    assert before == {p: p.stat().st_mtime_ns for p in before}


def test_ctrl_c_says_that_it_stopped(capsys):
    def main():
        raise KeyboardInterrupt
    with pytest.raises(SystemExit, match="130"):
        sample.run_command(main)
    assert capsys.readouterr().out == "\nstopped\n"


def test_resume_is_the_uninterrupted_run_bit_for_bit(smoke, no_pictures):
    """Its settings come from the checkpoint: only --steps has to be typed."""
    folder, _ = smoke
    for line in ("train.py --smoke --steps 2 --name halves",
                 "train.py --name halves --resume --steps 4"):
        # as many threads as the smoke run had
        done = in_process(line, folder)
        assert done.returncode == 0, done.stderr[-2000:]
    whole, halves = (torch.load(folder / "runs" / name / "checkpoint.pt", weights_only=True)
                     for name in ("shapes-smoke", "halves"))
    for part in ("student", "ema"):
        assert all(torch.equal(whole[part][key], halves[part][key]) for key in whole[part]), part
    assert torch.equal(whole["rng"], halves["rng"])
    assert halves["config"] == {**whole["config"], "name": "halves", "resume": True}


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)],
                         ids=["Ctrl-C", "SIGTERM"])
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(smoke, number, code):
    folder, _ = smoke
    name = f"stopped-{code}"
    log = folder / "runs" / name / "log.jsonl"
    line = f"train.py --smoke --steps 1000 --sample-every 2000 --save-every 1000 --name {name}"
    process = subprocess.Popen(command_line(line), cwd=folder, stdout=subprocess.PIPE,
                               stderr=subprocess.DEVNULL, text=True)
    out, _ = stopped_in_its_loop(process, log, number)
    assert process.returncode == code and f"train.py --resume --name {name}" in out
    saved = torch.load(log.parent / "checkpoint.pt", weights_only=True)
    assert saved["step"] == json.loads(log.read_text().splitlines()[-1])["step"]


def test_resume_needs_no_prepared_files(smoke, no_pictures):
    """They are in the checkpoint; made anew by other code, they would be others."""
    folder, _ = smoke
    runs, away = folder / "runs", folder / "away"
    assert in_process("train.py --smoke --steps 2 --name alone", folder).returncode == 0
    (runs / "prepared").rename(away)
    try:
        done = in_process("train.py --resume --name alone --steps 4", folder)
        assert done.returncode == 0 and not (runs / "prepared").exists(), done.stderr[-2000:]
        assert "teacher: MaskGIT, 0.9 M parameters, runs/alone/checkpoint.pt" in done.stdout
    finally:
        away.rename(runs / "prepared")
    whole, alone = (torch.load(runs / name / "checkpoint.pt", weights_only=True)
                    for name in ("shapes-smoke", "alone"))
    assert all(torch.equal(whole["ema"][key], alone["ema"][key]) for key in whole["ema"])
    assert whole["parts"].keys() == alone["parts"].keys() == {"tokenizer", "phi", "judge",
                                                             "teacher"}


def test_resume_is_not_with_another_part(smoke, monkeypatch):
    """As when an ablation goes on over parts that were made anew."""
    folder, _ = smoke
    monkeypatch.chdir(folder)
    parts = train.prepared_before(train.Config(), folder / "runs/shapes-smoke", "cpu")
    parts.saved["phi"]["made_from"] = "something else"
    cfg = train.parse("--resume --name shapes-smoke --steps 5".split())
    with pytest.raises(ValueError, match="was made with another phi than .*checkpoint.pt"):
        train.distil(cfg, parts, folder / "runs/shapes-smoke", "cpu")


def test_sample_by_number_and_by_name_is_the_same_picture(smoke):
    folder, _ = smoke
    for out, label in (("number.png", "1"), ("name.png", "red square")):
        words = ["sample.py", "--class", label, "--n", "4", "--out", out]
        done = in_process([*words, "--run", "runs/shapes-smoke"], folder)
        assert done.returncode == 0, done.stderr
    assert (folder / "number.png").read_bytes() == (folder / "name.png").read_bytes()
    done = in_process("sample.py --teacher --steps 1 --n 2 --out teacher.png", folder)
    assert done.returncode == 0 and "teacher, 1 steps" in done.stdout


def test_a_run_that_was_sent_elsewhere_draws_the_same_pictures(smoke, tmp_path):
    """Its checkpoint is enough: no prepared parts, neither the right ones nor others."""
    folder, _ = smoke
    run = "runs/shapes-smoke"
    (tmp_path / run).mkdir(parents=True)
    shutil.copy(folder / run / "checkpoint.pt", tmp_path / run)
    for options in ("--n 4", "--n 2 --teacher --steps 2"):
        pictures = []
        for place in (folder, tmp_path):
            done = in_process(f"sample.py {options} --out sent.png --run {run}", place)
            assert done.returncode == 0, done.stderr
            pictures.append((place / "sent.png").read_bytes())
        assert pictures[0] == pictures[1]


def test_evaluate_prints_the_table_of_the_paper(smoke):
    folder, _ = smoke
    done = in_process("evaluate.py --images 48 --run runs/shapes-smoke", folder)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "student" in done.stdout and "recall" in done.stdout
    rows = json.loads((folder / "runs/shapes-smoke/report.json").read_text())["rows"]
    found = [(row["model"], row["steps"]) for row in rows if row["steps"]]
    wanted = [("teacher", t) for t in (16, 8, 4, 2, 1)] + [("student", 1)]
    assert [row for row in found if row in wanted] == wanted


@pytest.mark.slow
def test_own_images_in_folders_train_too(tmp_path, monkeypatch):
    """Of all modes, turned by EXIF, of 16 bits; class names with spaces, or numbers."""
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in ("one class", "2"):
        place = tmp_path / "data" / name
        place.mkdir(parents=True)
        for i in range(30):
            colour = (i * 8, 100, 200 if name == "2" else 20)
            mode = ("RGB", "L", "RGBA", "P", "1", "LA")[i % 6]
            image = Image.new("RGB", (40, 50), colour).convert(mode)
            image.save(place / f"{i} (copy).png", exif=exif)
        Image.fromarray(np.full((40, 50), 30_000, np.uint16)).save(place / "sixteen.TIF")
    monkeypatch.setattr(evaluate, "report", partial(evaluate.report, steps=(2,)))
    done = in_process("train.py --dataset folder --data data --smoke", tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "data: 62 images in 2 classes" in done.stdout
    # in the order of their names
    for label, name in (("one class", "one class"), ("2", "2"), ("0", "2")):
        done = in_process(["sample.py", "--class", label, "--n", "2"], tmp_path)
        assert done.returncode == 0 and f"| {name} |" in done.stdout
    # renamed, a class is another: nothing that was prepared for the old one is taken
    before = {path.name for path in (tmp_path / "runs/prepared").iterdir()}
    (tmp_path / "data" / "2").rename(tmp_path / "data" / "zwei")
    done = in_process("train.py --dataset folder --data data --smoke", tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    refused(in_process("train.py --resume --name folder-smoke --steps 5", tmp_path),
            "--data data has other classes than runs/folder-smoke was made with")
    after = {path.name for path in (tmp_path / "runs/prepared").iterdir()}
    assert len(before) == 4 and before < after and len(after) == 8


def test_exit_code_and_message_of_a_real_process(tmp_path):
    scripts = ("train.py", "sample.py", "evaluate.py")
    # all at once: they take seconds to import everything
    with ThreadPoolExecutor() as pool:
        for done in pool.map(lambda script: command(f"{script} --run", tmp_path), scripts):
            refused(done)
            assert not done.stdout
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- what is said meanwhile
def test_the_pace_is_told_after_ten_steps(tmp_path, capsys):
    # the loop on networks of a few hundred weights
    from test_distributed import distil
    distil(tmp_path, steps=31, log_every=4, save_every=99)
    out = capsys.readouterr().out
    assert "distil: 31 steps to come, each of 8 images" in out
    assert out.count("s a step: 0.0 minutes for the 19 steps to come") == 1


def test_hours_are_told_as_hours(capsys):
    train.tell_pace(1.5, 99_990)
    train.tell_pace(1.5, 100)
    out = capsys.readouterr().out
    assert "1.50 s a step: 41.7 hours for the 99990 steps to come" in out
    assert "1.50 s a step: 2.5 minutes for the 100 steps to come" in out


def test_a_strip_of_many_sheets_has_the_first_and_the_last(tmp_path):
    (tmp_path / "samples").mkdir()
    for step in range(100):
        grey = (2 * step,) * 3
        Image.new("RGB", (200, 90), grey).save(tmp_path / "samples" / f"{step:06d}.png")
    # what a kill leaves, and somebody's own file
    for name in (".000100.png", "mine.png"):
        (tmp_path / "samples" / name).write_bytes(b"half a picture")
    train.animate(tmp_path, most=7, width=100)
    with Image.open(tmp_path / "samples.gif") as strip:
        assert strip.n_frames == 7 and strip.size == (100, 45)
        shades = []
        for i in range(7):
            strip.seek(i)
            shades.append(strip.convert("RGB").getpixel((90, 40))[0])
    assert shades == [2 * step for step in (0, 16, 33, 49, 66, 82, 99)]
    assert {path.name for path in tmp_path.iterdir()} == {"samples", "samples.gif"}

"""Hard to break: runs that are killed, stopped, out of disk or no longer finite lose nothing.

Also what a run's name and its prepared parts belong to. Started as a script, it kills.
"""
import contextlib
import functools
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from conftest import ROOT, in_process, refused

import evaluate
import fpd
import models
import sample
import tokenizer
import train

# A run from nothing in seconds: tokenizer, Phi, judge, teacher, student
LINE = ("train.py --smoke --gpus 0 --tokenizer-steps 3 --classifier-steps 3 --teacher-steps 3 "
        "--steps 15 --batch 4 --per-class 2 --sample-every 99 --save-every 1")
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}


@functools.cache
def few_images(dataset, split, world=tokenizer.world):
    """Drawn once for all runs, which takes a second."""
    return tuple(x[:72] for x in world(train.Config(dataset=dataset, smoke=True), split))


def smaller(cls, **sizes):
    """A class of networks whose sizes are these, whatever is asked for."""
    def init(self, **args):
        cls.__init__(self, **{**args, **sizes})
    return type(cls.__name__, (cls,), {"__init__": init})


def shrink(patch):
    """A world of few images, tiny networks, and no report: what is tested comes before it."""
    classifier, vqgan = train.train_classifier, smaller(tokenizer.VQGAN, ch=8)
    maskgit = smaller(train.MaskGIT, width=16, depth=1, heads=2, mlp=32)
    maskgen = smaller(train.MaskGen, width=16, depth=1, heads=2)
    patch.setattr(tokenizer, "world", lambda cfg, split: few_images(cfg.dataset, split))
    patch.setattr(tokenizer, "VQGAN", vqgan)
    patch.setattr(train, "MaskGIT", maskgit)
    patch.setattr(train, "MaskGen", maskgen)
    parts = (vqgan, train.ConvNet, maskgit, maskgen, train.Words)
    patch.setattr(sample, "PARTS", {cls.__name__: cls for cls in parts})
    patch.setattr(train, "train_classifier", lambda cfg, device, split, width, training:
                  classifier(cfg, device, split, 4, training))
    patch.setattr(evaluate, "report", lambda *args, **kwargs: None)


def same(a, b):
    """Equal bit for bit? Nested dicts and lists of tensors and numbers."""
    if isinstance(a, (dict, list, tuple)):
        items = a.items() if isinstance(a, dict) else enumerate(a)
        return len(a) == len(b) and all(same(value, b[key]) for key, value in items)
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


def load(path):
    return torch.load(path, weights_only=True)


def same_runs(a, b):
    """Folders of runs of the same command: the same parts, student, EMA, optimiser, random state
    and log? (When it was saved, and under which name, is not.)"""
    parts = [sorted((run.parent / "prepared").glob("*.pt")) for run in (a, b)]
    assert [p.name for p in parts[0]] == [p.name for p in parts[1]]
    ours, theirs = (load(run / "checkpoint.pt") for run in (a, b))
    assert ours.keys() == theirs.keys()
    return (all(same(load(p), load(q)) for p, q in zip(*parts))
            and all(same(ours[key], theirs[key]) for key in ours if key not in ("config", "saved"))
            and (a / "log.jsonl").read_text() == (b / "log.jsonl").read_text())


# ---------------------------------------------------------------- SIGKILL, SIGTERM, SIGHUP
def child(cwd, words, out):
    """What a process of its own does, forked from one that has imported everything."""
    file = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    # a killed process writes nothing that it still holds
    sys.stdout.reconfigure(line_buffering=True)
    os.chdir(cwd)
    sys.argv = words
    sample.run_command(train.main)


def saved_steps(run):
    """{"run" or the part in preparation: the step of its last save}, as far as there are any."""
    files = {"run": run / "checkpoint.pt"}
    for path in run.parent.glob("prepared/*.partial"):
        files[path.name.split("-")[1]] = path
    steps = {}
    for part, path in files.items():
        # the other run may just have finished this part
        with contextlib.suppress(FileNotFoundError):
            steps[part] = load(path)["step"]
    return steps


def kill(folder, seed, n=10):
    """End a run n times, and say of what it went on: one JSON line.

    Another process does the same in the same folder. A run that ends before its time is compared
    with one that was left alone, and the next begins.
    """
    shrink(pytest.MonkeyPatch())
    torch.set_num_threads(1)
    for split in ("train", "phi", "judge", "test"):
        # before the processes fork
        few_images("shapes", split)
    moments, signals = random.Random(seed), [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP]
    for name in (f"whole{seed}", "killed"):
        (folder / name).mkdir(exist_ok=True)
    out = folder / f"out{seed}.txt"

    def start(cwd, *words):
        process = multiprocessing.get_context("fork").Process(
            target=child, args=(folder / cwd, [*LINE.split(), *words], out))
        process.start()
        return process

    begin = time.time()
    whole = start(f"whole{seed}", "--name", "run")
    whole.join()
    assert whole.exitcode == 0, out.read_text()
    longest = (time.time() - begin) / 5
    killed, went_on, run, names = 0, [], None, itertools.count()
    while killed < n or run:
        run = run or folder / "killed" / "runs" / f"{seed}-{next(names)}"
        before = saved_steps(run)
        # killed after its last save
        finished = before.get("run") == 15
        if not finished:
            process = start("killed", "--name", run.name, *["--resume"] * ("run" in before))
            process.join(moments.uniform(0, longest) if killed < n else None)
            number = None
            if process.exitcode is None:
                number = moments.choice(signals)
                os.kill(process.pid, number)
                process.join()
            said = out.read_text()
            assert process.exitcode in (0, -(number or 0), CODES.get(number)), said
            if process.exitcode == CODES.get(number):
                # what was asked to end has lost nothing
                saved = re.search(r"saved after step (\d+)(?: of the (\w+)|)", said)
                if saved:
                    step, what = saved.groups()
                    assert saved_steps(run).get(what or "run", 99) >= int(step), said
                else:
                    # after the last step there is only the report to be made
                    assert saved_steps(run)["run"] == 15, said
            for part, step in re.findall(r"^(?:(\w+): )?going on after step (\d+)", said, re.M):
                # a part is prepared for both: the other run can be further
                assert before.get(part or "run", 0) <= int(step), (before, part, step)
                assert part or before["run"] == int(step)
                went_on.append(part or "run")
            finished = process.exitcode == 0
            killed += not finished
            # as fast as the machine is now
            if finished:
                longest *= 0.5
            elif saved_steps(run) == before:
                longest *= 1.5
        if finished:
            assert same_runs(folder / f"whole{seed}" / "runs" / "run", run)
            run = None
    print(json.dumps(dict(killed=killed, went_on=went_on)))


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="children are forked")
def test_twenty_kills_at_random_moments_cost_nothing_that_was_saved(tmp_path):
    """Two runs in one folder, all preparation and the distillation: each goes on after its last
    save, and the result is that of a run that was left alone."""
    two = []
    for seed in range(2):
        words = [sys.executable, __file__, tmp_path, str(seed)]
        two.append(subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                    text=True))
    found = []
    for process, (out, errors) in [(process, process.communicate()) for process in two]:
        assert process.returncode == 0, errors[-3000:]
        found.append(json.loads(out.splitlines()[-1]))
    assert sum(f["killed"] for f in found) == 20 and sum(len(f["went_on"]) for f in found) >= 5
    assert {path.suffix for path in (tmp_path / "killed/runs/prepared").iterdir()} == {".pt"}


# ---------------------------------------------------------------- Ctrl-C and its like
@pytest.mark.parametrize("dataset, parts", [("shapes", ["tokenizer", "phi", "judge", "teacher"]),
                                            ("scenes", ["tokenizer", "phi", "teacher"])])
def test_a_signal_in_any_part_of_the_preparation_saves_and_the_same_command_goes_on(
        tmp_path, monkeypatch, dataset, parts):
    """k steps, stop, k steps are 2k steps: in the tokenizer, Phi, the judge and the teacher."""
    shrink(monkeypatch)
    stops, update = [], train.Training.update
    numbers = dict(zip(parts, [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGTERM]))
    line = LINE.replace("--steps 15", "--steps 2").replace("-steps 3", "-steps 4")
    line = line.replace("--save-every 1", "--save-every 50") + f" --name run --dataset {dataset}"

    def stopped(self, loss):
        update(self, loss)
        if self.scheds[0].last_epoch == 2 and self.part not in stops:
            stops.append(self.part)
            signal.raise_signal(numbers[self.part])

    for name in ("whole", "halves"):
        (tmp_path / name).mkdir()
    assert in_process(line, tmp_path / "whole").returncode == 0
    monkeypatch.setattr(train.Training, "update", stopped)
    for part in parts:
        done = in_process(line, tmp_path / "halves")
        assert done.returncode == CODES[numbers[part]], done.stderr[-2000:]
        said = f"saved after step 2 of the {part}. Go on with the same command"
        assert said in done.stdout and done.stderr.endswith("\n")
        assert not (tmp_path / "halves" / "runs" / "run").exists()
    done = in_process(line, tmp_path / "halves")
    assert done.returncode == 0 and stops == parts
    runs = [tmp_path / name / "runs" / "run" for name in ("whole", "halves")]
    assert same_runs(*runs)
    assert {path.suffix for path in (runs[1].parent / "prepared").iterdir()} == {".pt"}


def toy(file, stop=None):
    """A training that uses all there is: both optimisers, dropout (the global random state), a
    generator, a tensor. -> its state at the end"""
    torch.manual_seed(0)
    training = train.Training("toy", file, save_every=50)
    net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(0.5))
    generator, mean = torch.Generator().manual_seed(1), torch.zeros(4)
    for step in training.steps(net, 12, 1e-2, clip=1.0, also=[mean, generator]):
        x = torch.randn(8, 4, generator=generator)
        mean.lerp_(x.mean(0), 0.1)
        training.update((net(x) - mean).pow(2).mean())
        if step == stop:
            signal.raise_signal(signal.SIGTERM)
    states = [x.state_dict() for x in (net, *training.opts, *training.scheds)]
    return [*states, mean, generator.get_state(), torch.get_rng_state()]


@pytest.mark.parametrize("network, tables", [
    (lambda: tokenizer.VQGAN(), {"quantize.embedding.weight"}),
    (lambda: models.ConvNet(), set()),
    (lambda: models.MaskGIT(), {"tok_emb.weight", "bias"}),
    (lambda: models.MaskGen(), {"embeddings.weight"})],
    ids=["VQGAN", "ConvNet", "MaskGIT", "MaskGen"])
def test_every_weight_has_one_optimiser(tmp_path, network, tables):
    """Muon has the matrices and the filters; AdamW what is looked up, added or scales."""
    net = network()
    training = train.Training("toy", tmp_path / "none", save_every=50)
    next(training.steps(net, 1, 1e-2))
    adam, muon = ({id(p) for group in opt.param_groups for p in group["params"]}
                  for opt in training.opts)
    named = dict(net.named_parameters())
    assert not adam & muon and adam | muon == {id(p) for p in named.values()}
    assert {name for name, p in named.items() if p.ndim in (2, 4) and id(p) in adam} == tables
    assert all(named[name].ndim in (2, 4) for name in named if id(named[name]) in muon)


def test_muon_takes_a_filter_as_a_matrix():
    start = torch.randn(6, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    a, b = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.flatten(1).clone())
    opt = train.Muon([a, b], lr=0.1, weight_decay=0.1)
    for step in range(3):
        gradient = torch.randn(start.shape, generator=torch.Generator().manual_seed(1 + step))
        a.grad, b.grad = gradient, gradient.flatten(1)
        opt.step()
    assert torch.equal(a.flatten(1), b)


@pytest.mark.parametrize("shape", [(8, 24), (24, 8)])
def test_muon_is_torchs_in_float32(shape):
    """Three steps beside torch.optim.Muon, whose bfloat16 differs by about one percent."""
    start = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    opts = [train.Muon([ours], lr=0.1, weight_decay=0.1),
            torch.optim.Muon([theirs], lr=0.1, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")]
    for step in range(3):
        gradient = torch.randn(shape, generator=torch.Generator().manual_seed(1 + step))
        for p, opt in zip((ours, theirs), opts):
            p.grad = gradient
            opt.step()
    moved = (theirs - start).norm()
    assert (ours - theirs).norm() < 0.03 * moved


def test_a_short_training_goes_on_to_the_same_state(tmp_path, capsys):
    whole, file = toy(tmp_path / "none"), tmp_path / "toy.partial"
    before = [signal.getsignal(number) for number in train.STOPS]
    for stop in (4, 7):
        with pytest.raises(SystemExit) as end:
            toy(file, stop)
        assert end.value.code == 143
        assert f"saved after step {stop + 1} of the toy" in capsys.readouterr().out
        assert [signal.getsignal(number) for number in train.STOPS] == before
    assert same(toy(file), whole) and not (tmp_path / "none").exists()
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(ValueError, match="toy.partial cannot go on here .* remove the file"):
        toy(file)


@pytest.mark.parametrize("number", CODES, ids=lambda number: number.name)
def test_a_signal_that_no_loop_saw_is_not_lost(number, request):
    # a process that was started in the background ignores Ctrl-C
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    with pytest.raises(SystemExit) as end, train.stoppable() as received:
        signal.raise_signal(number)
        assert received == [number]
    assert end.value.code == CODES[number]


def test_the_second_ctrl_c_does_not_wait(request):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    with pytest.raises(KeyboardInterrupt), train.stoppable():
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)
        raise AssertionError


def test_what_nohup_ignores_stays_ignored(request):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    request.addfinalizer(lambda: signal.signal(signal.SIGHUP, before))
    with train.stoppable() as received:
        signal.raise_signal(signal.SIGHUP)
    assert not received and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


# ---------------------------------------------------------------- whose name, whose parts
def test_a_run_killed_before_its_first_save_does_not_block_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = Path("runs") / "a"
    (folder / "samples").mkdir(parents=True)
    for name in ("config.json", "checkpoint.pt.tmp"):
        (folder / name).touch()
    with train.own_folder(train.Config(name="a")) as own:
        assert own == folder
    (folder / "log.jsonl").touch()
    with pytest.raises(ValueError, match="runs/a exists already"):
        train.run_folder(train.Config(name="a"))


@pytest.mark.skipif(train.fcntl is None, reason="no such locks")
def test_a_name_belongs_to_the_run_that_chose_it(tmp_path, monkeypatch):
    """From its beginning, when nothing is there yet; a second one takes the next, or is told."""
    monkeypatch.chdir(tmp_path)
    with train.own_folder(train.Config()) as one, train.own_folder(train.Config()) as two:
        assert [one, two] == [Path("runs/shapes"), Path("runs/shapes-2")]
        assert one.is_dir() and two.is_dir()
    for settings in (dict(name="a"), dict(ablations=1), dict(bench=True)):
        cfg = train.Config(**settings)
        with train.own_folder(cfg):
            with pytest.raises(ValueError, match="belongs to a run that is under way"):
                with train.own_folder(cfg):
                    pass
        with train.own_folder(cfg):
            pass
    # nothing was saved: no name is taken, and there are no runs
    assert not Path("runs").exists()
    Path("runs/a").mkdir(parents=True)
    Path("runs/a/checkpoint.pt").touch()
    with train.own_folder(train.Config(name="a", resume=True)):
        with pytest.raises(ValueError, match="belongs to a run that is under way"):
            with train.own_folder(train.Config(name="a", resume=True)):
                pass
    assert Path("runs/a/checkpoint.pt").exists()


def test_a_name_that_was_taken_meanwhile_is_not_taken_twice(tmp_path, monkeypatch):
    """Two runs that begin at once both find the same name free."""
    monkeypatch.chdir(tmp_path)
    found, chosen = train.run_folder, []

    def slow(cfg):
        chosen.append(found(cfg))
        if len(chosen) == 1:
            # the other run
            chosen[0].mkdir(parents=True)
        return chosen[-1]
    monkeypatch.setattr(train, "run_folder", slow)
    with train.own_folder(train.Config()) as folder:
        assert folder == Path("runs/shapes-2") and chosen[0] == Path("runs/shapes")


def build_slowly(calls):
    """A part as of Prepared.add; every call leaves a line in the file `calls`."""
    def build(training):
        with open(calls, "a") as file:
            file.write("made\n")
        time.sleep(1)
        return train.ConvNet(width=4), dict(width=4)
    return build


def add_part(folder):
    os.chdir(folder)
    prepared = train.Prepared(train.Config(smoke=True), "cpu")
    prepared.add("phi", build_slowly(folder / "calls"))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="children are forked")
def test_two_runs_prepare_a_part_once(tmp_path):
    context = multiprocessing.get_context("fork")
    two = [context.Process(target=add_part, args=(tmp_path,)) for _ in range(2)]
    for process in two:
        process.start()
    for process in two:
        process.join()
    assert [process.exitcode for process in two] == [0, 0]
    assert (tmp_path / "calls").read_text() == "made\n"
    assert [path.suffix for path in (tmp_path / "runs/prepared").iterdir()] == [".pt"]


def digests_of(folder, changes, monkeypatch):
    """code_digest of a copy of the code in which train.py's text is changed: [(old, new), ...]"""
    found = []
    for i, (name, old, new) in enumerate([("train.py", "", ""), *changes]):
        place = folder / str(i)
        place.mkdir()
        for file in train.CODE:
            shutil.copy(ROOT / file, place)
        text = (place / name).read_text()
        assert old in text
        (place / name).write_text(text.replace(old, new, 1))
        monkeypatch.setattr(train, "__file__", str(place / "train.py"))
        train.code_digest.cache_clear()
        found.append(train.code_digest())
    train.code_digest.cache_clear()
    return [digest == found[0] for digest in found[1:]]


def test_a_part_belongs_to_the_code_that_made_it(tmp_path, monkeypatch):
    """What it computes, not what it says about it, nor what comes later."""
    docstring = '"""VQGAN on the world\'s images'
    same_code = digests_of(tmp_path, [
        ("train.py", docstring, docstring + " and more"),
        ("train.py", "def train_tokenizer(", "# a comment\n\n\ndef train_tokenizer("),
        ("train.py", "def distil(", "def distil2("),
        ("train.py", "0.25 * commitment", "0.3 * commitment"),
        ("train.py", "betas=(0.9, 0.95)", "betas=(0.9, 0.999)"),
        ("models.py", "class ConvNet", "A_NAME = 1\n\n\nclass ConvNet"),
        ("tokenizer.py", "class VQGAN", "A_NAME = 1\n\n\nclass VQGAN"),
        ("fpd.py", "def remask(", "def remask(extra, ")], monkeypatch)
    assert same_code == [True, True, True, False, False, False, False, False]


def test_the_code_that_makes_parts_is_there():
    for name, wanted in train.CODE.items():
        text = (ROOT / name).read_text()
        assert all(re.search(rf"^(def {x}\(|class {x}[(:])", text, re.M) for x in wanted or ())


def test_a_part_belongs_to_the_images_it_was_made_from(tmp_path, monkeypatch):
    """A class that is renamed or gets an image: new parts. A folder that was moved: the old."""
    monkeypatch.chdir(tmp_path)
    content = dict(value="1")
    monkeypatch.setattr(tokenizer, "folder_digest", lambda data: content["value"])

    def file_of(data, **settings):
        cfg = train.Config(dataset="folder", data=data, smoke=True, **settings)
        prepared = train.Prepared(cfg, "cpu")
        prepared.add("phi", lambda training: (train.ConvNet(width=4), dict(width=4)))
        return prepared.parts.files["phi"]
    first = file_of("here")
    assert file_of("moved") == first and file_of("here", anywhere=True) != first
    content["value"] = "2"
    assert file_of("here") != first


# ---------------------------------------------------------------- the file
def half_written(content, file):
    file.write(bytes(1000))
    raise OSError(28, "No space left on device")


def one_bit_off(content, file, write=torch.save):
    write(content, file)
    file.seek(1500)
    byte = file.read(1)[0]
    file.seek(1500)
    file.write(bytes([byte ^ 1]))


class Full:
    """A file on a disk with room for so many bytes."""
    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, content):
        self.room -= len(content)
        if self.room < 0:
            raise OSError(28, "No space left on device")
        return self.file.write(content)

    def flush(self):
        self.file.flush()


def on_full_disk(content, file, write=torch.save):
    """torch then says something about positions in its own file."""
    write(content, Full(file, 2000))


@pytest.mark.parametrize("what, says", [
    ("full", "the disk is full"), ("torch", "the disk is full"), ("half", "the disk is full"),
    ("bit", "cannot be read back"), ("nan", "NaN or infinite")])
def test_what_cannot_be_saved_leaves_the_last_file_alone(tmp_path, monkeypatch, capsys, what, says):
    path, content = tmp_path / "checkpoint.pt", dict(step=1, weights=[torch.ones(1000)])
    train.save(path, content)
    if what == "full":
        if not Path("/dev/full").exists():
            pytest.skip("no /dev/full, a disk without space, on this system")
        os.symlink("/dev/full", f"{path}.tmp")
    elif what == "nan":
        content["weights"][0][7] = math.nan
    else:
        broken = {"half": half_written, "bit": one_bit_off, "torch": on_full_disk}[what]
        monkeypatch.setattr(torch, "save", broken)
        # to read that bit
        monkeypatch.setattr("builtins.open", lambda file, mode, open=open:
                            open(file, mode.replace("wb", "w+b")))
    with pytest.raises(SystemExit) as stop:
        sample.run_command(lambda: train.save(path, content | dict(step=2)))
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and says in err and str(path) in err
    assert list(tmp_path.iterdir()) == [path]
    assert same(load(path), dict(step=1, weights=[torch.ones(1000)]))


def test_a_disk_that_is_full_elsewhere_is_told_too(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")
    shrink(monkeypatch)
    monkeypatch.setattr(train, "tell", full)
    done = in_process(LINE, tmp_path)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: the disk is full")


@pytest.mark.parametrize("place", ["runs", "runs/prepared", "runs/here"])
def test_a_link_to_what_is_not_there_is_called_so(tmp_path, place):
    """A disk that is not mounted, say."""
    if "/" in place:
        (tmp_path / "runs").mkdir()
    (tmp_path / place).symlink_to(tmp_path / "gone")
    refused(in_process("train.py --smoke --name here", tmp_path),
            f"{place} is a link to {tmp_path / 'gone'}, which is not there")


@pytest.mark.parametrize("made, says", [(sample.FORMAT + 1, "newer than"),
                                        (sample.FORMAT - 1, "older than")])
def test_another_format_is_named_whatever_else_is_in_it(tmp_path, made, says):
    train.save(tmp_path / "checkpoint.pt", dict(format=made, versions=dict(git="abc")))
    says = f"has format {made}, {says} {sample.FORMAT}, .* git revision abc"
    with pytest.raises(ValueError, match=says):
        sample.read_checkpoint(tmp_path)


def test_versions_name_the_git_revision_where_there_is_one(tmp_path, monkeypatch):
    assert train.versions()["torch"] == torch.__version__
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?|unknown", train.versions()["git"])
    monkeypatch.setattr(train, "__file__", str(tmp_path / "train.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert train.versions()["git"] == "unknown"


# ---------------------------------------------------------------- the log
ROWS = '{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 0.25}\n'


@pytest.mark.parametrize("end", ['{"step": 3, "lo', "\0\0\0\0", '{"step": 3}', '{"step": 3}\n', "",
                                 "\xff\xfe\n"])
def test_a_last_row_that_a_kill_has_cut_is_dropped(tmp_path, end):
    run, path = types.SimpleNamespace(folder=tmp_path, rank=0), tmp_path / "log.jsonl"
    path.write_bytes(ROWS.encode() + end.encode("latin-1"))
    with train.open_log(run, 2) as log:
        log.write('{"step": 3, "loss": 0.125}\n')
    assert path.read_text() == ROWS + '{"step": 3, "loss": 0.125}\n'
    with train.open_log(run, 1):
        pass
    assert path.read_text() == ROWS.splitlines(keepends=True)[0]


# ---------------------------------------------------------------- NaN and infinity
@pytest.mark.parametrize("term, at", [("loss", 3), ("grad_norm", 3), ("entropy", 3),
                                      ("gan_scale", 3), ("loss", 1)])
def test_a_number_that_is_not_finite_stops_the_run_and_spares_the_checkpoint(
        tmp_path, monkeypatch, term, at):
    # the loop on networks of a few hundred weights
    from test_distributed import distil
    calls, step, gan_step = itertools.count(1), fpd.fpd_step, fpd.gan_step

    def spoiled_gan(*args):
        gradient, logs = gan_step(*args)
        return gradient * math.nan, logs

    def spoiled(*args):
        loss, logs, images = step(*args)
        if next(calls) == at:
            if term == "loss":
                loss = loss * math.inf
            elif term == "grad_norm":
                # 0, and so is what its gradient divides by
                loss = loss + (images - images.detach()).abs().sqrt().sum()
            elif term == "entropy":
                logs[term] = logs[term] * math.nan
            else:
                monkeypatch.setattr(fpd, "gan_step", spoiled_gan)
        return loss, logs, images

    monkeypatch.setattr(fpd, "fpd_step", spoiled)
    file = re.escape(str(tmp_path / "checkpoint.pt"))
    says = (f"distillation: {term} is (nan|inf) at step {at}; the last good checkpoint: {file}, "
            f"step {at - 1}")
    with pytest.raises(ValueError, match=says):
        distil(tmp_path, steps=5, log_every=4, gan_weight=float(term == "gan_scale"))
    saved = load(tmp_path / "checkpoint.pt")
    assert saved["step"] == at - 1 and saved["versions"] == train.versions()
    assert all(x.isfinite().all() for x in train.tensors(saved))


def test_numbers_that_a_gpu_hands_over_late_are_still_of_their_step(tmp_path, monkeypatch):
    file, reads, tolist = tmp_path / "checkpoint.pt", [], torch.Tensor.tolist
    unread = [(step, dict(loss=torch.tensor(1.0), grad_norm=torch.tensor(x)))
              for step, x in ((1, 1.0), (2, math.inf), (3, math.nan))]
    says = "stage: grad_norm is inf at step 2; the last good checkpoint: there is none yet"
    with pytest.raises(ValueError, match=says):
        train.check_finite(unread, "stage", file)
    # all of them in one transfer
    monkeypatch.setattr(torch.Tensor, "tolist", lambda x: reads.append(x) or tolist(x))
    good = unread[:1] * 2
    assert train.check_finite(good, "stage", file) == dict(loss=1.0, grad_norm=1.0)
    assert not good and len(reads) == 1
    # its step alone is wanted: the rest should not go to a GPU
    train.save(file, dict(step=7))
    maps, read = [], torch.load
    monkeypatch.setattr(torch, "load", lambda *args, **kind:
                        maps.append(kind) or read(*args, **kind))
    with pytest.raises(ValueError, match="checkpoint.pt, step 7"):
        train.check_finite(unread, "stage", file)
    assert maps[0]["map_location"] == "cpu"


def test_a_loss_of_the_preparation_that_is_not_finite_stops_it(tmp_path):
    training = train.Training("toy", tmp_path / "toy.partial", save_every=2)
    net, says = torch.nn.Linear(2, 1), "toy: loss is nan at step 4; the last good checkpoint: "
    with pytest.raises(ValueError, match=f"{says}.*toy.partial, step 2"):
        for step in training.steps(net, 9, 1e-2):
            training.update(net(torch.full((3, 2), math.nan if step == 3 else 1.0)).mean())


@pytest.mark.parametrize("where", ["preparation", "distillation"])
def test_an_error_has_a_line_of_its_own_below_the_bar(tmp_path, monkeypatch, where):
    shrink(monkeypatch)
    if where == "preparation":
        nan = torch.nn.functional.cross_entropy
        monkeypatch.setattr(train.F, "cross_entropy", lambda *args: nan(*args) * math.nan)
    else:
        step = fpd.fpd_step

        def spoiled(*args):
            loss, logs, images = step(*args)
            return loss * math.nan, logs, images
        monkeypatch.setattr(fpd, "fpd_step", spoiled)
    done = in_process(LINE, tmp_path)
    last = re.split("[\r\n]", done.stderr.strip())[-1]
    assert done.returncode == 2 and last.startswith("error: ") and "nan at step 1" in last
    assert f"\n{last}" in done.stderr


if __name__ == "__main__":
    kill(Path(sys.argv[1]), int(sys.argv[2]))

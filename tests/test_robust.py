"""Hard to break: runs that are killed, stopped, out of disk or no longer finite lose nothing that was saved. Started as a script, it kills."""
import functools
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import in_process

import evaluate
import fpd
import sample
import tokenizer
import train

# A run from nothing in seconds: tokenizer, Phi, judge, teacher, student
LINE = ("train.py --smoke --gpus 0 --tokenizer-steps 3 --classifier-steps 3 --teacher-steps 3 --steps 15 --batch 4 --per-class 2 "
        "--sample-every 99 --save-every 1")


@functools.cache
def few_images(dataset, split, world=tokenizer.world):
    """Drawn once for all runs, which takes a second."""
    return tuple(x[:72] for x in world(train.Config(dataset=dataset, smoke=True), split))


def shrink(patch):
    """A world of few images, tiny networks, and no report: what is tested comes before it."""
    def small(cls, **sizes):
        return type(cls.__name__, (cls,), {"__init__": lambda self, **args: cls.__init__(self, **{**args, **sizes})})
    classifier, vqgan = train.train_classifier, small(tokenizer.VQGAN, ch=8)
    maskgit, maskgen = small(train.MaskGIT, width=16, depth=1, heads=2, mlp=32), small(train.MaskGen, width=16, depth=1, heads=2)
    patch.setattr(tokenizer, "world", lambda cfg, split: few_images(cfg.dataset, split))
    patch.setattr(tokenizer, "VQGAN", vqgan)
    patch.setattr(train, "MaskGIT", maskgit)
    patch.setattr(train, "MaskGen", maskgen)
    patch.setattr(sample, "PARTS", (vqgan, train.ConvNet, maskgit, maskgen, train.Words, fpd.Bank))
    patch.setattr(train, "train_classifier", lambda cfg, device, split, width, training: classifier(cfg, device, split, 4, training))
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
    """Folders in which the same command ran: the same parts, student, EMA, optimiser, random state and log?"""
    parts = [sorted((run.parent / "prepared").iterdir()) for run in (a, b)]
    assert [p.name for p in parts[0]] == [p.name for p in parts[1]] and not any("part" in p.suffix for p in parts[1])
    ours, theirs = (load(run / "checkpoint.pt") for run in (a, b))
    return (all(same(load(p), load(q)) for p, q in zip(*parts)) and all(same(ours[key], theirs[key]) for key in ours if key != "config")
            and (a / "log.jsonl").read_text() == (b / "log.jsonl").read_text())


# ------------------------------------------------------------------------------------------------ SIGKILL
def child(cwd, words, out):
    """What a process of its own does, forked from one that has imported everything."""
    file = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout.reconfigure(line_buffering=True)                        # a killed process writes nothing that it still holds
    os.chdir(cwd)
    sys.argv = words
    sample.run_command(train.main)


def saved_steps(run):
    """{"run" or the part in preparation: the step of its last save}, as far as there are any."""
    files = {"run": run / "checkpoint.pt"} | {path.name.split("-")[1]: path for path in run.parent.glob("prepared/*.partial")}
    return {part: load(path)["step"] for part, path in files.items() if path.exists()}


def kill(folder, seed, n=10):
    """Kill a run n times, and say of what it went on: one JSON line. A run that ends before its time is compared, and the next begins."""
    shrink(pytest.MonkeyPatch())
    torch.set_num_threads(1)
    for split in ("train", "phi", "judge", "test"):
        few_images("shapes", split)                                    # before the processes fork
    random_moment = random.Random(seed)
    for name in ("whole", "killed"):
        (folder / name).mkdir()
    out = folder / "out.txt"

    def start(cwd, *words):
        process = multiprocessing.get_context("fork").Process(target=child, args=(folder / cwd, [*LINE.split(), *words], out))
        process.start()
        return process

    begin = time.time()
    whole = start("whole", "--name", "run")
    whole.join()
    assert whole.exitcode == 0, out.read_text()
    longest, killed, went_on, run = (time.time() - begin) / 5, 0, [], None
    while killed < n or run:
        run = run or next(r for r in (folder / "killed" / "runs" / str(i) for i in itertools.count()) if not r.exists())
        before = saved_steps(run)
        finished = before.get("run") == 15                             # killed after its last save
        if not finished:
            process = start("killed", "--name", run.name, *["--resume"] * ("run" in before))
            process.join(random_moment.uniform(0, longest) if killed < n else None)
            if process.exitcode is None:
                process.kill()
                process.join()
            assert process.exitcode in (0, -signal.SIGKILL), out.read_text()
            said = re.findall(r"^(?:(\w+): )?going on after step (\d+)", out.read_text(), re.M)
            assert all(before[part or "run"] == int(step) for part, step in said), (before, said)
            went_on += said
            finished = process.exitcode == 0
            killed += not finished
            longest *= 0.5 if finished else 1.5 if saved_steps(run) == before else 1       # as fast as the machine is now
        if finished:
            assert same_runs(folder / "whole" / "runs" / "run", run)
            run = None
    print(json.dumps(dict(killed=killed, went_on=went_on)))


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="children are forked")
def test_twenty_kills_at_random_moments_cost_nothing_that_was_saved(tmp_path):
    """All preparation and the distillation: each goes on after its last save, and the result is that of the run that was left alone."""
    two, found = [], []                                                # ten each: most of the time is a single thread's
    for seed in range(2):
        (tmp_path / str(seed)).mkdir()
        two.append(subprocess.Popen([sys.executable, __file__, tmp_path / str(seed), str(seed)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                    text=True))
    for process, (out, errors) in [(process, process.communicate()) for process in two]:
        assert process.returncode == 0, errors[-3000:]
        found.append(json.loads(out))
    assert sum(f["killed"] for f in found) == 20 and sum(len(f["went_on"]) for f in found) >= 5


# ------------------------------------------------------------------------------------------------ Ctrl-C
@pytest.mark.parametrize("dataset, parts", [("shapes", ["tokenizer", "phi", "judge", "teacher"]), ("scenes", ["tokenizer", "phi", "teacher"])])
def test_ctrl_c_in_any_part_of_the_preparation_saves_and_the_same_command_goes_on(tmp_path, monkeypatch, dataset, parts):
    """k steps, stop, k steps are 2k steps: in the tokenizer, Phi, the judge and the teacher."""
    shrink(monkeypatch)
    stops, update = [], train.Training.update
    line = LINE.replace("--steps 15", "--steps 2").replace("-steps 3", "-steps 4").replace("--save-every 1", "--save-every 50")
    line += f" --name run --dataset {dataset}"

    def stopped(self, loss):
        update(self, loss)
        if self.scheds[0].last_epoch == 2 and self.part not in stops:
            stops.append(self.part)
            signal.raise_signal(signal.SIGINT)

    for name in ("whole", "halves"):
        (tmp_path / name).mkdir()
    assert in_process(line, tmp_path / "whole").returncode == 0
    monkeypatch.setattr(train.Training, "update", stopped)
    for part in parts:
        done = in_process(line, tmp_path / "halves")
        assert done.returncode == 130 and f"saved after step 2 of the {part}. Go on with the same command" in done.stdout, done.stderr[-2000:]
        assert not (tmp_path / "halves" / "runs" / "run").exists()
    done = in_process(line, tmp_path / "halves")
    assert done.returncode == 0 and stops == parts
    assert same_runs(tmp_path / "whole" / "runs" / "run", tmp_path / "halves" / "runs" / "run")


def toy(file, stop=None):
    """A training that uses all there is: both optimisers, dropout (the global random state), a generator, a tensor. -> its state at the end"""
    torch.manual_seed(0)
    training, net = train.Training("toy", file, save_every=50), torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(0.5))
    generator, mean = torch.Generator().manual_seed(1), torch.zeros(4)
    for step in training.steps(net, 12, 1e-2, clip=1.0, also=[mean, generator], matrices=[net[0].weight]):
        x = torch.randn(8, 4, generator=generator)
        mean.lerp_(x.mean(0), 0.1)
        training.update((net(x) - mean).pow(2).mean())
        if step == stop:
            signal.raise_signal(signal.SIGINT)
    return [net.state_dict(), *(x.state_dict() for x in (*training.opts, *training.scheds)), mean, generator.get_state(), torch.get_rng_state()]


def test_every_weight_has_one_optimiser(tmp_path):
    net = torch.nn.Linear(4, 4)
    training = train.Training("toy", tmp_path / "none", save_every=50)
    next(training.steps(net, 1, 1e-2, matrices=[net.weight]))
    adam, muon = ([p for group in opt.param_groups for p in group["params"]] for opt in training.opts)
    assert len(adam) == len(muon) == 1 and adam[0] is net.bias and muon[0] is net.weight


def test_a_short_training_goes_on_to_the_same_state(tmp_path):
    whole, file, before = toy(tmp_path / "none"), tmp_path / "toy.partial", signal.getsignal(signal.SIGINT)
    for stop in (4, 7):
        with pytest.raises(KeyboardInterrupt, match=f"saved after step {stop + 1} of the toy"):
            toy(file, stop)
        assert signal.getsignal(signal.SIGINT) is before
    assert same(toy(file), whole) and not (tmp_path / "none").exists()
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(ValueError, match="toy.partial cannot go on here .* remove the file"):
        toy(file)


def test_ctrl_c_that_no_loop_saw_is_not_lost(request):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a process that was started in the background ignores it
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    with pytest.raises(KeyboardInterrupt), train.ctrl_c() as pressed:
        signal.raise_signal(signal.SIGINT)
        assert pressed
    with pytest.raises(KeyboardInterrupt), train.ctrl_c():
        for _ in range(2):                                             # the second does not wait
            signal.raise_signal(signal.SIGINT)
        raise AssertionError


def test_a_run_killed_before_its_first_save_does_not_block_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = Path("runs") / "a"
    (folder / "samples").mkdir(parents=True)
    for name in ("config.json", "checkpoint.pt.tmp"):
        (folder / name).touch()
    assert train.run_folder(train.Config(name="a")) == folder
    (folder / "log.jsonl").touch()
    with pytest.raises(ValueError, match="runs/a exists already"):
        train.run_folder(train.Config(name="a"))


# ------------------------------------------------------------------------------------------------ the file
def half_written(content, file):
    file.write(bytes(1000))
    raise OSError(28, "No space left on device")


def one_bit_off(content, file, write=torch.save):
    write(content, file)
    file.seek(1500)
    byte = file.read(1)[0]
    file.seek(1500)
    file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("what, says", [("full", "No space left on device"), ("half", "No space left on device"), ("bit", "cannot be read back"),
                                        ("nan", "NaN or infinite")])
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
        monkeypatch.setattr(torch, "save", {"half": half_written, "bit": one_bit_off}[what])
        monkeypatch.setattr("builtins.open", lambda file, mode, open=open: open(file, mode.replace("wb", "w+b")))       # to read that bit
    with pytest.raises(SystemExit) as stop:
        sample.run_command(lambda: train.save(path, content | dict(step=2)))
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and says in err and str(path) in err
    assert list(tmp_path.iterdir()) == [path] and same(load(path), dict(step=1, weights=[torch.ones(1000)]))


@pytest.mark.parametrize("made, says", [(sample.FORMAT + 1, "newer than"), (sample.FORMAT - 1, "older than")])
def test_another_format_is_named_whatever_else_is_in_it(tmp_path, made, says):
    train.save(tmp_path / "checkpoint.pt", dict(format=made, versions=dict(git="abc")))
    with pytest.raises(ValueError, match=f"has format {made}, {says} {sample.FORMAT}, .* git revision abc"):
        sample.read_checkpoint(tmp_path)


def test_versions_name_the_git_revision_where_there_is_one(tmp_path, monkeypatch):
    assert train.versions()["torch"] == torch.__version__ and re.fullmatch(r"[0-9a-f]{40}(-dirty)?|unknown", train.versions()["git"])
    monkeypatch.setattr(sample, "__file__", str(tmp_path / "sample.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert train.versions()["git"] == "unknown"


# ------------------------------------------------------------------------------------------------ NaN and infinity
@pytest.mark.parametrize("term, at", [("loss", 3), ("grad_norm", 3), ("entropy", 3), ("gan_scale", 3), ("loss", 1)])
def test_a_number_that_is_not_finite_stops_the_run_and_spares_the_checkpoint(tmp_path, monkeypatch, term, at):
    from test_distributed import distil                                # the loop on networks of a few hundred weights
    calls, step, gan_step = itertools.count(1), fpd.fpd_step, fpd.gan_step

    def spoiled(*args):
        loss, logs, images = step(*args)
        if next(calls) == at:
            if term == "loss":
                loss = loss * math.inf
            elif term == "grad_norm":
                loss = loss + (images - images.detach()).abs().sqrt().sum()      # 0, and so is what its gradient divides by
            elif term == "entropy":
                logs[term] = logs[term] * math.nan
            else:
                monkeypatch.setattr(fpd, "gan_step", lambda *args: (gan_step(*args)[0] * math.nan, gan_step(*args)[1]))
        return loss, logs, images

    monkeypatch.setattr(fpd, "fpd_step", spoiled)
    file = re.escape(str(tmp_path / "checkpoint.pt"))
    with pytest.raises(ValueError, match=f"distillation: {term} is (nan|inf) at step {at}; the last good checkpoint: {file}, step {at - 1}"):
        distil(tmp_path, steps=5, log_every=4, gan_weight=float(term == "gan_scale"))
    saved = load(tmp_path / "checkpoint.pt")
    assert saved["step"] == at - 1 and all(x.isfinite().all() for x in train.tensors(saved)) and saved["versions"] == train.versions()


def test_numbers_that_a_gpu_hands_over_late_are_still_of_their_step(tmp_path):
    recent = [(step, dict(loss=torch.tensor(1.0), grad_norm=torch.tensor(x))) for step, x in ((1, 1.0), (2, math.inf), (3, math.nan))]
    with pytest.raises(ValueError, match="stage: grad_norm is inf at step 2; the last good checkpoint: there is none yet"):
        train.check_finite(recent, "stage", tmp_path / "checkpoint.pt")
    good = recent[:1]
    train.check_finite(good, "stage", tmp_path / "checkpoint.pt")
    assert not good


def test_a_loss_of_the_preparation_that_is_not_finite_stops_it(tmp_path):
    training, net = train.Training("toy", tmp_path / "toy.partial", save_every=2), torch.nn.Linear(2, 1)
    with pytest.raises(ValueError, match="toy: loss is nan at step 4; the last good checkpoint: .*toy.partial, step 2"):
        for step in training.steps(net, 9, 1e-2):
            training.update(net(torch.full((3, 2), math.nan if step == 3 else 1.0)).mean())


if __name__ == "__main__":
    kill(Path(sys.argv[1]), int(sys.argv[2]))

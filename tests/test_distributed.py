"""Several processes: two of them with gloo on the CPU do what one does, twice.

torchrun starts this file itself; train.launch the command.
"""
import os
import signal
import subprocess
import sys
import types
from pathlib import Path

# conftest: for the import path when torchrun starts this file
import conftest
import pytest
import torch
import torch.distributed as dist
from test_fpd import System

import fpd
import train

pytestmark = pytest.mark.slow
# of rank 1, for --seed 0
OTHER_SEED = 1_000_003
CASES = {"fpd": {}, "gan": dict(gan_weight=1.0), "dimo": dict(method="dimo"),
         "sdtt": dict(method="sdtt")}


def distil(folder, mark=lambda part: None, **settings):
    """The loop on networks of a few hundred weights.

    No clipping, no warm-up: Adam's first moment after one step is then a tenth of the gradient.
    """
    cfg = dict(dataset="imagenet", smoke=True, batch=8, per_class=4, blocks=(0, 1, 2, 3), lr=1e-2,
               save_every=1, teacher_cfg=1.0)
    system = System(**{**cfg, **settings})
    parts = types.SimpleNamespace(tokenizer=system.vq, phi=system.phi, teacher=system.teacher,
                                  text=None, captions=None, names=["a", "b", "c"], saved={})
    folder.mkdir(parents=True, exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "CLIP", 1e9)
        patch.setattr(train, "WARMUP", 1)
        return train.distil(system.cfg, parts, folder, "cpu", mark)


def saved(folder, tmp_path):
    return torch.load(tmp_path / folder / "checkpoint.pt", weights_only=True)


def gradient(state):
    moments = state["opt"]["state"].values()
    return torch.cat([10 * moment["exp_avg"].flatten() for moment in moments])


# ---------------------------------------------------------------- what each of the two does
def same_everywhere(network):
    """Weights equal on all ranks, bit for bit? (The running statistics of a BatchNorm, which
    training does not read, are each rank's own.)"""
    mine = torch.cat([p.detach().flatten() for p in network.parameters()])
    theirs = mine.clone()
    dist.broadcast(theirs, 0)
    return bool(torch.equal(mine, theirs))


def two_processes(folder):
    train.meet("cpu")
    rank, _ = train.ranks()
    kept = []

    def keep(cls):
        """Every object of this class, from now on, in `kept`."""
        init = cls.__init__

        def keeping(self, *args):
            init(self, *args)
            kept.append(self)
        cls.__init__ = keeping

    for cls in (fpd.Gan, fpd.DiMO, fpd.SDTT):
        keep(cls)
    for name, settings in CASES.items():
        kept.clear()
        networks = [distil(folder / name, steps=4 if name == "sdtt" else 2, **settings)]
        for x in kept:
            for part in ("discriminator", "auxiliary", "teacher"):
                if hasattr(x, part):
                    networks.append(getattr(x, part))
        assert len(networks) == dict(fpd=1, gan=2, dimo=3, sdtt=2)[name]
        assert all(map(same_everywhere, networks)), name
    distil(folder / "one", steps=1)
    distil(folder / "halves", steps=1)
    distil(folder / "halves", steps=2, resume=True)

    def ctrl_c(part):
        """At first noticed by rank 1 alone."""
        if rank == 1 and part == "update":
            os.kill(os.getpid(), signal.SIGINT)

    try:
        distil(folder / "stopped", ctrl_c, steps=9)
    except SystemExit as stop:
        assert stop.code == (130, 0)[rank]
    (folder / f"done{rank}").touch()
    dist.destroy_process_group()


# ---------------------------------------------------------------- what came of it
def environment(**more):
    return {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), **more}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """-> where two processes of torchrun have left their runs"""
    folder = tmp_path_factory.mktemp("ranks")
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*words, __file__, str(folder)], capture_output=True, text=True,
                          env=environment())
    assert done.returncode == 0, done.stderr[-3000:]
    assert {path.name for path in folder.glob("done*")} == {"done0", "done1"}
    return folder


def test_the_gradient_is_the_mean_of_the_gradients_of_single_processes(folder, tmp_path):
    """Exactly: each rank is the single process that has its seed. The drift's unit and RMS are
    those of a rank's own batch."""
    singles = []
    for seed in (0, OTHER_SEED):
        distil(tmp_path / str(seed), steps=1, seed=seed)
        singles.append(saved(str(seed), tmp_path))
    both = saved("one", folder)
    a, b, mean = map(gradient, (*singles, both))
    torch.testing.assert_close(mean, (a + b) / 2, atol=1e-7 * mean.abs().max().item(), rtol=1e-5)
    # different drafts
    assert torch.cosine_similarity(a, b, 0) < 0.9 and mean.abs().max() > 0
    # each drew what it would have drawn alone
    assert torch.equal(both["rng"], torch.cat([state["rng"] for state in singles]))


def test_one_checkpoint_for_all_and_resume_is_the_uninterrupted_run(folder):
    whole, halves, stopped = (saved(name, folder) for name in ("fpd", "halves", "stopped"))
    assert len(whole["rng"]) == 2 and torch.equal(whole["rng"], halves["rng"])
    for part in ("student", "ema"):
        assert all(torch.equal(whole[part][key], halves[part][key]) for key in whole[part]), part
    assert stopped["step"] == 1
    # log_every is 10, and rank 1 has no log at all
    assert not (folder / "stopped" / "log.jsonl").read_text()


def test_another_number_of_processes_cannot_go_on(folder):
    with pytest.raises(ValueError, match="ran in 2 processes, which cannot become 1"):
        distil(folder / "stopped", steps=9, resume=True)


def test_gradients_are_exchanged_once_for_all(monkeypatch):
    """Of a helper's optimiser, a discriminator's hundred of tensors."""
    sizes = []

    def all_reduce(flat):
        sizes.append(flat.numel())
        # the other process has the same
        flat *= 2
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    net = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 5))
    net(torch.randn(4, 3)).sum().backward()
    before = [p.grad.clone() for p in net.parameters()]
    train.average_gradients(torch.optim.SGD(net.parameters()))
    assert sizes == [sum(p.numel() for p in net.parameters())]
    assert all(torch.equal(p.grad, old) for p, old in zip(net.parameters(), before))


# ---------------------------------------------------------------- the command
SMOKE = "train.py --dataset imagenet --smoke --gpus 0 --batch 4 --per-class 2"


def launched(line, cwd):
    """What --gpus 2 does, on the CPU -> a process that train.launch becomes two of"""
    script, *words = line.split()
    words = [str(conftest.ROOT / script), *words]
    code = f"import sys; sys.path.insert(0, {str(conftest.ROOT)!r}); import train; " \
           f"sys.argv = {words!r}; train.launch(2)"
    return subprocess.Popen([sys.executable, "-c", code], cwd=cwd, env=environment(), text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_launch_runs_the_command(tmp_path):
    """One run, one log, everything said once."""
    process = launched(SMOKE + " --steps 1", tmp_path)
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-3000:]
    assert out.count("Nothing was learnt") == 1 and out.count("distil: 1 steps to come, each of 8")
    run = tmp_path / "runs" / "imagenet-smoke"
    assert {path.name for path in run.parent.iterdir()} == {"prepared", run.name}
    assert len((run / "log.jsonl").read_text().splitlines()) == 1
    assert len(saved("imagenet-smoke", tmp_path / "runs")["rng"]) == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda x: x.name)
def test_torchrun_that_is_stopped_saves(tmp_path, number):
    """It hands the signal on to its processes, and waits for them."""
    process = launched(SMOKE + " --steps 100000 --sample-every 200000 --save-every 200000",
                       tmp_path)
    log = tmp_path / "runs" / "imagenet-smoke" / "log.jsonl"
    out, errors = conftest.stopped_in_its_loop(process, log, number)
    assert "Go on with: python train.py --resume --name imagenet-smoke" in out, errors[-3000:]
    rows = log.read_text().splitlines()
    assert saved("imagenet-smoke", tmp_path / "runs")["step"] == len(rows) > 0


def test_more_processes_than_gpus_are_told_once(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    line = "train.py --smoke --dataset imagenet"
    monkeypatch.setenv("RANK", "0")
    conftest.refused(conftest.in_process(line, tmp_path),
                     "4 processes were started here, but there are 2 CUDA devices")
    # the others leave the word to rank 0, and are ended by torchrun
    waits = []
    monkeypatch.setattr(train.time, "sleep", waits.append)
    monkeypatch.setenv("RANK", "1")
    conftest.in_process(line, tmp_path)
    assert waits == [60]
    # two machines with two GPUs each; or the CPU
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert train.parse(line.split()[1:]).gpus is None
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert train.parse(line.split()[1:] + ["--gpus", "0"]).gpus == 0


if __name__ == "__main__":
    two_processes(Path(sys.argv[1]))

"""Several processes: two of them with gloo on the CPU do what one does, twice. torchrun starts this file itself; train.launch the command."""
import os
import signal
import subprocess
import sys
import types
from pathlib import Path

import conftest  # noqa: F401, for the import path when torchrun starts this file
import pytest
import torch
import torch.distributed as dist
from test_fpd import System

import fpd
import sample
import train

pytestmark = pytest.mark.slow
OTHER_SEED = 1_000_003                                                 # of rank 1, for --seed 0
CASES = {"fpd": {}, "gan": dict(gan_weight=1.0), "dimo": dict(method="dimo"), "sdtt": dict(method="sdtt")}


def distil(folder, mark=lambda part: None, **settings):
    """The loop on networks of a few hundred weights. No clipping: Adam's first moment after one step is then a tenth of the gradient."""
    cfg = {**dict(dataset="imagenet", smoke=True, batch=8, per_class=4, blocks=(0, 1, 2, 3), lr=1e-2, warmup=1, clip=1e9, save_every=1,
                  teacher_cfg=1.0), **settings}
    system = System(**cfg)
    parts = types.SimpleNamespace(tokenizer=system.vq, phi=system.phi, teacher=system.teacher, text=None, captions=None,
                                  names=["a", "b", "c"], files={})
    folder.mkdir(parents=True, exist_ok=True)
    return train.distil(system.cfg, parts, folder, "cpu", mark)


def saved(folder, tmp_path):
    return torch.load(tmp_path / folder / "checkpoint.pt", weights_only=True)


def gradient(state):
    return torch.cat([10 * moment["exp_avg"].flatten() for moment in state["opt"]["state"].values()])


# ------------------------------------------------------------------------------------------------ what each of the two processes does
def same_everywhere(network):
    """Weights equal on all ranks, bit for bit? (The running statistics of a BatchNorm, which training does not read, are each rank's own.)"""
    mine = torch.cat([p.detach().flatten() for p in network.parameters()])
    theirs = mine.clone()
    dist.broadcast(theirs, 0)
    return bool(torch.equal(mine, theirs))


def two_processes(folder):
    rank = train.meet("cpu")
    kept = []
    for cls in (fpd.Gan, fpd.DiMO, fpd.SDTT):
        def keep(self, *args, old=cls.__init__):
            old(self, *args)
            kept.append(self)
        cls.__init__ = keep
    for name, settings in CASES.items():
        kept.clear()
        networks = [distil(folder / name, steps=4 if name == "sdtt" else 2, **settings)]
        networks += [getattr(x, part) for x in kept for part in ("discriminator", "auxiliary", "teacher") if hasattr(x, part)]
        assert len(networks) == (1, 2, 3, 2)[list(CASES).index(name)] and all(map(same_everywhere, networks)), name
    distil(folder / "one", steps=1)
    distil(folder / "halves", steps=1)
    distil(folder / "halves", steps=2, resume=True)
    try:                                                               # Ctrl-C, at first noticed by rank 1 alone
        distil(folder / "stopped", lambda part: rank == 1 and part == "update" and os.kill(os.getpid(), signal.SIGINT), steps=9)
    except SystemExit as stop:
        assert stop.code == (130, 0)[rank]
    (folder / f"done{rank}").touch()
    dist.destroy_process_group()


# ------------------------------------------------------------------------------------------------ what came of it
@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """-> where two processes of torchrun have left their runs"""
    folder = tmp_path_factory.mktemp("ranks")
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__, str(folder)],
                          capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())})
    assert done.returncode == 0 and {path.name for path in folder.glob("done*")} == {"done0", "done1"}, done.stderr[-3000:]
    return folder


def test_the_gradient_is_the_mean_of_the_gradients_of_single_processes(folder, tmp_path):
    """Exactly: each rank is the single process that has its seed. The drift's unit and RMS are those of a rank's own batch."""
    singles = []
    for seed in (0, OTHER_SEED):
        distil(tmp_path / str(seed), steps=1, seed=seed)
        singles.append(saved(str(seed), tmp_path))
    both = saved("one", folder)
    a, b, mean = map(gradient, (*singles, both))
    torch.testing.assert_close(mean, (a + b) / 2, atol=1e-7 * mean.abs().max().item(), rtol=1e-5)
    assert torch.cosine_similarity(a, b, 0) < 0.9 and mean.abs().max() > 0         # different drafts
    assert torch.equal(both["rng"], torch.cat([state["rng"] for state in singles]))         # each drew what it would have drawn alone


def test_one_checkpoint_for_all_and_resume_is_the_uninterrupted_run(folder):
    whole, halves, stopped = (saved(name, folder) for name in ("fpd", "halves", "stopped"))
    assert len(whole["rng"]) == 2 and torch.equal(whole["rng"], halves["rng"])
    for part in ("student", "ema"):
        assert all(torch.equal(whole[part][key], halves[part][key]) for key in whole[part]), part
    assert stopped["step"] == 1
    assert len((folder / "stopped" / "log.jsonl").read_text().splitlines()) == 0    # log_every is 10, and rank 1 has no log at all


def test_another_number_of_processes_cannot_go_on(folder):
    with pytest.raises(ValueError, match="ran in 2 processes, which cannot become 1"):
        distil(folder / "stopped", steps=9, resume=True)


def test_launch_runs_the_command(tmp_path, monkeypatch, capfd):
    """What --gpus N does, on the CPU: one run, one log, everything said once."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", "train.py --dataset imagenet --smoke --gpus 0 --steps 1 --batch 4 --per-class 2".split())
    before = signal.getsignal(signal.SIGINT)
    try:
        train.launch(train.main, 2)
    finally:
        signal.signal(signal.SIGINT, before)
    assert capfd.readouterr().out.count("Nothing was learnt") == 1
    run = tmp_path / "runs" / "imagenet-smoke"
    assert {path.name for path in run.parent.iterdir()} == {"prepared", run.name} and len((run / "log.jsonl").read_text().splitlines()) == 1
    assert len(saved("imagenet-smoke", tmp_path / "runs")["rng"]) == 2


if __name__ == "__main__":
    two_processes(Path(sys.argv[1]))

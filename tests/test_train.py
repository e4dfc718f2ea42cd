"""train.py by its parts: settings, Muon, prepared files, folders, ablations."""
import json
import math
from pathlib import Path

import pytest
import torch
from conftest import in_process, own_copy, refused
from torch import nn

import evaluate
import models
import sample
import tokenizer
import train


# ---------------------------------------------------------------- settings
def test_settings_are_the_data_sets_then_the_methods_then_what_was_typed():
    cfg = train.parse("--dataset scenes --method dimo --remask 0.2 0.8 --no-own-pair".split())
    assert cfg.batch == 64 and cfg.init_mask == 0.6 and cfg.affinity == "apart"
    assert cfg.remask == (0.2, 0.8) and not cfg.own_pair
    paper = train.parse(["--dataset", "imagenet"])
    assert (paper.batch, paper.lr, paper.bandwidths) == (32, 1e-5, (0.02, 0.05, 0.2))
    assert paper.blocks == (2, 5, 8, 11)
    assert train.parse(["--dataset", "laion"]).batch == 64


@pytest.mark.parametrize("line", [
    "--batch 40 --per-class 32", "--gan-weight 1 --method dimo", "--method sdtt --init-mask 0.9",
    "--draft teacher", "--init 0.5", "--data photos", "--dataset folder"])
def test_settings_that_would_silently_give_something_else_are_refused(line):
    with pytest.raises(SystemExit, match="2"):
        train.parse(line.split())


def test_the_learning_rate_rises_stays_and_falls():
    cfg = train.Config(steps=100, lr=1.0, decay=0.5)
    rates = [train.learning_rate(step, cfg) for step in range(1, 101)]
    assert rates[0] == 1 / train.WARMUP and rates[19] == rates[50] == 1.0
    assert all(a > b for a, b in zip(rates[51:], rates[52:])) and 0 < rates[99] < 0.01


# ---------------------------------------------------------------- the optimiser of the parts
@pytest.mark.parametrize("network, tables", [
    (tokenizer.VQGAN, {"quantize.embedding.weight"}),
    (models.ConvNet, set()),
    (models.MaskGIT, {"tok_emb.weight", "bias"}),
    (models.MaskGen, {"embeddings.weight"})])
def test_every_weight_has_one_optimiser(network, tables):
    """Muon has the matrices and the filters; AdamW what is looked up, added or scales."""
    net = network()
    adam, muon = ({id(p) for group in opt.param_groups for p in group["params"]}
                  for opt in train.Optimiser(net, 1, 1e-2).opts)
    named = dict(net.named_parameters())
    assert not adam & muon and adam | muon == {id(p) for p in named.values()}
    assert {name for name, p in named.items() if p.ndim in (2, 4) and id(p) in adam} == tables
    assert all(named[name].ndim in (2, 4) for name in named if id(named[name]) in muon)


@pytest.mark.parametrize("shape", [(8, 24), (24, 8)])
def test_muon_is_torchs_in_float32(shape):
    """Three steps beside torch.optim.Muon, whose bfloat16 differs by about one percent."""
    start = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    opts = [train.Muon([ours], lr=0.1, weight_decay=0.1),
            torch.optim.Muon([theirs], lr=0.1, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")]
    for step in range(3):
        gradient = torch.randn(shape, generator=torch.Generator().manual_seed(1 + step))
        for p, opt in zip((ours, theirs), opts):
            p.grad = gradient
            opt.step()
    assert (ours - theirs).norm() < 0.03 * (theirs - start).norm()


def test_a_training_with_a_loss_that_is_not_finite_stops():
    net = nn.Linear(2, 1)
    optimiser = train.Optimiser(net, 9, 1e-2)
    optimiser.update(net(torch.ones(3, 2)).mean())
    with pytest.raises(ValueError, match="nan"):
        optimiser.update(net(torch.full((3, 2), math.nan)).mean())


# ---------------------------------------------------------------- prepared parts and files
def fill_with_ones(net, steps, cfg, device):
    for p in net.parameters():
        nn.init.ones_(p)


def fill_with_twos(net, steps, cfg, device):
    for p in net.parameters():
        nn.init.constant_(p, 2.0)


def test_a_part_is_trained_once_and_again_for_other_settings_code_or_images(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = tmp_path / "data"
    data.mkdir()
    stamps = ["as it was"]
    monkeypatch.setattr(tokenizer, "fingerprint", lambda cfg, times:
                        stamps[-1] if cfg.dataset == "folder" else "")

    def files(cfg=train.Config(), training=fill_with_ones, before="", args=dict(width=8)):
        train.prepared("phi", 0, models.ConvNet, args, training, cfg.classifier_steps, cfg, "cpu",
                       {}, before=before)
        return len(list(Path("runs/prepared").iterdir()))

    assert files() == 1 and files() == 1
    assert files(train.Config(classifier_steps=7)) == 2
    assert files(args=dict(width=16)) == 3
    assert files(training=fill_with_twos) == 4
    assert files(before="another tokenizer") == 5
    assert files(train.Config(smoke=True)) == 6
    folder = train.Config(dataset="folder", data=str(data))
    assert files(folder) == 7 and files(folder) == 7
    stamps.append("another picture")
    assert files(folder) == 8
    # what a run of steps, seed or method changes is no part's business
    assert files(train.Config(seed=5, steps=9, teacher_steps=9, method="dimo")) == 8


def test_what_a_checkpoint_holds_of_its_parts_is_taken_without_training(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(1)
    state = models.ConvNet(width=8).state_dict()
    saved = {"phi": dict(cls="ConvNet", args=dict(width=8), state=state)}
    phi = train.prepared("phi", 0, models.ConvNet, {}, None, 0, train.Config(), "cpu", saved)
    assert all(torch.equal(phi.state_dict()[key], state[key]) for key in state)
    assert not phi.training and not any(p.requires_grad for p in phi.parameters())
    assert not list(tmp_path.iterdir())


def test_a_save_that_is_cut_short_leaves_the_last_file_alone(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    train.save(path, dict(step=1))

    def half(content, file, write=torch.save):
        write(content, file)
        Path(file).write_bytes(Path(file).read_bytes()[:20])
        raise OSError("No space left on device")
    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="No space"):
        train.save(path, dict(step=2))
    assert torch.load(path, weights_only=True) == dict(step=1)


def test_a_run_takes_the_next_free_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = [train.new_folder(train.Config()).name for _ in range(3)]
    assert names == ["shapes", "shapes-2", "shapes-3"]
    assert train.new_folder(train.Config(method="dimo", smoke=True)).name == "shapes-dimo-smoke"
    assert train.new_folder(train.Config(name="mine")).name == "mine"
    with pytest.raises(FileExistsError, match="mine"):
        train.new_folder(train.Config(name="mine"))


# ---------------------------------------------------------------- Tables 3 and 4 in miniature
def test_a_row_differs_from_the_base_in_what_its_name_says():
    labels = {row: settings for _, row, settings, _ in train.ablation_rows(
        train.parse(["--dataset", "shapes"]))}
    captions = {row: settings for _, row, settings, _ in train.ablation_rows(
        train.parse(["--dataset", "scenes"]))}
    assert labels["soft embedding"] == captions["soft embedding"] == dict(estimator="soft")
    assert labels["STE + GAN"] == dict(gan_weight=0.5, per_class=16)
    # the whole batch is compared in any case
    assert captions["STE + GAN"] == dict(gan_weight=0.5)
    assert "16 drafts of a class" in labels and "16 drafts of a class" not in captions
    assert "without the own pair" in captions and "without the own pair" not in labels
    assert labels["FPD, the base"] == captions["FPD, the base"] == {}


@pytest.mark.parametrize("method, passes", [("fpd", 2), ("dimo", 2), ("sdtt", 31 / 4)])
def test_the_teachers_passes_are_counted(method, passes, smoke_runs, monkeypatch):
    """Of its network, per step and image. SDTT's teacher is a copy of it, and counted with it."""
    folder, _ = smoke_runs("shapes")
    run = sample.load_run(folder / "runs/shapes-smoke", "cpu")
    cfg = train.Config(**run.cfg.__dict__ | train.METHODS[method] | dict(method=method))
    rows, forward = [], models.MaskGIT.forward

    def counted(self, z, labels, drop=None):
        # the student is the only one with gradient at its weights
        if not next(self.parameters()).requires_grad:
            rows.append(len(z))
        return forward(self, z, labels, drop)
    monkeypatch.setattr(models.MaskGIT, "forward", counted)
    monkeypatch.setattr(train, "sample_grid", lambda *args: None)
    run.saved = {}
    train.distil(cfg, run, folder_of(folder, method), "cpu")
    assert train.teacher_passes(cfg) == round(passes * cfg.steps) == sum(rows) / cfg.batch


def folder_of(folder, method):
    place = folder.parent / f"passes-{method}-{folder.name}"
    place.mkdir()
    return place


def two_steps(run, model, steps, *rest, score=evaluate.score):
    """The teacher's 16 steps are most of the time."""
    return score(run, model, min(steps, 2), *rest)


@pytest.fixture(scope="module")
def ablations(smoke_runs, tmp_path_factory):
    """A folder in which --ablations has made two rows with two seeds -> folder, what it said"""
    folder = own_copy(tmp_path_factory, smoke_runs("shapes"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "ABLATIONS", train.ABLATIONS[:2])
        patch.setattr(train, "sample_grid", lambda *args: None)
        patch.setattr(evaluate, "score", two_steps)
        done = in_process("train.py --smoke --ablations 2 --steps 1", folder)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder, done


@pytest.mark.slow
def test_every_row_is_made_once_and_then_kept(ablations, monkeypatch):
    folder, done = ablations
    monkeypatch.setattr(train, "ABLATIONS", train.ABLATIONS[:2])
    root = folder / "runs/ablations-shapes-smoke"
    names = {path.parent.name for path in root.glob("*/score.json")}
    assert names == {f"{row}-{seed}" for row in ("fpd-the-base", "soft-embedding")
                     for seed in (0, 1)}
    rows = json.loads((root / "report.json").read_text())["rows"]
    assert [(row["row"], len(row["scores"])) for row in rows] == [
        ("teacher 16", 1), ("teacher 1", 1), ("FPD, the base", 2), ("soft embedding", 2)]
    assert (root / "report.png").exists() and "soft embedding" in done.stdout
    # the same command trains nothing again
    monkeypatch.setattr(train, "distil", None)
    monkeypatch.setattr(evaluate, "score", two_steps)
    again = in_process("train.py --smoke --ablations 2 --steps 1", folder)
    assert again.returncode == 0 and again.stdout.splitlines()[-3:] == done.stdout.splitlines()[-3:]


def test_rows_of_other_settings_or_networks_do_not_stand_in_one_table(ablations, monkeypatch):
    folder, _ = ablations
    monkeypatch.setattr(train, "ABLATIONS", train.ABLATIONS[:1])
    line = "train.py --smoke --ablations 2 --steps 1"
    refused(in_process(f"{line} --lr 0.5", folder), "other settings or networks")
    config = folder / "runs/ablations-shapes-smoke/fpd-the-base-0/config.json"
    config.write_text(config.read_text().replace("shapes-teacher-", "shapes-teacher-other"))
    refused(in_process(line, folder), "other settings or networks", "another --name")

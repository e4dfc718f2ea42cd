"""train.py by its parts: settings, Muon, prepared files, folders, ablations."""
import dataclasses
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
    assert cfg.per_class is None and train.parse(["--per-class", "none"]).per_class is None
    # One class a batch; with the GAN, whose real images are of all classes, several.
    assert [train.parse(line.split()).per_class for line in (
        "--seed 1", "--gan-weight 1", "--gan-weight 1 --per-class 32")] == [64, 16, 32]


def test_help_explains_every_setting(capsys):
    with pytest.raises(SystemExit, match="0"):
        train.parse(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(train.Config):
        assert "--" + field.name.replace("_", "-") in text
        assert " ".join(field.metadata["help"].split()) in text.replace("- ", "-"), field.name
    assert "[default: 32; shapes, scenes, folder, laion: 64]" in text


@pytest.mark.parametrize("line, message", [
    # Shares typed as percent
    ("--init-mask 90", "are shares"), ("--remask 10 90", "are shares"),
    ("--remask 0.9 0.1", "LOW HIGH"),
    ("--decay 70", "are shares"), ("--ema 98.5", "are shares"),
    ("--batch 40 --per-class 32", "not a multiple"),
    ("--gan-weight 1 --method dimo", "needs --method fpd"),
    ("--method sdtt --init-mask 0.9", "fully masked"),
    ("--seed 5000", "0 to 4293"), ("--seed 4292 --ablations 3", "0 to 4291"),
    ("--gpus 1", "sees no GPU"), ("--name a/b", "without /"), ("--name there", "exists already"),
    ("--dataset imagenet --ablations 1", "--ablations are for"),
    ("--data photos", "--data DIR"), ("--dataset folder", "--data DIR"),
    ("--dataset imagenet --data photos", "--data DIR"),
    ("--dataset imagenet --gan-weight 1 --smoke", "--data DIR"),
    ("--captions there.txt", "--captions FILE"), ("--dataset laion --smoke", "--captions FILE"),
    ("--dataset laion --captions gone.txt --smoke", "no such file"),
    ("--draft teacher", "unrecognized"), ("--init 0.5", "unrecognized")])
def test_what_cannot_be_done_or_would_silently_be_something_else_is_refused(
        line, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "runs/there").mkdir(parents=True)
    with pytest.raises(SystemExit, match="2"):
        train.parse(line.split())
    assert message in capsys.readouterr().err


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
    opts = [train.Muon([ours], lr=0.1, weight_decay=0.1, momentum=0.95),
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
    with pytest.raises(RuntimeError, match="non-finite"):
        optimiser.update(net(torch.full((3, 2), math.nan)).mean())


# ---------------------------------------------------------------- prepared networks and files
def test_a_network_is_trained_once_and_again_for_other_settings_or_images(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images = ["as they were"]
    monkeypatch.setattr(tokenizer, "fingerprint", lambda cfg: images[-1])
    first = train.prepared_folder(train.Config())
    # What a run of steps, seed or method changes is not of its networks.
    assert first == train.prepared_folder(train.Config(seed=5, steps=9, method="dimo"))
    folders = {first} | {train.prepared_folder(train.Config(**other)) for other in (
        dict(tokenizer_steps=7), dict(classifier_steps=7), dict(teacher_steps=7), dict(smoke=True),
        dict(dataset="scenes"))}
    images.append("another image")
    assert len(folders | {train.prepared_folder(train.Config())}) == 7

    path, args, trained = first / "phi.pt", dict(width=8), []
    saved = train.prepared(path, 0, models.ConvNet, args, trained.append, "cpu")
    again = train.prepared(path, 1, models.ConvNet, args, trained.append, "cpu")
    assert len(trained) == 1 and saved["state"].keys() == again["state"].keys()
    assert all(torch.equal(value, again["state"][key]) for key, value in saved["state"].items())


def test_a_save_that_is_cut_short_leaves_the_last_file_alone(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    sample.save(path, dict(step=1))

    def half(content, file, write=torch.save):
        write(content, file)
        Path(file).write_bytes(Path(file).read_bytes()[:20])
        raise OSError("No space left on device")
    for _ in range(2):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
            patch.setattr(torch, "save", half)
            sample.save(path, dict(step=2))
    assert torch.load(path, weights_only=True) == dict(step=1)
    # Half a file is beside it, and the next save takes the same name.
    assert len(list(tmp_path.iterdir())) == 2


def test_a_run_takes_the_next_free_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = [train.new_folder(train.Config()).name for _ in range(3)]
    assert names == ["shapes", "shapes-2", "shapes-3"]
    assert train.new_folder(train.Config(method="dimo", smoke=True)).name == "shapes-dimo-smoke"
    assert train.new_folder(train.Config(name="mine")).name == "mine"
    with pytest.raises(FileExistsError, match="mine"):
        train.new_folder(train.Config(name="mine"))


def test_a_higher_learning_rate_after_resume_is_said(tmp_path, monkeypatch, capsys):
    """That of a finished run has fallen to 0. With more steps it begins again where it was high."""
    monkeypatch.chdir(tmp_path)
    cfg = train.Config(name="a", steps=100, decay=0.7)
    content = dict(step=100, config=dataclasses.asdict(cfg), images="", parts={})
    torch.save(content, train.new_folder(cfg) / "checkpoint.pt")
    for steps, rises in ((101, False), (200, True)):
        train.resumed_networks(dataclasses.replace(cfg, steps=steps))
        assert ("the learning rate rises again" in capsys.readouterr().out) == rises


def test_images_for_the_gan_that_cannot_be_read_are_left_out_or_stop_the_run(tmp_path):
    """With no readable image the search would never end."""
    gan = object.__new__(train.Gan)
    gan.cfg, gan.size, gan.images = train.Config(), 8, [tmp_path / f"{i}.png" for i in range(3)]
    with pytest.raises(ValueError, match="cannot be read"):
        gan.real(4, 0)
    gan.images += [torch.full((3, 8, 8), 255, dtype=torch.uint8)] * 9
    assert gan.real(4, 0).eq(1).all()


# ---------------------------------------------------------------- Tables 3 and 4 in miniature
@pytest.mark.parametrize("dataset", ["shapes", "scenes"])
def test_a_row_differs_from_the_base_in_what_its_name_says(dataset, tmp_path, monkeypatch):
    """Rows that are equal to the base are not made. SDTT, whose steps cost four times as much, gets
    a quarter of them."""
    made, written = {}, []
    monkeypatch.setattr(train, "distil", lambda cfg, nets, folder, device: made.update(
        {folder.name: cfg}))
    for owner, name, result in ((evaluate, "scorer", ()), (evaluate, "score", dict(fd=1.0)),
                                (sample, "grid_conditions", (None, None)),
                                (sample, "load_run", sample.Networks()),
                                (sample, "generate", None)):
        monkeypatch.setattr(owner, name, lambda *args, result=result: result)
    monkeypatch.setattr(evaluate, "write_report", lambda *args: written.append(args[2]))
    base = train.parse(["--dataset", dataset, "--ablations", "1"])
    train.ablate(base, sample.Networks(), tmp_path, "cpu")
    rows = {row["row"]: row["settings"] for row in written[0]}
    assert rows["FPD, the base"] == {} and rows["soft embedding"] == dict(estimator="soft")
    # With captions the whole batch is compared in any case.
    several = dict(per_class=16) if dataset == "shapes" else {}
    assert rows["STE + GAN"] == dict(gan_weight=0.5) | several
    assert ("16 drafts of a class" in rows) == (dataset == "shapes")
    assert ("without the own pair" in rows) == (dataset == "scenes")
    assert [made[name].steps for name in ("sdtt-0", "dimo-0", "fpd-the-base-0")] == [80, 320, 320]


def two_steps(nets, model, steps, *rest, score=evaluate.score):
    """The teacher's 16 steps take most of the time."""
    return score(nets, model, steps and 2, *rest)


@pytest.mark.slow
def test_every_row_is_made_once_and_then_kept(smoke_runs, no_pictures, tmp_path_factory,
                                              monkeypatch):
    """Unless it was made with other settings or networks, which do not stand in one table."""
    folder = own_copy(tmp_path_factory, smoke_runs("shapes"))
    root, line = folder / "runs/ablations-shapes-smoke", "train.py --smoke --ablations 2 --steps 1"
    monkeypatch.setattr(train, "ABLATIONS", train.ABLATIONS[:2])
    monkeypatch.setattr(evaluate, "score", two_steps)
    done = in_process(line, folder)
    assert done.returncode == 0, done.stderr[-2000:]
    assert {path.parent.name for path in root.glob("*/score.json")} == {
        f"{row}-{seed}" for row in ("fpd-the-base", "soft-embedding") for seed in (0, 1)}
    rows = json.loads((root / "report.jsonl").read_text())["rows"]
    assert [(row["row"], len(row["scores"])) for row in rows] == [
        ("teacher 16", 1), ("teacher 1", 1), ("FPD, the base", 2), ("soft embedding", 2)]
    assert (root / "report.png").exists() and "soft embedding" in done.stdout
    # The same command trains nothing again.
    monkeypatch.setattr(train, "distil", None)
    again = in_process(line, folder)
    assert again.returncode == 0 and again.stdout.splitlines()[-3:] == done.stdout.splitlines()[-3:]
    refused(in_process(f"{line} --lr 0.5", folder), "other settings or networks")
    kept = root / "fpd-the-base-0/score.json"
    networks = train.prepared_folder(train.parse(["--smoke"])).name
    kept.write_text(kept.read_text().replace(networks, "shapes-other"))
    refused(in_process(line, folder), "other settings or networks", "another --name")

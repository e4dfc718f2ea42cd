"""The switches of the paper's ablations (Tables 3 and 4) and its optional GAN (Sec. 3.4): each does
what it says; and their table."""
import copy
import dataclasses
import json
import signal
import types

import numpy as np
import pytest
import torch
from conftest import in_process, refused
from PIL import Image
from test_fpd import System, gen, tiny

import evaluate
import fpd
import models
import tokenizer
import train


# ---------------------------------------------------------------- Table 3: what is refined
def test_a_random_draft_makes_the_refinement_independent_of_the_student():
    """Table 3b. With the student's own draft, what the teacher returns depends on the student."""
    same = []
    for draft in ("random", "student"):
        refinements = []
        for seed in (2, 3):
            system = System(draft=draft)
            system.student = tiny(seed).requires_grad_(True)
            loss, _, _ = system.step()
            refinements.append(system.lift.seen[0])
            gradient, = torch.autograd.grad(loss, system.student.bias)
            assert loss.isfinite() and gradient.abs().max() > 0
        same.append(torch.equal(*refinements))
    assert same == [True, False]


def test_a_random_draft_is_uniform_and_leaves_the_students_draft_as_it_is():
    # nearly nothing is hidden
    systems = [System(draft=draft, remask=(0.0, 0.01))
               for draft in ("random", "student")]
    for system in systems:
        system.step()
    refinement, draft = systems[0].lift.seen
    assert torch.equal(draft, systems[1].lift.seen[1])
    # a code in eight agrees by chance
    assert (refinement == draft).all(-1).float().mean() < 0.4
    assert (systems[1].lift.seen[0] == draft).all(-1).float().mean() > 0.9


# ---------------------------------------------------------------- Table 4: where it is compared
def images_of(system):
    z = torch.randint(8, (3, 16), generator=gen())
    return system.lift.decode(system.vq.E[z], system.c[:3])                    # (3, 3, 16, 16)


def sum_of_rms(logs):
    return sum(logs[f"rms_{h:g}"].item() for h in (0.02, 0.05, 0.2))


@pytest.mark.parametrize("grid", [1, 4, 8])
def test_pixel_space_is_the_pixels_of_each_position(grid):
    """Table 4a: one "block" of F = grid^2 positions, each with all of its pixels."""
    system = System(space="pixel", grid=grid)
    images, n = images_of(system), 16 // grid
    system.lift.phi = None
    X, = system.lift.features(images)
    assert X.shape == (3, grid ** 2, 3 * n * n)
    for i in range(grid):
        for j in range(grid):
            tile = images[:, :, n * i:n * (i + 1), n * j:n * (j + 1)]
            assert torch.equal(X[:, grid * i + j].view(3, 3, n, n), tile)
    loss, logs, _ = system.step()
    loss.backward()
    # one block
    assert loss.item() == pytest.approx(sum_of_rms(logs), rel=1e-5)
    assert all(p.grad.isfinite().all() for p in system.student.parameters())


@pytest.mark.parametrize("space", ["feature", "pixel"])
def test_a_grid_that_does_not_divide_the_image_still_has_its_number_of_positions(space):
    # of 16 pixels
    system = System(space=space, grid=6)
    assert {x.shape[1] for x in system.lift.features(images_of(system))} == {36}
    loss, _, _ = system.step()
    assert loss.isfinite()


def test_blocks_are_picked_by_number():
    every, some = System(), System(blocks=(1, 3))
    whole, part = (system.lift.features(images_of(system)) for system in (every, some))
    assert len(part) == 2 and torch.equal(part[0], whole[1]) and torch.equal(part[1], whole[3])
    loss, logs, _ = some.step()
    assert loss.item() == pytest.approx(2 * sum_of_rms(logs), rel=1e-5)


def test_a_grid_of_one_pools_the_positions():
    """Table 4b: a single position holds the mean of all."""
    fine, pooled = ([*system.lift.features(images_of(system))]
                    for system in (System(), System(grid=1)))
    assert [x.shape[1] for x in fine + pooled] == [16] * 4 + [1] * 4
    for x, y in zip(fine, pooled):
        torch.testing.assert_close(x.mean(1, keepdim=True), y)


@pytest.mark.parametrize("space", ["feature", "pixel"])
def test_chunks_change_neither_loss_nor_gradient(space):
    losses, gradients = [], []
    for chunk in (None, 3):
        system = System(space=space, lift_chunk=chunk)
        loss, _, images = system.step()
        # as the loop does
        images.backward(torch.autograd.grad(loss, images)[0])
        losses.append(loss.item())
        gradients.append(torch.cat([p.grad.flatten() for p in system.student.parameters()]))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert (gradients[1] - gradients[0]).norm() < 1e-3 * gradients[0].norm()


def test_flags_reach_the_settings():
    cfg = train.parse("--draft random --space pixel --grid 2 --blocks 1 3 --bandwidths 0.1 "
                      "--estimator soft --gan-weight 0.5".split())
    assert (cfg.draft, cfg.space, cfg.grid, cfg.blocks, cfg.bandwidths, cfg.estimator,
            cfg.gan_weight) == ("random", "pixel", 2, (1, 3), (0.1,), "soft", 0.5)
    _, logs, _ = System(bandwidths=cfg.bandwidths).step()
    assert [name for name in logs if name.startswith("rms_")] == ["rms_0.1"]


def test_the_smoke_run_of_official_networks_has_the_asked_blocks_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    phis = []
    for words in ([], ["--blocks", "1", "3"]):
        cfg = train.parse(["--dataset", "imagenet", "--smoke", *words])
        phis.append(train.prepare(cfg, "cpu"))
    assert [parts.phi.blocks for parts in phis] == [[2, 5, 8, 11], [1, 3]]
    assert phis[0].files["phi"] != phis[1].files["phi"]


# ---------------------------------------------------------------- the GAN
def make_gan(seed=0, **settings):
    """-> fpd.Gan as a small world has it, with an untrained Phi"""
    torch.manual_seed(0)
    phi = models.ConvNet(width=4).eval().requires_grad_(False)
    parts = types.SimpleNamespace(tokenizer=tokenizer.VQGAN(), phi=phi)
    cfg = train.Config(smoke=True, seed=seed, **{"gan_weight": 0.5, **settings})
    return fpd.Gan(cfg, parts, "cpu")


def some_images(seed=0):
    """Drafts as the loop has them, (4, 3, 32, 32), and the drift's gradient there."""
    images = torch.randn(4, 3, 32, 32, generator=gen(seed)).requires_grad_()
    return images, 1e-3 * torch.randn(4, 3, 32, 32, generator=gen(seed + 100))


def copy_of(network):
    return {key: value.clone() for key, value in network.state_dict().items()}


def changed(network, before):
    """Names of the tensors that are no longer as in `before`."""
    return [key for key, value in network.state_dict().items()
            if not torch.equal(value, before[key])]


@pytest.mark.parametrize("weight", [0.5, 3.0])
def test_the_gans_gradient_is_as_long_as_its_weight_says(weight):
    """gan_weight times the length of the drift's, whatever the scale of the discriminator;
    `gan_scale` is the paper's lambda."""
    gan, (images, gradient) = make_gan(gan_weight=weight), some_images()
    network = gan.discriminator.networks["phi"]
    before, phi = copy_of(gan.discriminator), copy_of(network)
    total, logs = gan.add(gradient, images, gen())
    assert ((total - gradient).norm() / gradient.norm()).item() == pytest.approx(weight, rel=1e-4)
    assert logs.keys() == {"gan_real", "gan_fake", "gan_loss", "gan_scale"}
    assert all(value.ndim == 0 for value in logs.values())
    # not the random projections
    assert {key.split(".")[0] for key in changed(gan.discriminator, before)} == {"discriminators"}
    assert not changed(network, phi)
    assert images.grad is None and not total.requires_grad and gan.seen == 4


def test_the_gans_gradient_lowers_its_loss():
    gan, (images, gradient) = make_gan(), some_images()
    total, logs = gan.add(gradient, images, gen())
    # d L_gan / d images
    direction = ((total - gradient) / logs["gan_scale"]).detach()

    def loss(x):
        """Summed over what the augmentation draws."""
        discriminator = gan.discriminator.eval()
        return sum(fpd.gan_loss(fpd.gan_logits(discriminator, x, gen(seed))).item()
                   for seed in range(8))
    step = 20 * direction / direction.norm()
    assert loss(images - step) < loss(images + step)


def test_the_gan_reaches_the_student():
    """Through decoder and straight-through estimator (Eq. 8): more than the drift's gradient."""
    gradients = []
    for weight in (0.0, 0.5):
        system = System()
        system.vq.image_size = 16
        parts = types.SimpleNamespace(tokenizer=system.vq, phi=system.phi)
        cfg = train.Config(dataset="imagenet", smoke=True, gan_weight=weight)
        loss, _, images = system.step()
        gradient, = torch.autograd.grad(loss, images)
        if weight:
            gradient, _ = fpd.Gan(cfg, parts, "cpu").add(gradient, images, gen())
        images.backward(gradient)
        gradients.append(system.student.tok_emb.weight.grad)
    alone, both = gradients
    assert both.isfinite().all() and 0.1 < (both - alone).norm() / alone.norm() < 10
    frozen = (system.vq, system.phi, system.teacher)
    assert all(p.grad is None for net in frozen for p in net.parameters())


def test_the_gan_goes_on_where_it_stopped():
    """State and optimiser, into a discriminator that is elsewhere: the same, bit for bit."""
    totals = []
    for halves in (False, True):
        gan = make_gan()
        for step in range(4):
            if halves and step == 2:
                state, gan = copy.deepcopy(gan.state()), make_gan()
                images, gradient = some_images(99)
                gan.add(gradient, images, gen(99))
                gan.load(state)
            images, gradient = some_images(step)
            totals.append(gan.add(gradient, images, gen(step))[0])
    assert all(torch.equal(whole, half) for whole, half in zip(totals[:4], totals[4:]))
    assert gan.seen == 16
    images, gradient = some_images()
    assert not torch.equal(totals[0], make_gan(seed=1).add(gradient, images, gen())[0])


def test_a_discriminator_depends_on_the_seed_alone():
    """And not on what drew random numbers before, such as a preparation that is there already."""
    first = make_gan().discriminator
    state = copy_of(first)
    assert not changed(make_gan().discriminator, state)
    assert changed(make_gan(seed=1).discriminator, state)
    torch.rand(7)
    parts = types.SimpleNamespace(tokenizer=tokenizer.VQGAN(), phi=first.networks["phi"])
    again = fpd.Gan(train.Config(smoke=True, gan_weight=0.5), parts, "cpu").discriminator
    assert not changed(again, state)


def test_real_images_come_from_the_world_or_from_files(tmp_path, monkeypatch):
    gan = make_gan()
    real = gan.real(5)
    assert real.shape == (5, 3, 32, 32) and -1 <= real.min() and real.max() <= 1
    world = tokenizer.to_float(tokenizer.world(train.Config(smoke=True), "train")[0])
    assert all((image == world).flatten(1).all(1).any() for image in real)
    assert real.unique(dim=0).shape[0] == 5
    for i in range(3):
        Image.new("RGB", (50, 40), (40 * i, 0, 255)).save(tmp_path / f"{i}.png")
    monkeypatch.setattr(fpd, "load_discriminator", lambda files, size, device: gan.discriminator)
    parts = types.SimpleNamespace(tokenizer=tokenizer.VQGAN(), discriminator_files={},
                                  real_files=tokenizer.image_files(tmp_path))
    cfg = train.Config(dataset="imagenet", gan_weight=1.0, data=str(tmp_path))
    real = fpd.Gan(cfg, parts, "cpu").real(20)
    assert real.shape == (20, 3, 32, 32) and (real[:, 2] == 1).all()
    assert len(real[:, 0, 0, 0].unique()) == 3


def test_damaged_images_are_left_out_with_a_word(tmp_path, capsys):
    """At the start, not at the step that draws one."""
    for i in range(4):
        noise = np.random.RandomState(i).randint(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{i}.jpg")
    for name in ("1.jpg", "2.jpg"):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-800])
    found = train.readable(tokenizer.image_files(tmp_path))
    assert [path.name for path in found] == ["0.jpg", "3.jpg"]
    out = capsys.readouterr().out
    assert "2 of 4 images are left out" in out and "1.jpg cannot be read as an image" in out
    with pytest.raises(ValueError, match="none of the images can be used: .*1.jpg"):
        train.readable([tmp_path / "1.jpg"])


@pytest.mark.parametrize("real, fake, says", [
    (1.2, -1.3, "the discriminator wins"), (1.2, -0.9, None), (0.5, -0.5, None),
    (0.301, 0.3, "the discriminator is lost"), (-0.3, 0.3, None)])
def test_a_discriminator_that_no_longer_helps_is_named(real, fake, says):
    verdict = fpd.Gan.verdict(dict(gan_real=real, gan_fake=fake))
    assert verdict is None if says is None else says in verdict


# ---------------------------------------------------------------- a run
@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """-> a function that makes runs in one folder, without their reports, and the checkpoint of one
    of 4 steps with the GAN"""
    folder = tmp_path_factory.mktemp("runs")

    def run(line):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(evaluate, "report", lambda *args, **kwargs: None)
            done = in_process(line + " --sample-every 4", folder)
        assert done.returncode == 0, done.stderr[-2000:]
        name = line.split("--name ")[1].split()[0]
        return torch.load(folder / "runs" / name / "checkpoint.pt", weights_only=True)
    return run, run("train.py --smoke --gan-weight 0.5 --name whole")


def test_a_run_with_the_gan_resumes_bit_for_bit(runs):
    run, whole = runs
    run("train.py --smoke --gan-weight 0.5 --name halves --steps 2")
    halves = run("train.py --resume --name halves --steps 4")
    for part in ("student", "ema"):
        assert all(torch.equal(whole[part][key], halves[part][key]) for key in whole[part]), part
    assert torch.equal(whole["rng"], halves["rng"])
    gan, other = whole["gan"], halves["gan"]
    assert gan["seen"] == other["seen"] == 4 * 32
    assert all(torch.equal(gan["heads"][key], other["heads"][key]) for key in gan["heads"])
    moments = zip(*(x["opt"]["state"].values() for x in (gan, other)), strict=True)
    assert all(torch.equal(a[key], b[key]) for a, b in moments for key in a)


def test_a_run_without_the_gan_is_another_and_can_take_it_up(runs):
    run, whole = runs
    plain = run("train.py --smoke --name plain --steps 4")
    assert plain["gan"] is None
    assert any(not torch.equal(plain["student"][key], whole["student"][key])
               for key in whole["student"])
    later = run("train.py --resume --name plain --steps 5 --gan-weight 0.5")
    assert later["gan"]["seen"] == 32 and later["config"]["gan_weight"] == 0.5


def test_smoke_run_of_official_networks_with_the_gan(tmp_path):
    """Text, a vision transformer as the discriminator's feature network, images of 64 pixels."""
    line = "train.py --dataset laion --smoke --gan-weight 0.5 --steps 1 --sample-every 9"
    done = in_process(line, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    saved = torch.load(tmp_path / "runs/laion-smoke/checkpoint.pt", weights_only=True)
    assert saved["gan"]["seen"] == 32
    row = json.loads((tmp_path / "runs/laion-smoke/log.jsonl").read_text())
    assert row["gan_scale"] > 0 and {"gan_real", "gan_fake", "gan_loss"} <= row.keys()


# ---------------------------------------------------------------- the table of them all
CHANGES = {"FPD, the base": "", "soft embedding": "estimator", "random draft": "draft",
           "pixel space": "space", "one bandwidth": "bandwidths", "pooled, grid 1": "grid",
           "shallow blocks": "blocks", "deep blocks": "blocks"}
OF_LABELS = {"soft + GAN": "estimator gan_weight per_class", "STE + GAN": "gan_weight per_class",
             "16 drafts of a class": "per_class"}
OF_CAPTIONS = {"soft + GAN": "estimator gan_weight", "STE + GAN": "gan_weight",
               "without the own pair": "own_pair"}


@pytest.mark.parametrize("dataset, more", [("shapes", OF_LABELS), ("scenes", OF_CAPTIONS)])
def test_a_row_differs_from_the_base_in_what_its_name_says(dataset, more, tmp_path):
    changes = CHANGES | more
    base = train.parse(["--dataset", dataset, "--ablations", "2"])
    # which checks them
    runs = train.ablation_runs(base, tmp_path / "all")
    assert len(runs) == 2 * (len(changes) + 2) == len({cfg.name for cfg in runs.values()})
    for (row, seed), cfg in runs.items():
        assert cfg.seed == seed and cfg.name.startswith("all/") and cfg.name.endswith(f"-{seed}")
        alike = dataclasses.replace(cfg, seed=0, name="")
        if cfg.method != "fpd":
            # with settings of its own, as when it runs alone, but for the steps: it gets as many of
            # the teacher's passes as the base
            line = f"--dataset {dataset} --ablations 2 --method {cfg.method} --steps {cfg.steps}"
            assert alike == train.parse(line.split())
            passes = train.teacher_passes(cfg) / train.teacher_passes(base)
            assert passes == pytest.approx(1, rel=0.03)
        else:
            changed = {key for key, value in vars(base).items() if vars(alike)[key] != value}
            assert changed == set(changes[row].split())
    assert {row for row, _ in runs} == changes.keys() | {"Di[M]O", "SDTT"}


def test_sdtt_has_its_four_rounds_however_few_the_steps_of_the_base_are(tmp_path):
    base = train.parse(["--smoke", "--ablations", "1", "--steps", "1"])
    assert train.ablation_runs(base, tmp_path / "all")["SDTT", 0].steps == 4


@pytest.fixture(scope="module")
def ablations(tmp_path_factory):
    """-> a function that runs three rows of two steps -> what it said, how many steps it made; and
    the folder that it has filled, once stopped"""
    folder = tmp_path_factory.mktemp("ablations")

    def run(more="", stop_at=None):
        calls, step = [], fpd.fpd_step

        def counted(*args, **kwargs):
            calls.append(args)
            if len(calls) == stop_at:
                signal.raise_signal(signal.SIGINT)
            return step(*args, **kwargs)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fpd, "fpd_step", counted)
            patch.setattr(train, "ABLATIONS", [train.ABLATIONS[i] for i in (0, 3, 6)])
            line = "train.py --smoke --ablations 1 --steps 2 --sample-every 9" + more
            return in_process(line, folder), len(calls)
    stopped, finished = run(stop_at=3), run()
    return run, folder / "runs" / "ablations-shapes-smoke", stopped, finished


@pytest.mark.slow
def test_ctrl_c_and_the_same_command_make_every_row_once(ablations):
    _, root, (stopped, steps), (finished, more) = ablations
    assert stopped.returncode == 130 and "Go on with: the same command" in stopped.stdout
    assert finished.returncode == 0, finished.stderr[-2000:]
    # the second row was stopped after its first step
    assert (steps, more) == (3, 3)
    assert sorted(path.name for path in root.iterdir()) == [
        "fpd-the-base-0", "random-draft-0", "report.json", "report.png", "ste-gan-0"]
    for path in root.glob("*-0"):
        saved = torch.load(path / "checkpoint.pt", weights_only=True)
        log = (path / "log.jsonl").read_text().splitlines()
        assert saved["step"] == 2 and [json.loads(line)["step"] for line in log] == [1, 2]
        assert saved["config"]["name"] == f"{root.name}/{path.name}"
    rows = json.loads((root / "report.json").read_text())["rows"]
    assert [(row["table"], row["row"], row["paper"]) for row in rows] == [
        ("", "teacher 16", None), ("", "teacher 1", None), ("", "FPD, the base", 0.43),
        ("3a", "STE + GAN", 0.45), ("3b", "random draft", 0.22)]
    for row in rows:
        assert {"fd", "recall", "accuracy", "precision"} <= row["scores"][0].keys()
        assert row["row"] in finished.stdout
    assert all(row["scores"][0]["seconds_per_step"] > 0 for row in rows[2:])
    with Image.open(root / "report.png") as picture:
        # one line of pictures a row
        assert picture.height > 5 * 96


@pytest.mark.slow
def test_what_is_there_is_kept_and_a_lost_score_needs_no_training(ablations):
    run, root, _, _ = ablations
    scores = {path: path.read_text() for path in root.glob("*/*.json")}
    lost = root / "ste-gan-0" / "score.json"
    lost.unlink()
    times = {path: path.stat().st_mtime_ns for path in scores
             if path.name != "config.json" and path != lost}
    done, steps = run()
    assert done.returncode == 0 and steps == 0
    assert times == {path: path.stat().st_mtime_ns for path in times}
    # nobody measured it
    assert json.loads(lost.read_text()) == json.loads(scores[lost]) | dict(seconds_per_step=None)


@pytest.mark.slow
def test_other_settings_are_refused_and_nothing_is_overwritten(ablations):
    run, root, _, _ = ablations
    before = {path: path.stat().st_mtime_ns for path in root.parent.rglob("*")}
    done, steps = run(" --teacher-cfg 3 --teacher-steps 3")
    refused(done, "fpd-the-base-0 (FPD, the base, seed 0)", "teacher_steps 4, not 3",
            "another --name")
    assert steps == 0
    assert before == {path: path.stat().st_mtime_ns for path in root.parent.rglob("*")}


@pytest.mark.slow
def test_rows_over_other_networks_do_not_stand_in_one_table(ablations):
    run, root, _, _ = ablations
    path, earlier = root / "ste-gan-0" / "checkpoint.pt", root / "fpd-the-base-0" / "score.json"
    whole, score = path.read_bytes(), earlier.read_bytes()
    saved = torch.load(path, weights_only=True)
    saved["parts"]["phi"]["sha256"] = "of another"
    torch.save(saved, path)
    # a row that would be scored first
    earlier.unlink()
    done, steps = run()
    path.write_bytes(whole)
    is_scored = earlier.exists()
    earlier.write_bytes(score)
    refused(done, "ste-gan-0 was made with another phi", "another --name")
    # at once, not when it comes to that row
    assert steps == 0 and not is_scored and "seed 0: " not in done.stdout


def test_mean_and_range_over_the_seeds():
    scores = [dict(fd=fd, recall=recall, accuracy=0.5, precision=0.25, spreads=dict(x=1.0),
                   seconds_per_step=seconds)
              for fd, recall, seconds in ((4.0, 0.75, 2.0), (8.0, 0.75, None), (6.0, 0.0, 1.0))]
    assert evaluate.means(scores) == dict(fd=6.0, recall=0.5, accuracy=0.5, precision=0.25,
                                          seconds_per_step=1.5)
    protocol = dict(dataset="shapes", smoke=False, images=960, seeds=3, base=dict(steps=300))
    content = dict(protocol=protocol, rows=[
        dict(table="", row="teacher 16", paper=None, scores=[dict(fd=3.0, recall=1.0)]),
        dict(table="3a", row="soft", paper=0.38, teacher_passes=600, scores=scores)])
    _, _, teacher, soft = evaluate.ablation_table(content).split("\n")
    assert teacher.split() == ["teacher", "16", "3.00", "1.00"]
    assert " ".join(soft.split()) == "3a soft 6.00 (4.00 to 8.00) 0.50 0.50 0.25 1.50 600 0.38"


def test_rows_of_captions_are_told_by_their_tags():
    scores = [dict.fromkeys(tokenizer.TAGS, 0.5) | dict(overall=overall)
              for overall in (0.25, 0.75)]
    protocol = dict(dataset="scenes", smoke=True, images=48, seeds=2, base=dict(steps=4))
    content = dict(protocol=protocol,
                   rows=[dict(table="4a", row="pixel space", paper=0.21, scores=scores)])
    first, heads, row = evaluate.ablation_table(content).split("\n")
    assert "nothing was learnt" in first and "fd" not in heads
    assert heads.split()[3:9] == list(tokenizer.TAGS)
    assert " ".join(row.split()) == "4a pixel space 0.50 (0.25 to 0.75)" + " 0.50" * 6 + " 0.21"
    assert evaluate.headline(evaluate.means(scores)) == "50 %"


@pytest.mark.parametrize("line, says", [
    ("--ablations -1", "should not be negative"),
    ("--ablations 1 --dataset imagenet", "shapes, scenes or"),
    ("--ablations 1 --smoke --dataset laion", "shapes, scenes or"),
    ("--bench --ablations 1", "--bench is no run"), ("--bench --gpus 2", "one process")])
def test_wrong_uses_of_ablations(line, says):
    with pytest.raises(ValueError, match=says):
        train.parse(line.split())


def test_ablations_do_not_resume_nor_share_their_work_among_processes(monkeypatch):
    with pytest.raises(ValueError, match="the same command again, without --resume"):
        train.check(train.Config(ablations=1, resume=True))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="one process"):
        train.check(train.Config(ablations=1))

"""The imagenet setting through its commands: smoke run, official files, students of others, missing
and bad files, scores."""
import json
import os
import resource
import shutil
import weakref

import numpy as np
import pytest
import torch
from conftest import golden_fill, in_process, load_case, official_files, own_copy, refused
from PIL import Image
from safetensors.torch import save_file

import evaluate
import fpd
import models
import tokenizer
import train

TINY_BACKBONE = "vit_tiny_patch16_dinov3_qkvb.eupe_lvd1689m"


@pytest.fixture(scope="module")
def smoke(smoke_runs, tmp_path_factory):
    """A folder with one smoke run, and what the run said."""
    return own_copy(tmp_path_factory, smoke_runs("imagenet")), smoke_runs("imagenet")[1]


@pytest.fixture(scope="module")
def narrow(tmp_path_factory):
    """The official formats and outer sizes (256 pixels, 256 tokens, 1000 classes, 16 heads), few
    channels -> folder of the three files."""
    folder = tmp_path_factory.mktemp("narrow")
    maskgit = models.MaskGIT(K=64, L=256, num_classes=1000, width=32, depth=2, heads=16, mlp=64)
    vqgan = tokenizer.VQGAN(K=64, d=16, ch=32, ch_mult=(1, 1, 1, 1, 1), blocks=1, attn_levels=(4,),
                            z_channels=32, groups=32, image_size=256)

    def fill(model):
        return golden_fill({key: list(value.shape) for key, value in model.state_dict().items()})
    torch.save({"model_state_dict": fill(maskgit), "iter": 1}, folder / "MaskGIT_ImageNet_256.pth")
    torch.save({"state_dict": fill(vqgan)}, folder / "last.ckpt")
    shutil.copy(official_files(tmp_path_factory.mktemp("tiny"))["backbone"], folder)
    return folder


def picture(path):
    return np.asarray(Image.open(path))


# ---------------------------------------------------------------- the smoke run
def test_smoke_run_and_its_golden_retrievers(smoke):
    folder, done = smoke
    run = folder / "runs" / "imagenet-smoke"
    for name in ("config.json", "log.jsonl", "checkpoint.pt", "samples/000002.png",
                 "samples/000004.png"):
        assert (run / name).is_file(), name
    assert "Nothing was learnt" in done.stdout
    for words in (["--class", "207", "--out", "number.png"],
                  ["--class", "golden retriever", "--out", "name.png"]):
        done = in_process(["sample.py", *words, "--n", "2"], folder)
        assert done.returncode == 0, done.stderr
        assert "golden retriever" in done.stdout and "weights are random" in done.stdout
    assert (folder / "number.png").read_bytes() == (folder / "name.png").read_bytes()
    saved = torch.load(run / "checkpoint.pt", weights_only=True)
    names = saved["names"]
    assert len(names) == len(set(names)) == 1000 and names[134] == "crane 134"


def test_the_papers_settings_are_the_defaults():
    """Sec. 4.1; the small worlds' changes stay theirs."""
    cfg = train.parse(["--dataset", "imagenet"])
    assert (cfg.batch, cfg.lr, cfg.decay, cfg.ema) == (32, 1e-5, 0.0, 0.9999)
    assert (cfg.bandwidths, cfg.blocks) == ((0.02, 0.05, 0.2), (2, 5, 8, 11))
    assert cfg.batch % cfg.per_class == 0
    assert train.parse([]).lr == train.SMALL["lr"]


def test_lifting_in_chunks_is_exact():
    """In float64: features and gradient equal those of the whole batch to rounding."""
    torch.manual_seed(0)
    vq = tokenizer.VQGAN(ch_mult=(1, 1, 2, 2), image_size=64).requires_grad_(False).double()
    phi = models.Backbone("test_vit", (0, 2, 3, 5), 64).eval().requires_grad_(False).double()
    e = vq.E[torch.randint(vq.K, (5, vq.L))]
    results = []
    for chunk in (None, 2):
        x = e.clone().requires_grad_()
        lift = fpd.Lift(vq, phi, train.Config(lift_chunk=chunk))
        X = lift.features(lift.decode(x, torch.zeros(5)))
        sum(block.square().mean() * (i + 1) for i, block in enumerate(X)).backward()
        results.append([*X, x.grad])
    for whole, parts in zip(*results, strict=True):
        torch.testing.assert_close(parts, whole, atol=1e-10, rtol=1e-8)


def test_the_estimate_of_memory_counts_weights_and_images():
    cfg, half = train.Config(batch=2), torch.autocast("cpu", torch.bfloat16, enabled=False)
    vq = tokenizer.VQGAN(ch_mult=(1, 1, 2, 2), image_size=64).requires_grad_(False)
    phi = models.Backbone("test_vit", (0, 2, 3, 5), 64).eval().requires_grad_(False)
    teacher = models.MaskGIT(num_classes=1000).requires_grad_(False)
    parts = train.types.SimpleNamespace(tokenizer=vq, phi=phi, teacher=teacher, text=None)
    student = models.MaskGIT(num_classes=1000)

    def estimate(lift_chunk=None, **change):
        changed = train.dataclasses.replace(cfg, **change)
        return train.memory(student, parts, changed, half, torch.tensor([207, 88]))(lift_chunk)
    weights = sum(p.numel() * 4 for network in [student] * 5 + [vq, phi, teacher]
                  for p in network.parameters()) / 1e9
    assert weights < estimate() < estimate(batch=8)
    of_six = estimate(batch=8) - estimate()
    assert estimate(batch=14) - estimate(batch=8) == pytest.approx(of_six, rel=1e-6)
    assert estimate(lift_chunk=2) == estimate()
    assert estimate(batch=8, lift_chunk=2) < estimate(batch=8)
    # any text encoder: its weights count, too
    without, parts.text = estimate(), torch.nn.Linear(999, 1000)
    assert estimate() - without == pytest.approx(train.MARGIN * 4e6 / 1e9, rel=1e-6)


def test_the_estimate_of_memory_keeps_none():
    parts = train.types.SimpleNamespace(tokenizer=tokenizer.VQGAN().requires_grad_(False),
                                        phi=models.ConvNet(3).requires_grad_(False),
                                        teacher=models.MaskGIT(num_classes=3), text=None)
    student, made = models.MaskGIT(num_classes=3), []

    def remember(module, args, out):
        made.append(weakref.ref(out if torch.is_tensor(out) else out[0]))
    for module in student.modules():
        module.register_forward_hook(remember)
    half = torch.autocast("cpu", torch.bfloat16, enabled=False)
    train.memory(student, parts, train.parse([]), half, torch.tensor([0, 1]))
    assert len(made) > 30 and not any(tensor() is not None for tensor in made)


# ---------------------------------------------------------------- official files
def test_official_files_train_and_sample(narrow, tmp_path):
    """Not a smoke run: the three loaders; then everything that needs no teacher, without its file;
    and more steps with files of another folder."""
    shutil.copytree(narrow, tmp_path / "weights")
    done = in_process(f"train.py --dataset imagenet --backbone {TINY_BACKBONE} "
                      "--steps 2 --batch 4 --per-class 2 --lift-chunk 2 --log-every 1", tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    for words in ("loading teacher from weights/MaskGIT_ImageNet_256.pth", "M parameters",
                  "evaluate.py --run"):
        assert words in done.stdout
    assert len((tmp_path / "runs/imagenet/log.jsonl").read_text().splitlines()) == 2
    (tmp_path / "weights").rename(tmp_path / "moved")
    (tmp_path / "moved" / "MaskGIT_ImageNet_256.pth").unlink()
    refused(in_process("sample.py --class 207 --n 1", tmp_path), "error: no weights for tokenizer")
    done = in_process("sample.py --class 207 --n 1 --weights moved", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "student, 1 step (trained for 2 steps) | golden retriever" in done.stdout
    assert "random" not in done.stdout and picture(tmp_path / "sample.png").shape[0] > 256
    done = in_process(f"train.py --resume --steps 3 --weights {narrow}", tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"loading teacher from {narrow}/MaskGIT_ImageNet_256.pth" in done.stdout
    assert len((tmp_path / "runs/imagenet/log.jsonl").read_text().splitlines()) == 3


def test_the_public_teacher_and_a_student_of_others_need_no_run(narrow, tmp_path):
    """A Di[M]O generator is a bare MaskGIT state. Its share of masked tokens matters."""
    (tmp_path / "weights").symlink_to(narrow)
    line = "sample.py --class 207 --teacher --steps 2 --n 1 --out teacher.png"
    assert in_process(line, tmp_path).returncode == 0
    state = tokenizer.read_weights(narrow / "MaskGIT_ImageNet_256.pth", "MaskGIT")
    torch.save(state, tmp_path / "pytorch_model.bin")
    for name, words in (("given", " --init-mask 0.6"), ("default", ""),
                        ("other", " --init-mask 0.9")):
        line = f"sample.py --student pytorch_model.bin --class 207 --n 1 --out {name}.png{words}"
        assert in_process(line, tmp_path).returncode == 0
    given = picture(tmp_path / "given.png")
    default = picture(tmp_path / "default.png")
    other = picture(tmp_path / "other.png")
    assert (given == default).all() and (given != other).any()


def test_every_missing_file_is_listed_at_once(tmp_path):
    done = in_process("train.py --dataset imagenet", tmp_path)
    refused(done, lines=3)
    assert not list(tmp_path.iterdir())
    hub = "llvictorll/Maskgit-pytorch"
    expected = [("tokenizer", "pretrained_maskgit/VQGAN/last.ckpt", hub),
                ("teacher", "pretrained_maskgit/MaskGIT/MaskGIT_ImageNet_256.pth", hub),
                ("backbone", "model.safetensors", "timm/vit_base_patch16_dinov3.lvd1689m")]
    for line, (part, file, repo) in zip(done.stderr.splitlines(), expected, strict=True):
        assert line.startswith(f"error: no weights for {part}") and file in line and repo in line
        assert "weights/" in line and "--weights" in line
    done = in_process("sample.py --class 207 --teacher", tmp_path)
    refused(done, "no weights for tokenizer", "no weights for teacher", lines=2)
    done = in_process("train.py --dataset imagenet --backbone nonsense", tmp_path)
    refused(done, "'nonsense' is not a network", lines=3)


class Malicious:
    def __init__(self, marker):
        self.command = f"echo ran > '{marker}'"

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("part, file", [
    ("tokenizer", "last.ckpt"), ("teacher", "MaskGIT_ImageNet_256.pth"),
    ("backbone", f"{TINY_BACKBONE}.safetensors")])
@pytest.mark.parametrize("fault", ["absent", "cut", "pointer", "malicious", "shape", "key"])
def test_bad_files_end_in_one_line(narrow, tmp_path, part, file, fault):
    (tmp_path / "official").mkdir()
    for other in narrow.iterdir():
        (tmp_path / "official" / other.name).symlink_to(other)
    bad = tmp_path / "official" / file
    bad.unlink()
    data = (narrow / file).read_bytes()
    if fault == "cut":
        bad.write_bytes(data[:len(data) // 2])
    elif fault == "pointer":
        bad.write_text("version https://git-lfs.github.com/spec/v1\n")
    elif fault == "malicious":
        torch.save({"state_dict": Malicious(tmp_path / "marker")}, bad)
    elif fault in ("shape", "key"):
        state = tokenizer.read_weights(narrow / file, part)
        key = {"tokenizer": "post_quant_conv.bias", "teacher": "last_layer.4.bias",
               "backbone": "blocks.3.mlp.fc1.bias"}[part]
        value = state.pop(key)
        save = save_file if bad.suffix == ".safetensors" else torch.save
        save(state if fault == "key" else state | {key: value[:-1]}, bad)
    line = f"train.py --dataset imagenet --backbone {TINY_BACKBONE} --weights official"
    refused(in_process(line, tmp_path), f"official/{file}")
    assert not (tmp_path / "marker").exists() and not (tmp_path / "runs").exists()


def test_networks_that_do_not_belong_together_are_refused(narrow, tmp_path):
    state = tokenizer.read_weights(narrow / "MaskGIT_ImageNet_256.pth", "MaskGIT")
    state["tok_emb.weight"] = state["tok_emb.weight"][1:]
    state["bias"] = state["bias"][:, 1:]
    torch.save(state, tmp_path / "other.bin")
    line = f"sample.py --student other.bin --weights {narrow}"
    refused(in_process(line, tmp_path), "256 tokens of 63 codes, the tokenizer has 256 of 64")


@pytest.mark.slow
def test_a_step_at_full_size(tmp_path):
    """MaskGIT-256, VQGAN f16-1024 and DINOv3 ViT-B/16, generated in the official file formats: a
    step in under 16 GB, then a sample."""
    (tmp_path / "weights").mkdir()
    try:
        official_files(tmp_path / "weights", full=True)
        done = in_process("train.py --dataset imagenet --steps 1 --batch 2 --per-class 2 "
                          "--log-every 1", tmp_path)
        assert done.returncode == 0, done.stderr[-2000:]
        # kilobytes
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 16e6
        row = json.loads((tmp_path / "runs/imagenet/log.jsonl").read_text())
        assert row["step"] == 1 and np.isfinite(list(row.values())).all() and row["grad_norm"] > 0
        done = in_process("sample.py --class 207 --n 1", tmp_path)
        assert done.returncode == 0 and "golden retriever" in done.stdout, done.stderr[-2000:]
    finally:
        # 4 GB
        shutil.rmtree(tmp_path)


# ---------------------------------------------------------------- scores
@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """A folder with Inception weights (generated), 12 PNGs, and what they are as ADM's .npz."""
    folder = tmp_path_factory.mktemp("scored")
    (folder / "official").mkdir()
    torch.save(load_case("inception_fid", "full").weights(),
               folder / "official" / models.INCEPTION)
    cells = np.random.RandomState(0).randint(0, 256, (12, 4, 4, 3)).astype(np.uint8)
    images = cells.repeat(8, 1).repeat(8, 2)
    (folder / "png").mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / "png" / f"{i:02d}.png")
    np.savez(folder / "adm.npz", arr_0=images)
    return folder


@pytest.mark.slow
def test_scores_of_a_folder(scored):
    """The same images against themselves: distance 0, everything precise and recalled; mu and sigma
    alone give no precision."""
    line = ("evaluate.py --folder png --images 12 --weights official --inception-path legacy "
            "--reference ")
    assert in_process(line + "adm.npz", scored).returncode == 0
    report = json.loads((scored / "report.json").read_text())
    (row,), protocol = report["rows"], report["protocol"]
    assert row["fid"] == row["fd"] == pytest.approx(0, abs=1e-3)
    assert (row["precision"], row["recall"]) == (1, 1) and row["inception_score"] >= 1
    assert "12 images are fewer than the 2048" in protocol["warning"]
    assert "not the published" in protocol["warning"]
    assert protocol["inception_path"] == "legacy" and protocol["images"] == 12
    assert "adm.npz (12 images)" in protocol["reference"]
    inception = evaluate.load_inception(scored / "official" / models.INCEPTION)
    features, _ = evaluate.collect(sorted((scored / "png").glob("*.png")),
                                   lambda x: inception(x, path="legacy"))
    mu, sigma = evaluate.statistics(features)
    np.savez(scored / "statistics.npz", mu=mu + 0.1, sigma=sigma)
    assert in_process(line + "statistics.npz", scored).returncode == 0
    (row,) = json.loads((scored / "report-2.json").read_text())["rows"]
    assert row["fid"] == pytest.approx(2048 * 0.01, abs=1e-3) and "precision" not in row


@pytest.mark.slow
def test_scores_of_a_run(scored, smoke):
    """Teacher and student, straight from the generator; the protocol is stored beside the
    scores."""
    folder, _ = smoke
    line = (f"evaluate.py --reference {scored / 'png'} --weights {scored / 'official'} "
            "--images 11 --batch 4 --steps 2 --seed 3")
    assert in_process(line, folder).returncode == 0
    report = json.loads((folder / "runs/imagenet-smoke/report.json").read_text())
    rows = [(row["model"], row["steps"]) for row in report["rows"]]
    assert rows == [("teacher", 2), ("student", 1)]
    for row in report["rows"]:
        assert row["fid"] > 0 and row["ms_per_image"] > 0
        assert {"inception_score", "precision", "recall"} <= row.keys()
    protocol = report["protocol"]
    assert protocol["seed"] == 3 and protocol["init_mask"] == 0.9
    assert protocol["inception_path"] == "pytorch-fid"
    assert "fewer than the 2048" in protocol["warning"]
    assert "weights are random" in protocol["warning"]
    assert (folder / "runs/imagenet-smoke/report.png").is_file()
    assert torch.backends.cudnn.allow_tf32 is False


def test_inception_and_reference_are_asked_for(scored, smoke, tmp_path):
    line = f"evaluate.py --reference {scored / 'png'} --folder {scored / 'png'} --images 12"
    refused(in_process(line, tmp_path), "pt_inception-2015-12-05-6726825d.pth", "pytorch-fid",
            "weights/")
    refused(in_process("evaluate.py", smoke[0]), "imagenet needs --reference")

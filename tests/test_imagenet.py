"""The imagenet setting through its commands: official files, missing files, scores."""
import json
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from conftest import golden_fill, in_process, load_case, official_files, refused
from PIL import Image

import models
import sample
import tokenizer
import train

TINY_BACKBONE = "vit_tiny_patch16_dinov3_qkvb.eupe_lvd1689m"
# the official formats and outer sizes (256 pixels, 256 tokens, 1000 classes), few channels
NARROW_MASKGIT = dict(K=64, width=32, depth=2, mlp=64)
NARROW_VQGAN = dict(K=64, d=16, ch=32, ch_mult=(1, 1, 1, 1, 1), blocks=1, z_channels=32)


@pytest.fixture
def narrow(tmp_path, monkeypatch):
    """weights/ with the three files in a folder of their own, and loaders that expect these sizes
    -> the folder"""
    weights = tmp_path / "weights"
    weights.mkdir()

    def fill(model):
        return golden_fill({key: list(value.shape) for key, value in model.state_dict().items()})
    maskgit = models.MaskGIT(L=256, num_classes=1000, heads=16, **NARROW_MASKGIT)
    vqgan = tokenizer.VQGAN(image_size=256, groups=32, attn_levels=(4,), **NARROW_VQGAN)
    torch.save({"model_state_dict": fill(maskgit), "iter": 1}, weights / "MaskGIT_ImageNet_256.pth")
    torch.save({"state_dict": fill(vqgan)}, weights / "last.ckpt")
    shutil.copy(official_files(tmp_path)["backbone"], weights)
    loaders = {"tokenizer": partial(tokenizer.load_vqgan, **NARROW_VQGAN),
               "teacher": partial(models.load_maskgit, **NARROW_MASKGIT)}
    for part, load in loaders.items():
        repo, file, _ = sample.OFFICIAL["imagenet"][part]
        monkeypatch.setitem(sample.OFFICIAL["imagenet"], part, (repo, file, load))
    monkeypatch.setattr(train, "BACKBONE", TINY_BACKBONE)
    monkeypatch.setattr(train, "load_backbone", partial(models.load_backbone, name=TINY_BACKBONE))
    return tmp_path


# ---------------------------------------------------------------- official files
def test_official_files_train_and_sample(narrow):
    """Not a smoke run: the loaders of all parts; then pictures of the student and of the public
    teacher, with the files in another folder."""
    done = in_process("train.py --dataset imagenet --steps 2 --batch 4 --per-class 2 "
                      "--lift-chunk 2 --log-every 1", narrow)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Nothing was learnt" not in done.stdout
    run = narrow / "runs" / "imagenet"
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log] == [1, 2] and all(row["grad_norm"] > 0 for row in log)
    names = torch.load(run / "checkpoint.pt", weights_only=True)["names"]
    assert len(names) == len(set(names)) == 1000
    assert names[207] == "golden retriever" and names[134] == "crane 134"
    (narrow / "weights").rename(narrow / "moved")
    refused(in_process("sample.py --class 207 --n 1", narrow), "last.ckpt", "weights")
    for words, said in (("--class 207", "student, 1 step |"),
                        ("--dataset imagenet --class 207 --steps 2", "teacher, 2 steps")):
        done = in_process(f"sample.py {words} --n 1 --weights moved", narrow)
        assert done.returncode == 0, done.stderr[-2000:]
        assert said in done.stdout and "golden retriever" in done.stdout
        assert np.asarray(Image.open(narrow / "sample.png")).shape[0] > 256


@pytest.mark.parametrize("line, file, repo", [
    ("train.py --dataset imagenet", "pretrained_maskgit/VQGAN/last.ckpt",
     "llvictorll/Maskgit-pytorch"),
    ("sample.py --dataset laion", "model.safetensors", "turkeyju/tokenizer_tatitok_bl128_vq")])
def test_a_missing_file_is_named_with_its_repository_and_place(line, file, repo, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "one.png")
    refused(in_process(line, tmp_path), file, repo, "weights/", "--weights")
    # nothing was begun
    assert [path.name for path in tmp_path.iterdir()] == ["one.png"]


# ---------------------------------------------------------------- scores
@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """A folder with Inception weights (generated), 12 PNGs, and what they are as ADM's .npz."""
    folder = tmp_path_factory.mktemp("scored")
    torch.save(load_case("inception_fid", "full").weights(), folder / models.INCEPTION)
    cells = np.random.RandomState(0).randint(0, 256, (12, 4, 4, 3)).astype(np.uint8)
    images = cells.repeat(8, 1).repeat(8, 2)
    (folder / "png").mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / "png" / f"{i:02d}.png")
    np.savez(folder / "adm.npz", arr_0=images)
    return folder


@pytest.mark.slow
def test_scores_of_a_folder(scored):
    """The same images against themselves: distance 0, everything precise and recalled. Mu and sigma
    alone give no precision; mu is moved by 0.1 in each of 2048 directions."""
    line = "evaluate.py --folder png --weights . --inception-path legacy --reference "
    done = in_process(line + "adm.npz", scored)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "fewer than the 2048 features" in done.stdout
    assert "does not hold the published weights" in done.stdout
    report = json.loads((scored / "report.json").read_text())
    (row,) = report["rows"]
    assert row["fid"] == pytest.approx(0, abs=1e-3)
    assert (row["precision"], row["recall"]) == (1, 1) and row["inception_score"] >= 1
    assert report["protocol"]["inception_path"] == "legacy"
    images = np.load(scored / "adm.npz")["arr_0"]
    inception = models.load_inception(scored / models.INCEPTION)
    features, _ = inception(torch.from_numpy(images).permute(0, 3, 1, 2), path="legacy")
    features = features.double().numpy()
    np.savez(scored / "statistics.npz", mu=features.mean(0) + 0.1, sigma=np.cov(features.T))
    assert in_process(line + "statistics.npz", scored).returncode == 0
    (row,) = json.loads((scored / "report-2.json").read_text())["rows"]
    assert row["fid"] == pytest.approx(2048 * 0.01, abs=1e-3) and "precision" not in row

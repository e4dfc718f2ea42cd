"""The settings with public networks, imagenet and laion, through their commands."""
import json
from functools import partial

import pytest
import torch
from conftest import TINY_BACKBONE, filled, in_process, refused
from PIL import Image
from safetensors.torch import save_file

import models
import sample
import tokenizer
import train

# Networks of the official formats and outer sizes (256 pixels, 1000 classes or text of 77 x 768),
# with few channels and layers: file, class, loader, sizes
NARROW = {
    "imagenet": {
        "tokenizer": ("last.ckpt", tokenizer.VQGAN, tokenizer.load_vqgan,
                      dict(K=64, d=16, ch=8, ch_mult=(1, 1, 1, 1, 1), blocks=1, attn_levels=(4,),
                           z_channels=8, groups=8, image_size=256)),
        "teacher": ("MaskGIT_ImageNet_256.pth", models.MaskGIT, models.load_maskgit,
                    dict(K=64, L=256, num_classes=1000, width=32, depth=2, heads=16, mlp=64))},
    "laion": {
        "tokenizer": ("tokenizer_tatitok_bl128_vq.safetensors", tokenizer.TATiTok,
                      tokenizer.load_tatitok,
                      dict(K=64, d=8, L=32, width=(64, 64), depth=(1, 1))),
        "teacher": ("generator_maskgen_vq_l.safetensors", models.MaskGen, models.load_maskgen,
                    dict(K=64, L=32, width=32, depth=2, heads=16, text_width=768, T=77,
                         score_width=16, unused_rows=1001)),
        "text": ("vit_large_patch14_clip_336.openai.safetensors",
                 partial(models.TextEncoder, depth=1), models.load_text_encoder, {})}}


def test_the_names_of_imagenets_classes_are_told_apart():
    names = models.imagenet_names()
    assert len(names) == len(set(names)) == 1000
    assert names[207] == "golden retriever" and names[134] == "crane 134"


@pytest.mark.parametrize("dataset, flags, drawn, name", [
    ("imagenet", "", ["--class", "207"], "golden retriever"),
    ("laion", "--captions captions.txt ", ["--prompt", "a photo of a dog"], "'a photo of a dog'")])
def test_official_files_train_and_sample(dataset, flags, drawn, name, tmp_path, monkeypatch):
    """This is no smoke run: all loaders read files, the student is trained and draws, and so does
    the public teacher, with the files in another folder."""
    monkeypatch.setattr(models, "TextEncoder", partial(models.TextEncoder, depth=1))
    monkeypatch.setattr(train, "BACKBONE", TINY_BACKBONE)
    monkeypatch.setattr(train, "load_backbone", partial(models.load_backbone, name=TINY_BACKBONE))
    weights = tmp_path / "weights"
    weights.mkdir()
    for part, (file, network, load, sizes) in NARROW[dataset].items():
        network = network(**sizes)
        state = filled(getattr(network, "tower", network))
        if file.endswith(".safetensors"):
            save_file(state, weights / file)
        else:
            torch.save({"state_dict": state}, weights / file)
        repo, path, _ = sample.PUBLIC[dataset][part]
        monkeypatch.setitem(sample.PUBLIC[dataset], part, (repo, path, partial(load, **sizes)))
    save_file(filled(models.Backbone(TINY_BACKBONE).net), weights / f"{TINY_BACKBONE}.safetensors")
    captions = ["a dog", "very " * 80 + "long tail", "a cat"]
    (tmp_path / "captions.txt").write_text("\n".join(captions))

    done = in_process(f"train.py --dataset {dataset} {flags}--steps 1 --batch 4 --per-class 2 "
                      "--lift-chunk 2 --log-every 1", tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Nothing was learnt" not in done.stdout
    assert all(file in done.stdout for file, *_ in NARROW[dataset].values())
    run = tmp_path / "runs" / dataset
    row, = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    assert row["step"] == 1 and row["grad_norm"] > 0
    saved = torch.load(run / "checkpoint.pt", weights_only=True)
    assert saved["names"] == (captions if flags else models.imagenet_names())

    weights.rename(tmp_path / "moved")
    file = NARROW[dataset]["tokenizer"][0]
    refused(in_process(["sample.py", *drawn, "--n", "1"], tmp_path), file, "weights")
    for words, said in (([], "student, 1 step |"),
                        (["--dataset", dataset, "--steps", "2"], "teacher, 2 steps")):
        done = in_process(["sample.py", *drawn, *words, "--n", "1", "--weights", "moved"], tmp_path)
        assert done.returncode == 0, done.stderr[-2000:]
        assert said in done.stdout and name in done.stdout
        with Image.open(tmp_path / "sample.png") as picture:
            assert min(picture.size) > 256

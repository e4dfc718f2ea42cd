"""The settings with captions, scenes and laion: prompts, training on captions, official files."""
import dataclasses
import json
import shutil
import types
from functools import partial

import numpy as np
import pytest
import torch
from conftest import golden_fill, in_process, official_files, own_copy
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import fpd
import models
import sample
import tokenizer
import train

TINY_BACKBONE = "vit_tiny_patch16_dinov3_qkvb.eupe_lvd1689m"
PROMPT = ["sample.py", "--prompt", "a red circle and a blue square"]


def tiles(path, size):
    """The images of a file that sample.py wrote, in one row -> (n, size, size, 3) uint8"""
    picture = np.asarray(Image.open(path))[10:10 + size, 8:]
    return np.stack([picture[:, x:x + size] for x in range(0, picture.shape[1], size + 2)])


# ---------------------------------------------------------------- prompts
# those of scenes are shown enlarged
@pytest.mark.parametrize("dataset, size", [("scenes", 96), ("laion", 64)])
def test_a_prompt_draws_the_same_pictures_whatever_their_number(
        dataset, size, smoke_runs, tmp_path_factory):
    folder = own_copy(tmp_path_factory, smoke_runs(dataset))
    said = "student, 1 step (trained for 4 steps) | 'a red circle and a blue square'"
    for words in ("--n 3 --out three.png", "--n 3 --out again.png", "--n 1 --out one.png",
                  "--n 3 --seed 1 --out other.png"):
        done = in_process(PROMPT + words.split(), folder)
        assert done.returncode == 0, done.stderr
        assert said in done.stdout and "smoke run" in done.stdout
    three, again, one, other = (tiles(folder / f"{name}.png", size)
                                for name in ("three", "again", "one", "other"))
    assert (three == again).all() and len(three) == 3
    # in a batch of another size float32 rounds otherwise, here by 8e-7: hardly a pixel is a grey
    # level off, and the tokens are the same
    assert np.abs(three[:1].astype(int) - one).max() <= 1 and (three[:1] != one).mean() < 1e-3
    run = sample.load_run(folder / "runs" / f"{dataset}-smoke", "cpu")
    c = run.text.encode([PROMPT[-1]])
    alone, together = (sample.draw_tokens(run.student, c.expand(n, *c.shape[1:]),
                                          fpd.generators(0, 0, n, "cpu"), run.cfg, 0)
                       for n in (1, 3))
    assert (together[:1] == alone).all()
    assert (three[0] != three[1]).any() and (three != other).any()
    # "no condition" of the guidance: MaskGen's file does not hold it, so the text encoder makes it
    empty = run.text.encode([""])[0, :len(run.teacher.empty)]
    assert torch.equal(run.teacher.empty, empty) and torch.equal(run.student.empty, empty)
    assert dataset == "scenes" or empty.abs().max() > 0


def test_without_a_prompt_the_captions_of_the_sheets_are_drawn():
    run = types.SimpleNamespace(text=models.Words(), names=["a circle", "a red circle"])
    c, what = sample.conditions(run, None, None, 3)
    assert torch.equal(c, run.text.encode(["a circle", "a red circle", "a circle"]))
    assert what == "the captions of its sheets"
    c, _ = sample.conditions(run, None, "a cross", 2)
    assert torch.equal(c, run.text.encode(["a cross", "a cross"]))
    c, captions = sample.sheet_conditions(run)
    assert torch.equal(c, run.text.encode(captions)) and captions == run.names


# ---------------------------------------------------------------- training on captions
class Counted(models.Words):
    """Remembers what it was asked to encode."""
    asked = ()

    def encode(self, captions):
        self.asked = [*self.asked, captions]
        return super().encode(captions)


def test_a_batch_has_runs_of_equal_captions_each_encoded_once():
    cfg = train.Config(batch=12, per_class=3)
    parts = types.SimpleNamespace(text=Counted(), captions=tokenizer.scene_captions(50, 0),
                                  names=["a circle"])
    c = train.draw_condition(parts, cfg, torch.Generator().manual_seed(0))
    (asked,) = parts.text.asked
    assert len(asked) == len(set(asked)) == 4 and set(asked) <= set(parts.captions)
    assert torch.equal(c, models.Words().encode([caption for caption in asked for _ in range(3)]))
    # fewer than a batch takes: all of them, then again
    parts.captions = ["a circle", "a cross", "a square"]
    train.draw_condition(parts, cfg, torch.Generator().manual_seed(0))
    asked = parts.text.asked[1]
    assert set(asked) == set(parts.captions) and len(asked) == 4


@pytest.mark.parametrize("chunk", [None, 3])
def test_a_step_on_captions_trains_the_student_alone(chunk):
    """MaskGen, and TA-TiTok, whose decoder reads the text, too. Chunks change nothing."""
    torch.manual_seed(0)
    words = models.Words()
    vq = tokenizer.TATiTok(K=8, d=4, L=16, width=(16, 16), depth=(1, 1), patch=8, text=(12, 128),
                           image_size=32, head_width=8)
    phi = models.ConvNet(width=4)
    teacher = models.MaskGen(K=8, L=16, width=16, depth=2, heads=2)
    for p in teacher.parameters():
        # else its gates are closed
        nn.init.normal_(p, std=0.1)
    for net in (vq, phi, teacher):
        net.eval().requires_grad_(False)
    student = models.MaskGen(K=8, L=16, width=16, depth=2, heads=2)
    student.load_state_dict(teacher.state_dict())
    cfg = train.Config(batch=8, per_class=4, blocks=(0, 1, 2, 3), lift_chunk=chunk)
    c = words.encode(["a circle", "a red cross"]).repeat_interleave(4, 0)
    lift = fpd.Lift(vq, phi, cfg)
    generator = torch.Generator().manual_seed(0)
    loss, logs, images = fpd.fpd_step(student, teacher, lift, vq.E, c, cfg, generator)
    loss.backward()
    assert images.shape == (8, 3, 32, 32)
    gradients = [p.grad for p in student.parameters() if p.grad is not None]
    assert all(gradient.isfinite().all() for gradient in gradients)
    # the captions matter
    assert student.text_embed_proj.weight.grad.abs().max() > 0
    assert all(p.grad is None for net in (vq, phi, teacher) for p in net.parameters())
    whole = fpd.Lift(vq, phi, dataclasses.replace(cfg, lift_chunk=None))
    e = vq.E[torch.randint(8, (8, 16))]
    torch.testing.assert_close(lift.features(lift.decode(e, c)),
                               whole.features(whole.decode(e, c)))
    # a text of another image would show
    assert (whole.decode(e, c) - whole.decode(e, c.flip(0))).abs().max() > 1e-4


def test_the_table_of_scenes(smoke_runs):
    """Share of images that show what the caption says, for each of GenEval's six kinds of captions.
    The scorer is exact: of real images it is 1."""
    folder, done = smoke_runs("scenes")
    report = json.loads((folder / "runs/scenes-smoke/report.json").read_text())
    assert [row["model"] for row in report["rows"]] == [
        "real", "round trip", "teacher", "fixed point", "student"]
    assert all(report["rows"][0][tag] == 1 for tag in (*tokenizer.TAGS, "overall"))
    for row in report["rows"]:
        assert row["overall"] == pytest.approx(np.mean([row[tag] for tag in tokenizer.TAGS]))
        assert 0 <= row["overall"] <= 1 and "fd" not in row and "accuracy" not in row
    assert all(tag in done.stdout for tag in (*tokenizer.TAGS, "overall"))


# ---------------------------------------------------------------- official files
def test_official_files_train_and_sample(tmp_path, monkeypatch):
    """Not a smoke run: the loaders of all parts, over generated files of the official formats and
    outer sizes (256 pixels, text of 77 x 768, 16 heads), with few channels and layers."""
    maskgen = dict(K=64, L=32, width=32, depth=2, score_width=16)
    titok = dict(K=64, d=8, L=32, width=(64, 64), depth=(1, 1))
    weights = tmp_path / "weights"
    weights.mkdir()
    for name, model in (
            ("generator_maskgen_vq_l",
             models.MaskGen(heads=16, text_width=768, T=77, unused_rows=1001, **maskgen)),
            ("tokenizer_tatitok_bl128_vq", tokenizer.TATiTok(**titok))):
        manifest = {key: list(value.shape) for key, value in model.state_dict().items()}
        save_file(golden_fill(manifest), weights / f"{name}.safetensors")
    monkeypatch.setattr(models, "TextEncoder", partial(models.TextEncoder, depth=1))
    save_file(models.TextEncoder().tower.state_dict(),
              weights / "vit_large_patch14_clip_336.openai.safetensors")
    shutil.copy(official_files(tmp_path)["backbone"], weights)
    for part, load in (("tokenizer", partial(tokenizer.load_tatitok, **titok)),
                       ("teacher", partial(models.load_maskgen, **maskgen))):
        repo, file, _ = sample.OFFICIAL["laion"][part]
        monkeypatch.setitem(sample.OFFICIAL["laion"], part, (repo, file, load))
    monkeypatch.setattr(train, "BACKBONE", TINY_BACKBONE)
    monkeypatch.setattr(train, "load_backbone", partial(models.load_backbone, name=TINY_BACKBONE))
    (tmp_path / "captions.txt").write_text("a dog\n" + "very " * 80 + "long tail\na cat\n")
    done = in_process("train.py --dataset laion --captions captions.txt --steps 1 --batch 4 "
                      "--per-class 2 --lift-chunk 2 --log-every 1", tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "vit_large_patch14_clip_336.openai.safetensors" in done.stdout
    saved = torch.load(tmp_path / "runs/laion/checkpoint.pt", weights_only=True)
    assert saved["names"][0] == "a dog" and len(saved["names"]) == 3
    done = in_process(["sample.py", "--prompt", "a photo of a dog", "--n", "1"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "student, 1 step (trained for 1 steps) | 'a photo of a dog'" in done.stdout
    assert tiles(tmp_path / "sample.png", 256).shape == (1, 256, 256, 3)

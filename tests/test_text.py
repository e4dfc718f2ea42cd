"""The settings with captions, scenes and laion: prompts, training on captions, official files."""
import shutil
import types
from functools import partial

import torch
from conftest import golden_fill, in_process, official_files
from PIL import Image
from safetensors.torch import save_file

import models
import sample
import tokenizer
import train

TINY_BACKBONE = "vit_tiny_patch16_dinov3_qkvb.eupe_lvd1689m"


# ---------------------------------------------------------------- prompts
def test_without_a_prompt_the_captions_of_the_sheets_are_drawn():
    run = types.SimpleNamespace(text=models.Words(), names=["a circle", "a red circle"])
    c, what = sample.conditions(run, None, None, 3)
    assert torch.equal(c, run.text.encode(["a circle", "a red circle", "a circle"]))
    assert what == "the captions of its sheets"
    c, _ = sample.conditions(run, None, "a cross", 2)
    assert torch.equal(c, run.text.encode(["a cross", "a cross"]))
    c, captions = sample.grid_conditions(run)
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
    assert "student, 1 step | 'a photo of a dog'" in done.stdout
    with Image.open(tmp_path / "sample.png") as picture:
        assert min(picture.size) > 256

"""The settings with captions, scenes and laion, through their commands: smoke runs, prompts,
official files, missing and bad input, scores."""
import dataclasses
import json
import shutil
import types
from functools import partial

import numpy as np
import pytest
import torch
from conftest import command, golden_fill, in_process, official_files, own_copy, refused
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import evaluate
import fpd
import models
import sample
import tokenizer
import train

TINY_BACKBONE = "vit_tiny_patch16_dinov3_qkvb.eupe_lvd1689m"
PROMPT = ["sample.py", "--prompt", "a red circle and a blue square"]


@pytest.fixture(scope="module")
def scenes(smoke_runs, tmp_path_factory):
    """A folder with one smoke run of scenes, and what the run said."""
    return own_copy(tmp_path_factory, smoke_runs("scenes")), smoke_runs("scenes")[1]


@pytest.fixture(scope="module")
def laion(smoke_runs, tmp_path_factory):
    """The same of laion."""
    return own_copy(tmp_path_factory, smoke_runs("laion")), smoke_runs("laion")[1]


def tiles(path, size):
    """The images of a file that sample.py wrote, in one row -> (n, size, size, 3) uint8"""
    picture = np.asarray(Image.open(path))[10:10 + size, 8:]
    return np.stack([picture[:, x:x + size] for x in range(0, picture.shape[1], size + 2)])


def write_prompts(path, captions):
    lines = []
    for caption in captions:
        line = {"tag": "single_object", "include": [{"class": "dog", "count": 1}],
                "prompt": caption}
        lines.append(json.dumps(line) + "\n")
    path.write_text("".join(lines))


# ---------------------------------------------------------------- the smoke runs
def test_smoke_run_of_scenes_leaves_everything_and_says_that_it_learnt_nothing(scenes):
    folder, done = scenes
    run = folder / "runs" / "scenes-smoke"
    for name in ("config.json", "log.jsonl", "checkpoint.pt", "report.png", "samples/000002.png",
                 "samples/000004.png"):
        assert (run / name).is_file(), name
    for words in ("Nothing was learnt", "text: Words", "teacher: MaskGen"):
        assert words in done.stdout, words
    report = json.loads((run / "report.json").read_text())
    assert [row["model"] for row in report["rows"]] == [
        "real", "round trip", "teacher", "fixed point", "student"]
    # the scorer is exact
    assert all(report["rows"][0][tag] == 1 for tag in (*tokenizer.TAGS, "overall"))
    names = torch.load(run / "checkpoint.pt", weights_only=True)["names"]
    assert names == tokenizer.world(train.parse(["--dataset", "scenes", "--smoke"]), "test")[1][:12]


def test_smoke_run_of_laion_leaves_everything(laion):
    folder, done = laion
    run = folder / "runs" / "laion-smoke"
    for name in ("config.json", "log.jsonl", "checkpoint.pt", "samples/000002.png",
                 "samples/000004.png"):
        assert (run / name).is_file(), name
    for words in ("Nothing was learnt", "text: TextEncoder", "tokenizer: TATiTok",
                  "teacher: MaskGen", "--geneval --prompts FILE"):
        assert words in done.stdout, words
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log] == [1, 2, 3, 4]
    assert all(row["grad_norm"] > 0 for row in log)


def test_the_papers_settings_of_laion_are_the_defaults():
    """Sec. 4.1: batch 64, the same learning rate and bandwidths as ImageNet's."""
    cfg = train.parse(["--dataset", "laion", "--captions", "x"])
    assert (cfg.batch, cfg.lr, cfg.init_mask) == (64, 1e-5, 0.9)
    assert (cfg.bandwidths, cfg.blocks) == ((0.02, 0.05, 0.2), (2, 5, 8, 11))
    # MaskGen's own: 12 in their convention
    assert (cfg.guidance, cfg.confidence_noise) == (13.0, 2.0)


@pytest.mark.parametrize("dataset", ["scenes", "laion"])
def test_resume_is_the_uninterrupted_run_bit_for_bit(dataset, request, no_pictures):
    folder, _ = request.getfixturevalue(dataset)
    for line in (f"train.py --dataset {dataset} --smoke --steps 2 --name halves",
                 "train.py --name halves --resume --steps 4"):
        done = in_process(line, folder)
        assert done.returncode == 0, done.stderr[-2000:]
    whole, halves = (torch.load(folder / "runs" / name / "checkpoint.pt", weights_only=True)
                     for name in (f"{dataset}-smoke", "halves"))
    # the smoke run is to stay the newest
    shutil.rmtree(folder / "runs" / "halves")
    for part in ("student", "ema"):
        assert whole[part].keys() == halves[part].keys() and len(whole[part]) > 0
        assert all(torch.equal(whole[part][key], halves[part][key]) for key in whole[part]), part
    assert torch.equal(whole["rng"], halves["rng"])
    assert halves["config"] == {**whole["config"], "name": "halves", "resume": True}


# ---------------------------------------------------------------- prompts
# those of scenes are shown enlarged
@pytest.mark.parametrize("dataset, size", [("scenes", 96), ("laion", 64)])
def test_a_prompt_draws_the_same_pictures_whatever_their_number(dataset, size, request):
    folder, _ = request.getfixturevalue(dataset)
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
    alone, together = (sample.tokens(run.student, c.expand(n, *c.shape[1:]),
                                     fpd.generators(0, 0, n, "cpu"), run.cfg, 0) for n in (1, 3))
    assert (together[:1] == alone).all()
    assert (three[0] != three[1]).any() and (three != other).any()


def test_without_a_prompt_the_captions_of_the_sheets_are_drawn(laion):
    """Also the one test of a process of its own: what laion imports is in the right order."""
    done = command("sample.py --teacher --steps 4 --n 9 --out nine.png", laion[0])
    assert done.returncode == 0, done.stderr[-2000:]
    assert "9 images | teacher, 4 steps | the captions of its sheets" in done.stdout
    run = types.SimpleNamespace(text=models.Words(), names=["a circle", "a red circle"])
    c, what = sample.condition(run, None, None, 3)
    assert torch.equal(c, run.text.encode(["a circle", "a red circle", "a circle"]))
    assert what == "the captions of its sheets"
    c, _ = sample.condition(run, None, "a cross", 2)
    assert torch.equal(c, run.text.encode(["a cross", "a cross"]))
    c, captions = sample.shown(run)
    assert torch.equal(c, run.text.encode(captions)) and captions == run.names


def test_the_teacher_draws_prompts_too(scenes):
    done = in_process(PROMPT + "--teacher --steps 4 --n 2".split(), scenes[0])
    assert done.returncode == 0, done.stderr
    said = "sample.png: 2 images | teacher, 4 steps | 'a red circle and a blue square'"
    assert said in done.stdout


def test_teacher_and_student_know_the_empty_caption(laion):
    """"No condition" of the guidance: MaskGen does not keep it in its file, so it comes from the
    text encoder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(laion[0])
        run = sample.load_run("runs/laion-smoke", "cpu")
    empty = run.text.encode([""])[0, :78]
    assert torch.equal(run.teacher.empty, empty) and torch.equal(run.student.empty, empty)
    assert empty.abs().max() > 0


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
    """MaskGen, and TA-TiTok, whose decoder reads the text, too. Far drafts come from MaskGen's own
    sampler. Chunks change nothing."""
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


# ---------------------------------------------------------------- scores
def test_the_table_of_scenes(scenes, monkeypatch):
    """Share of images that show what the caption says, for each of GenEval's six kinds of captions.
    Its pictures stand under theirs."""
    (folder, _), sheets = scenes, []
    monkeypatch.setattr(evaluate, "sheet", lambda *args: sheets.append(args) or sample.sheet(*args))
    # the smoke run's own report is to stay
    shutil.copytree(folder / "runs", folder / "other" / "runs")
    done = in_process("evaluate.py --images 48 --steps 2 --seed 1", folder / "other")
    assert done.returncode == 0, done.stderr[-2000:]
    assert all(tag in done.stdout for tag in (*tokenizer.TAGS, "overall", "student"))
    report = json.loads((folder / "other/runs/scenes-smoke/report-2.json").read_text())
    rows = [(row["model"], row["steps"]) for row in report["rows"]]
    assert rows == [("real", None), ("round trip", None), ("teacher", 2),
                    ("fixed point", None), ("student", 1)]
    for row in report["rows"]:
        assert row["overall"] == pytest.approx(np.mean([row[tag] for tag in tokenizer.TAGS]))
        assert 0 <= row["overall"] <= 1
        assert "fd" not in row and "accuracy" not in row
    (((title, real), *_), captions), = sheets
    assert title.startswith("real") and evaluate.scene_scores(real, captions)["overall"] == 1
    protocol = report["protocol"]
    assert protocol["images"] == 48 and protocol["seed"] == 1
    assert "exact" in protocol["scorer"] and protocol["dataset"] == "scenes"


def test_geneval_images_of_a_run_are_made_once(laion):
    """They lie where the official scorer looks. A run that was stopped goes on, and its images are
    those of an uninterrupted one."""
    folder, _ = laion
    line = "evaluate.py --geneval --prompts prompts.jsonl"
    write_prompts(folder / "prompts.jsonl", ["a photo of a dog", "a photo of a cow"])
    assert in_process(line, folder).returncode == 0
    out = folder / "runs" / "laion-smoke" / "geneval"
    before = {path: path.read_bytes() for path in sorted(out.rglob("*.png"))}
    names = [str(path.relative_to(out)) for path in before]
    assert names == [f"{i:05d}/samples/{j:04d}.png" for i in (0, 1) for j in range(4)]
    # all different
    assert len(set(before.values())) == 8
    (out / "00000/samples/0001.png").unlink()
    (out / "00001/samples/0003.png").write_bytes(b"")
    assert in_process(line, folder).returncode == 0
    assert {path: path.read_bytes() for path in sorted(out.rglob("*.png"))} == before
    done = in_process(f"{line} --steps 2 --out teacher", folder)
    assert done.returncode == 0
    assert "teacher: 4 images of each prompt | teacher, 2 steps | seed 0" in done.stdout
    first = "00000/samples/0000.png"
    assert (folder / "teacher" / first).read_bytes() != (out / first).read_bytes()
    dog = {"class": "dog", "box": [0, 0, 9, 9], "confidence": 0.9}
    seen = [{"image": str(path), "detections": [dog] * (i == 0)} for i, path in enumerate(before)]
    (folder / "seen.jsonl").write_text("".join(json.dumps(line) + "\n" for line in seen))
    words = ["--detections", "seen.jsonl", "--detector", "no one"]
    done = in_process(line.split() + words, folder)
    assert done.returncode == 0 and "0.12" in done.stdout
    assert "detections by no one: 8 images of 2 prompts" in done.stdout


# ---------------------------------------------------------------- files that are missing
def test_captions_are_lines_without_the_empty_ones(tmp_path):
    """Also with the mark that Windows puts first, and Unicode's other ends of lines within one."""
    text = "\ufeffa dog\r\n\r\n  a café \r\na cat\u2028on a mat\x85"
    (tmp_path / "captions.txt").write_bytes(text.encode())
    captions = tokenizer.read_captions(tmp_path / "captions.txt")
    assert captions == ["a dog", "a café", "a cat\u2028on a mat"]


def test_every_missing_file_is_listed_at_once(tmp_path):
    (tmp_path / "captions.txt").write_text("a dog\n")
    (tmp_path / "real").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "real" / "one.png")
    expected = [("tokenizer", "model.safetensors", "turkeyju/tokenizer_tatitok_bl128_vq"),
                ("teacher", "model.safetensors", "turkeyju/generator_maskgen_vq_l"),
                ("text", "open_clip_model.safetensors", "timm/vit_large_patch14_clip_336.openai"),
                ("backbone", "model.safetensors", "timm/vit_base_patch16_dinov3.lvd1689m"),
                ("deit", "model.safetensors", "timm/deit_base_distilled_patch16_224"),
                ("efficientnet", "model.safetensors", "timm/tf_efficientnet_lite0")]

    def check(line, parts, folder="weights"):
        done = in_process(line, tmp_path)
        refused(done, lines=len(parts))
        for text, (part, file, repo) in zip(done.stderr.splitlines(), parts, strict=True):
            assert text.startswith(f"error: no weights for {part}"), text
            place = f"{folder}/{repo.split('/')[1]}.safetensors"
            for words in (file, repo, place, "--weights"):
                assert words in text, text
    line = "train.py --dataset laion --captions captions.txt"
    check(line, expected[:4])
    check(f"{line} --gan-weight 0.5 --data real", expected)
    check("sample.py --dataset laion --teacher", expected[:3])
    check(f"{line} --gan-weight 0.5 --data real --weights real", expected, "real")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["captions.txt", "real"]


# ---------------------------------------------------------------- official files
@pytest.fixture(scope="module")
def narrow(tmp_path_factory):
    """The official formats and outer sizes (256 pixels, text of 77 x 768, 16 heads), few channels
    and layers -> weights/"""
    folder = tmp_path_factory.mktemp("narrow") / "weights"
    folder.mkdir()
    maskgen = models.MaskGen(K=64, L=32, width=32, depth=2, heads=16, text_width=768, T=77,
                             score_width=16, unused_rows=1001)
    titok = tokenizer.TATiTok(K=64, d=8, L=32, width=(64, 64), depth=(1, 1))
    for name, model in (("generator_maskgen_vq_l", maskgen),
                        ("tokenizer_tatitok_bl128_vq", titok)):
        manifest = {key: list(value.shape) for key, value in model.state_dict().items()}
        save_file(golden_fill(manifest), folder / f"{name}.safetensors")
    save_file(models.TextEncoder(depth=1).tower.state_dict(),
              folder / "vit_large_patch14_clip_336.openai.safetensors")
    shutil.copy(official_files(tmp_path_factory.mktemp("tiny"))["backbone"], folder)
    yield folder
    # 0.2 GB
    shutil.rmtree(folder)


def test_official_files_train_and_sample(narrow, tmp_path, monkeypatch):
    """Not a smoke run: the loaders of all parts, a caption too long for CLIP, then a picture for
    which the teacher's file is not needed."""
    monkeypatch.setattr(models, "TextEncoder", partial(models.TextEncoder, depth=1))
    (tmp_path / "weights").mkdir()
    for file in narrow.iterdir():
        (tmp_path / "weights" / file.name).symlink_to(file)
    (tmp_path / "captions.txt").write_text("a dog\n" + "very " * 80 + "long tail\na cat\n")
    done = in_process("train.py --dataset laion --captions captions.txt --steps 1 --batch 4 "
                      f"--backbone {TINY_BACKBONE} --per-class 2 --lift-chunk 2 --log-every 1",
                      tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    for words in ("loading text from weights/vit_large_patch14_clip_336.openai.safetensors",
                  "--geneval --prompts FILE",
                  "caption longer than 77 tokens: 'very very very very very very very very '... "
                  "loses its end, 'very very very very very long tail'"):
        assert words in done.stdout, done.stdout
    saved = torch.load(tmp_path / "runs/laion/checkpoint.pt", weights_only=True)
    assert saved["names"][0] == "a dog" and len(saved["names"]) == 3
    assert saved["parts"].keys() == {"tokenizer", "teacher", "phi", "text"}
    (tmp_path / "weights" / "generator_maskgen_vq_l.safetensors").unlink()
    done = in_process(["sample.py", "--prompt", "a photo of a dog", "--n", "1"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "student, 1 step (trained for 1 steps) | 'a photo of a dog'" in done.stdout
    assert tiles(tmp_path / "sample.png", 256).shape == (1, 256, 256, 3)

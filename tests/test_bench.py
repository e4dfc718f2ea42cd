"""train.py --bench: parts of a time add up, and every row and column is there, on networks of a few
hundred weights. Also what chooses how much a GPU's memory takes."""
import json
import types

import pytest
import torch
from conftest import in_process, refused
from test_fpd import System

import train


def test_stopwatch_gives_the_median_round_without_warm_up_and_end(monkeypatch):
    # rounds: 1 + 99, 1 + 10, 2 + 3, 1 + 883; the last never ends
    clock = iter((0, 1, 100, 101, 111, 113, 116, 117, 1000))
    monkeypatch.setattr(train, "time", types.SimpleNamespace(perf_counter=lambda: next(clock)))
    watch = train.Stopwatch("cpu", "a")
    for part in "ababababa":
        watch.mark(part)
    assert watch.milliseconds(warm_up=1) == dict(a=1000, b=10_000, total=11_000)


def test_bench_prints_and_keeps_every_row(tmp_path, monkeypatch):
    system = System(dataset="imagenet", smoke=True)
    parts = types.SimpleNamespace(names=["a", "b", "c"], text=None, captions=None, saved={},
                                  tokenizer=system.vq, phi=system.phi, teacher=system.teacher)
    monkeypatch.setattr(train, "prepare", lambda *args: parts)
    line = "train.py --bench --smoke --dataset imagenet --batch 8 --per-class 4 --blocks 0 1 2 3"
    done = in_process(line, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    # and no half run
    folder = tmp_path / "runs/bench-imagenet-smoke"
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert [path.name for path in folder.iterdir()] == ["bench.json"]
    content = json.loads((folder / "bench.json").read_text())
    models = [("teacher", steps) for steps in (16, 8, 4, 1)] + [("student", 1)]
    assert [(row["model"], row["steps"], row["batch"]) for row in content["sampling"]] == \
        [(*model, n) for model in models for n in (1, 64)]
    for row in content["sampling"]:
        assert 0 < row["transformer"] < row["ms_per_image"]
        assert row["images_per_second"] * row["ms_per_image"] == pytest.approx(1000)
    steps = {row.pop("method"): row for row in content["training"]}
    forward = {"condition", "student", "refinement"}
    assert {name: set(row) - forward for name, row in steps.items()} == {
        "FPD": {"decode", "lift", "drift", "backward", "update", "total", "peak_gb"},
        "FPD + GAN": {"decode", "lift", "drift", "gan", "backward", "update", "total", "peak_gb"},
        "Di[M]O": {"auxiliary", "backward", "update", "total", "peak_gb"}}
    for row in steps.values():
        assert row["peak_gb"] > 0 and row["total"] > max(row[part] for part in forward) > 0
    assert "Di[M]O" in done.stdout and "teacher" in done.stdout
    assert not system.teacher._forward_pre_hooks
    # again: it is measured anew
    before = (folder / "bench.json").read_text()
    assert in_process(line, tmp_path).returncode == 0
    assert (folder / "bench.json").read_text() != before
    refused(in_process("train.py --bench --batch 0", tmp_path), "--batch")


# ---------------------------------------------------------------- a GPU's memory
def needs(fixed, per_image, batch=32):
    """An estimate of GB as a function of lift_chunk (None: all)."""
    return lambda chunk: fixed + per_image * (batch if chunk is None else chunk)


@pytest.mark.parametrize("free, chunk", [(79.0, None), (32.0, 16), (23.0, 16), (19.0, 8), (14.0, 4),
                                         (11.5, 1), (5.0, 1)])
def test_the_largest_chunk_that_fits_is_chosen(free, chunk):
    """ImageNet's numbers at batch 32: 24 GB cards lift 16 images at a time."""
    assert train.choose_chunk(32, free, needs(11.1, 0.67)) == chunk


def test_no_chunk_is_as_large_as_the_batch():
    asked = []
    train.choose_chunk(8, 0.0, lambda chunk: asked.append(chunk) or 1.0)
    assert asked == [None, 4, 2]


class OfCard(System):
    """What fit_to_card reads of a Distillation, on a card that is acted out."""
    def __init__(self, **settings):
        super().__init__(**settings)
        self.parts = types.SimpleNamespace(tokenizer=self.vq, phi=self.phi, teacher=self.teacher,
                                           text=None, captions=None, names=["a", "b", "c"])
        self.half = torch.autocast("cpu", torch.bfloat16, enabled=False)
        self.tokenizer, self.gan, self.other = self.vq, None, None
        self.generator = types.SimpleNamespace(device=types.SimpleNamespace(type="cuda"))


@pytest.mark.parametrize("free, asked, chosen, says", [
    (1.0, None, None, "all images are lifted at once"),
    (0.0, None, 1, "--lift-chunk 1, chosen: less memory, same gradient\nthis may be too much: "
                   "less with a smaller --batch than 8\n"),
    (0.0, 3, 3, "--lift-chunk 3, as asked for\nthis may be too much: less with a smaller --batch "
                "than 8, or --lift-chunk 1\n")])
def test_the_chunk_follows_from_the_free_memory_and_is_told(monkeypatch, capsys, free, asked,
                                                           chosen, says):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free * 1e9, 80e9))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 0)
    monkeypatch.setattr(train, "draw_condition", lambda *args: torch.zeros(2, dtype=torch.long))
    monkeypatch.setattr(torch, "Generator", lambda device: types.SimpleNamespace(
        manual_seed=lambda seed: None))
    run = OfCard(lift_chunk=asked)
    monkeypatch.setattr(torch.Tensor, "to", lambda x, *args, **kwargs: x)
    cfg = train.fit_to_card(run)
    assert cfg.lift_chunk == chosen and run.cfg.lift_chunk == asked
    out = capsys.readouterr().out
    assert "memory: about 0.0 GB expected" in out and says in out


def test_the_cpu_lifts_all_at_once(capsys):
    run = OfCard()
    run.generator = torch.Generator()
    assert train.fit_to_card(run) is run.cfg and not capsys.readouterr().out


def test_the_discriminator_and_kept_gradients_take_memory(monkeypatch):
    run = OfCard()
    run.vq.image_size = 16
    c = torch.zeros(2, dtype=torch.long)
    estimate = train.memory(run.student, run.parts, run.cfg, run.half, c)(None)
    discriminator = train.fpd.Discriminator({"phi": run.phi}, 16, width=16)
    gan = types.SimpleNamespace(discriminator=discriminator)
    state = {key: x.clone() for key, x in discriminator.state_dict().items()}
    more = train.memory(run.student, run.parts, run.cfg, run.half, c, gan)(None) - estimate
    assert more > sum(p.nbytes for p in discriminator.parameters()) / 1e9
    assert all(torch.equal(x, state[key]) for key, x in discriminator.state_dict().items())
    # of several processes, the student's gradients stay
    monkeypatch.setattr(train.dist, "is_initialized", lambda: True)
    more = train.memory(run.student, run.parts, run.cfg, run.half, c)(None) - estimate
    weights = sum(p.nbytes for p in run.student.parameters())
    assert more == pytest.approx(train.MARGIN * weights / 1e9)


def test_a_full_gpu_ends_in_one_line_that_says_what_to_type(tmp_path, monkeypatch):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee more")
    monkeypatch.setattr(train, "prepare", full)
    refused(in_process("train.py --smoke", tmp_path),
            "the GPU's memory is full: add --lift-chunk 1")


@pytest.mark.parametrize("is_able", [True, False])
def test_cards_that_only_emulate_bfloat16_compute_in_float32(monkeypatch, is_able):
    def is_bf16_supported(including_emulation=True):
        return is_able or including_emulation
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    assert train.computes_bfloat16("cuda") == is_able
    assert not train.computes_bfloat16("cpu")

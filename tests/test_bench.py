"""evaluate.py --bench: parts of a time add up, and every row and column is there, on networks of a few hundred weights."""
import json
import types

import pytest
from conftest import in_process, refused
from test_fpd import System

import train


def test_stopwatch_gives_the_median_round_without_warm_up_and_end(monkeypatch):
    clock = iter((0, 1, 100, 101, 111, 113, 116, 117, 1000))           # rounds: 1 + 99, 1 + 10, 2 + 3, 1 + 883
    monkeypatch.setattr(train, "time", types.SimpleNamespace(perf_counter=lambda: next(clock)))
    watch = train.Stopwatch("cpu", "a")
    for part in "ababababa":                                           # the last round never ends
        watch.mark(part)
    assert watch.milliseconds(warm_up=1) == dict(a=1000, b=10_000, total=11_000)


def test_bench_prints_and_keeps_every_row(tmp_path, monkeypatch):
    system = System(dataset="imagenet", smoke=True)
    run = types.SimpleNamespace(cfg=system.cfg, names=["a", "b", "c"], text=None, tokenizer=system.vq, phi=system.phi,
                                teacher=system.teacher, student=system.student)
    monkeypatch.setattr(sample, "load_models", lambda *args, **kwargs: run)
    done = in_process("evaluate.py --bench --run . --batch 3", tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    content = json.loads((tmp_path / "bench.json").read_text())
    models = [("teacher", steps) for steps in (16, 8, 4, 1)] + [("student", 1)]
    assert [(row["model"], row["steps"], row["batch"]) for row in content["sampling"]] == [(*model, n) for model in models for n in (1, 3)]
    for row in content["sampling"]:
        assert 0 < row["transformer"] < row["ms_per_image"] and row["images_per_second"] * row["ms_per_image"] == pytest.approx(1000)
    steps, forward = {row.pop("method"): row for row in content["training"]}, {"condition", "student", "refinement"}
    assert {name: set(row) - forward for name, row in steps.items()} == {
        "FPD": {"decode", "lift", "drift", "backward", "update", "total", "peak_gb"},
        "FPD + GAN": {"decode", "lift", "drift", "gan", "backward", "update", "total", "peak_gb"},
        "Di[M]O": {"auxiliary", "backward", "update", "total", "peak_gb"}}
    assert all(row["peak_gb"] > 0 and row["total"] > max(row[part] for part in forward) > 0 for row in steps.values())
    assert "Di[M]O" in done.stdout and "teacher" in done.stdout
    assert not system.teacher._forward_pre_hooks and {path.name for path in tmp_path.iterdir()} == {"bench.json"}
    refused(in_process("evaluate.py --bench --batch 0", tmp_path), "--batch")

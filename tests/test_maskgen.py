"""MaskGen, its sampler and the CLIP text tower: equal to recorded outputs of the official code
(golden/), one condition tensor for all."""
import re

import numpy as np
import pytest
import torch
from conftest import load_case
from safetensors.torch import save_file

import fpd
import models

SCHEDULES = load_case("maskgen_vq", "schedules").info
TINY = dict(K=40, L=16, width=64, depth=3, heads=4, text_width=24, T=7, score_width=16,
            unused_rows=11)


def text(x, prefix=""):
    """The condition tensor of a case: row 0 pooled, then the states. -> c (B, 1 + T, W)"""
    pooled, states = x[f"{prefix}condition_pooled"], x[f"{prefix}condition"]
    return torch.from_numpy(np.concatenate([pooled, states], 1))


def load_case_maskgen(name):
    """-> case, MaskGen with its weights. The sampler traces use the network of `tiny`."""
    case = load_case("maskgen_vq", name)
    filled = case if "tied" in case.info else load_case("maskgen_vq", "tiny")
    # the released sizes are the loader's own
    sizes = {} if name == "full_L" else TINY
    if name == "tiny_no_micro_condition":
        sizes = TINY | dict(depth=2, heads=8, T=5, score_width=0)
    return case, models.load_maskgen(filled.weights(), **sizes)


def tiny():
    """-> MaskGen of `tiny` with an empty caption that is not zero, c (2, 8, 24)."""
    case, model = load_case_maskgen("sampler_trace")
    model.empty.copy_(text(case.inputs, "null_")[0])
    return model, text(case.inputs)


# ---------------------------------------------------------------- the network
@pytest.mark.parametrize("name", ["tiny", "tiny_no_micro_condition",
                                  pytest.param("full_L", marks=pytest.mark.slow)])
@torch.no_grad()
def test_maskgen_equals_the_official_network(name, monkeypatch):
    """Tolerance 2e-5: exact GELU instead of its tanh form changes the logits of `tiny` by 9e-4,
    epsilon 1e-5 by 1e-3, float64 by 8e-6.

    The encoding of the score is compared by itself, and the network then reads the recorded one:
    the last bit of exp is another on each processor, and what becomes of it (1.5e-5 in the
    encoding) grows to 3.5e-5 in the logits.
    """
    case, model = load_case_maskgen(name)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert sum(p.numel() for p in model.parameters()) == case.info["param_count"]
    official_score = case.info["config"]["model"]["maskgen"]["sample_aesthetic_score"]
    assert models.AESTHETIC_SCORE == official_score
    if model.score_width:
        scores = torch.from_numpy(case.inputs["aesthetic_score"])
        encoding = models.score_encoding(scores, model.score_width)
        case.check("micro_condition_encoding", encoding, atol=2e-5)

        def recorded(score, width):
            # officially one score per image, here one for all
            assert score.tolist() == [official_score] * len(scores) and width == model.score_width
            return torch.from_numpy(case.arrays["out_micro_condition_encoding"])
        monkeypatch.setattr(models, "score_encoding", recorded)
    z = torch.from_numpy(case.inputs["tokens"].astype(np.int64))
    case.check("logits", model(z, text(case.inputs)), atol=2e-5)


@torch.no_grad()
def test_drop_puts_the_empty_caption_in_place_of_the_text():
    """Rows behind the text, CLIP's states for TA-TiTok, change nothing."""
    model, c = tiny()
    z = torch.full((2, 16), model.K)
    dropped = model(z, c, torch.tensor([False, True]))
    assert torch.allclose(dropped[0], model(z, c)[0], atol=1e-5)
    assert torch.allclose(dropped[1], model(z, model.empty.expand_as(c))[1], atol=1e-5)
    assert (dropped[1] - model(z, c)[1]).abs().max() > 0.1
    assert torch.equal(model(z, torch.cat([c, torch.randn(2, 5, 24)], 1)), model(z, c))


# ---------------------------------------------------------------- the sampler
@pytest.mark.parametrize("name", ["sampler_trace", "sampler_trace_linear"])
def test_sampler_repeats_the_official_trace(name, monkeypatch):
    """Step by step: the network's input and its answers; and the codes in the end. The official
    guidance is our s - 1."""
    case, model = load_case_maskgen(name)
    x, how, seen = case.inputs, case.info["config"]["generate"], []
    model.empty.copy_(text(x, "null_")[0])
    model.register_forward_hook(lambda model, z, logits: seen.append((z[0][:2].clone(), logits)))
    seed = int(re.search(r"RandomState\((\d+)\)", case.info["note"])[1])
    stream = np.random.RandomState(seed)

    def uniform(shape, generator, device):
        return torch.from_numpy(stream.random_sample(shape).astype(np.float32))
    monkeypatch.setattr(fpd, "uniform", uniform)
    z = fpd.sample_maskgen(model, text(x), how["num_sample_steps"], None,
                           s=1 + how["guidance_scale"], noise=how["randomize_temperature"],
                           ramp=how.get("guidance_decay", "cosine"))
    case.check("ids_before", torch.stack([ids for ids, _ in seen]).to(torch.int16))
    case.check("raw_logits", torch.stack([logits for _, logits in seen]), atol=2e-5)
    case.check("final_ids", z.to(torch.int16))
    masked = [(ids == model.K).sum(1).tolist() for ids, _ in seen]
    assert masked == case.info["masked_before_each_step"]


def test_remask_counts_equal_the_official_schedule():
    """The official table says 1 for the last step, after which everything is kept. With as many
    steps as tokens, every step reveals one."""
    for key, official in SCHEDULES["masked_after_step"].items():
        schedule, steps = key.split("/")
        if schedule == "arccos":
            assert fpd.remask_counts(128, int(steps)) == official[:-1] + [0], key
    assert fpd.remask_counts(16, 16) == list(range(16))[::-1]


@pytest.mark.parametrize("s, ramp, weights", [
    (13.0, "cosine", [1 + g for g in SCHEDULES["cfg_scale_g12"]["cosine/16"]]),
    (13.0, "linear", [1 + g for g in SCHEDULES["cfg_scale_g12"]["linear/4"]]),
    (1.5, "cosine", [1.5] * 4), (1.0, "cosine", [1.0] * 4)])
def test_guidance_ramps_up(s, ramp, weights, monkeypatch):
    """s = 1 is no guidance here as everywhere in this project, hence no ramp from 2."""
    model, c = tiny()
    seen, guided_logits = [], fpd.guided_logits

    def spy(model, z, c, s):
        seen.append(s)
        return guided_logits(model, z, c, s)
    monkeypatch.setattr(fpd, "guided_logits", spy)
    fpd.sample_maskgen(model, c, len(weights), torch.Generator().manual_seed(0), s=s, ramp=ramp)
    np.testing.assert_allclose(seen, weights, atol=1e-5)


# ---------------------------------------------------------------- files of MaskGen
@pytest.mark.parametrize("left_out", ["lm_head.weight", "embeddings.weight", None])
def test_the_token_table_has_either_name(tmp_path, left_out):
    """It is also the output layer; a safetensors file may hold just one name, a torch file holds
    both."""
    state = load_case("maskgen_vq", "tiny").weights()
    table = state["embeddings.weight"]
    state.pop(left_out, None)
    if left_out:
        save_file(state, tmp_path / "model.safetensors")
    else:
        torch.save(state, tmp_path / "maskgen_vq_l.bin")
    model = models.load_maskgen(next(tmp_path.iterdir()), **TINY)
    assert torch.equal(model.embeddings.weight, table)
    # not left as whatever the memory held
    assert torch.equal(model.empty, torch.zeros(8, 24))


# ---------------------------------------------------------------- the text encoder
def test_text_tower_equals_the_official_one(monkeypatch):
    """Tolerance 5e-5: exact GELU changes the states by 0.04 to 0.14, float32 against float64 by
    1e-5."""
    # random weights, which are replaced at once, take a second
    monkeypatch.setattr(torch.Tensor, "normal_", lambda x, *args, **kwargs: x)
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda x, *args, **kwargs: x)
    case = load_case("open_clip_text", "text_tower_quickgelu")
    gelu = load_case("open_clip_text", "text_tower_gelu")
    # the file holds the whole CLIP, the other tower, too
    clip = models.load_text_encoder(case.weights() | {"visual.proj": torch.zeros(1)})
    ids = torch.from_numpy(case.inputs["token_ids"].astype(np.int64))
    assert torch.equal(clip.tokenizer(case.info["config"]["prompts"]), ids)
    c = clip.states(ids)
    assert c.shape == (3, 155, 768) and c.dtype == torch.float32
    parts = {"pooled": c[:, :1], "penultimate": c[:, 1:78], "text_guidance": c[:, 78:]}
    for name, part in parts.items():
        case.check(name, part, atol=5e-5)
        with pytest.raises(AssertionError):
            gelu.check(name, part, atol=1e-2)
    assert not clip.training and not any(p.requires_grad for p in clip.parameters())


def test_a_caption_does_not_depend_on_its_batch_and_is_cut_behind_75_tokens():
    encoder = models.TextEncoder(width=16, depth=2, heads=2)
    fits = " ".join(["word"] * 75)
    c = encoder.encode(["a red circle", "", fits, f"{fits} and a tail"])
    assert c.shape == (4, 155, 16) and not c.requires_grad
    assert torch.allclose(encoder.encode([""])[0], c[1], atol=1e-4)
    assert torch.equal(c[2], c[3]) and (c[0] - c[1]).abs().max() > 0.1


def test_towers_without_quickgelu_are_refused(monkeypatch):
    """Some releases of open_clip build GELU, and only warn. Every text would be slightly wrong."""
    tower = type(models.TextEncoder(width=16, depth=1, heads=1).tower)
    monkeypatch.setattr("open_clip.transformer.TextTransformer",
                        lambda act_layer, **sizes: tower(act_layer=torch.nn.GELU, **sizes))
    with pytest.raises(ValueError, match="QuickGELU"):
        models.TextEncoder(width=16, depth=1, heads=1)

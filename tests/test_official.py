"""The public generators, tokenizers, text encoder and samplers equal recorded outputs of the
official code (golden/)."""
import re

import numpy as np
import pytest
import torch
from conftest import TINY_BACKBONE, check_frozen, gen, load_case, official

import fpd
import models

MASKGIT_SCHEDULES = load_case("maskgit_transformer", "schedules").info
MASKGEN_SCHEDULES = load_case("maskgen_vq", "schedules").info


def full(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.fixture
def guided(monkeypatch):
    """Tokens, guidance and guided logits of each step of a sampler, in a list."""
    seen, guided_logits = [], fpd.guided_logits

    def spy(model, z, c, s):
        seen.append((z.clone(), s, guided_logits(model, z, c, s)))
        return seen[-1][2]
    monkeypatch.setattr(fpd, "guided_logits", spy)
    return seen


# ---------------------------------------------------------------- tokenizers
@pytest.mark.parametrize("component, name", [
    ("taming_vqgan", "tiny"), full("taming_vqgan", "full_f16_1024"),
    ("tatitok_vq", "tiny"), full("tatitok_vq", "full_bl128")])
@torch.no_grad()
def test_tokenizer_equals_the_official_network(component, name):
    """Tolerance 5e-5: a wrong epsilon changes the VQGAN's image by 2e-4, a wrong epsilon or GELU
    that of TA-TiTok by 7e-4. Every nearest code must be the same."""
    case, model = official(component, name)
    x, shapes = case.tensors, {key: out["shape"] for key, out in case.info["outputs"].items()}
    images, codes, text = x["image"], x.get("codes", x.get("tokens")).flatten(1), ()
    if component == "tatitok_vq":
        # Its images are in [0, 1] officially.
        images, text = 2 * images - 1, (x["text_guidance"],)
    e = model.embed(images)                                            # (B, L, d)
    case.check("z", e.transpose(1, 2).reshape(shapes["z"]), atol=5e-5)
    z = model.nearest(e)
    case.check("indices", z.view(shapes["indices"]).to(torch.int16))
    # At the full size, encoding once more would take seconds.
    assert name != "tiny" or torch.equal(model.encode(images), z)
    decoded = model.decode(model.E[codes], *text)
    case.check("decoded", (decoded + 1) / 2 if text else decoded, atol=5e-5)
    if "reconstruction" in shapes:
        case.check("reconstruction", model.decode(model.E[z]), atol=5e-5)


def test_tatitok_decodes_the_last_rows_of_the_condition_and_passes_gradients_to_every_token():
    """MaskGen's states come before the decoder's text, all in one tensor."""
    case, model = official("tatitok_vq", "tiny")
    e, text = model.E[case.tensors["tokens"]].requires_grad_(), case.tensors["text_guidance"]
    y = model.decode(e, text)
    assert torch.equal(model.decode(e, torch.cat([torch.randn(3, 8, 20), text], 1)), y)
    # The order of the rows counts.
    assert (model.decode(e, text.roll(1, 1)) - y).abs().amax((1, 2, 3)).min() > 0.01
    y.square().mean().backward()
    assert e.grad.isfinite().all() and e.grad.abs().amax(-1).min() > 0
    assert all(p.grad is None for p in model.parameters())


# ---------------------------------------------------------------- MaskGIT
def answer_mask_too(model):
    """Make a MaskGIT also return the logit of "mask", (B, L, K + 1), as the official network does,
    whose sampler's traces were drawn over it."""
    states = []
    model.last_layer.register_forward_hook(lambda layer, args, x: states.append(x))

    def append_column(model, args, logits):
        column = states.pop() @ model.tok_emb.weight[model.K] + model.bias[:model.L, model.K]
        return torch.cat([logits, column[..., None]], -1)
    model.register_forward_hook(append_column)


@pytest.mark.parametrize("name", ["tiny", full("full256")])
@torch.no_grad()
def test_maskgit_equals_the_official_network(name):
    """Tolerance 5e-5: a wrong LayerNorm epsilon or GELU changes the logits by 5e-4, float32 against
    float64 by 3e-6."""
    case, model = official("maskgit_transformer", name)
    x = case.tensors
    z, labels, drop = x["tokens"].flatten(1), x["labels"], x["drop_label"].bool()
    answer_mask_too(model)
    # One pass computes both outputs, and the images that they share only once.
    logits = model(torch.cat([z, z[drop]]), torch.cat([labels, labels[drop]]),
                   torch.cat([drop & False, drop[drop]]))
    cond, dropped = logits.split([len(z), int(drop.sum())])
    case.check("logits_cond", cond, atol=5e-5)
    case.check("logits_drop", cond.masked_scatter(drop[:, None, None], dropped), atol=5e-5)


@pytest.mark.parametrize("name", ["sampler_trace", "sampler_trace_hot"])
def test_sampler_repeats_the_official_trace_of_maskgit(name, guided, monkeypatch):
    """Each step's input and guided logits are compared, and the final codes. The official w is our
    s - 1, and sm_temp multiplies."""
    case, model = official("maskgit_transformer", name)
    answer_mask_too(model)
    x, config = case.tensors, case.info["config"]
    B, steps = len(x["labels"]), config["step"]
    recorded_tokens, recorded_gumbel = iter(x["sampled_tokens"]), iter(x["gumbel"])
    monkeypatch.setattr(fpd, "draw", lambda *_: next(recorded_tokens))
    monkeypatch.setattr(fpd, "gumbel", lambda *_: next(recorded_gumbel))
    codes = fpd.sample_maskgit(model, x["labels"], steps, None, s=1 + config["w"],
                               temperature=1 / config["sm_temp"],
                               noise=config["r_temp"]).clamp(max=model.K - 1)
    before, _, logits = zip(*guided, strict=True)
    case.check("codes_before", torch.stack(before).view(steps, B, 4, 4).to(torch.int16))
    case.check("guided_logits", torch.stack(logits), atol=5e-5)
    case.check("final_codes", codes.view(B, 4, 4).to(torch.int16))
    assert fpd.reveal_counts(16, steps) == case.info["token_counts"]


def test_reveal_counts_equal_the_official_schedule_of_maskgit():
    for key, recorded in MASKGIT_SCHEDULES["adap_sche"].items():
        side, mode, steps = key.split("/")
        L, steps = int(side) ** 2, int(steps)
        if steps > L or mode != "arccos":
            continue
        counts = fpd.reveal_counts(L, steps)
        assert len(counts) == steps and sum(counts) == L and min(counts) >= 0, key
        if steps == 1:
            # The official table has NaN there.
            assert counts == [L], key
        elif recorded[-1] >= 0:
            assert counts == recorded, key
        else:
            # The table asks for too many; the official sampler fixes what is left and stops.
            left = L
            for ours, theirs in zip(counts, recorded, strict=True):
                assert ours == max(0, min(theirs, left)), key
                left -= ours


def test_the_training_mask_equals_that_of_maskgit():
    """Ratios and counts, in the mode in which the teacher was trained."""
    cases = MASKGIT_SCHEDULES["get_mask_code"]["cases"]
    case, = (case for case in cases if case["mode"] == "arccos")
    ratio = fpd.gamma(torch.tensor(case["r"]))
    np.testing.assert_allclose(ratio, case["val_to_mask"], atol=1e-6)
    _, is_masked = fpd.remask(torch.zeros(len(ratio), 256, dtype=torch.long), ratio, 1024, gen())
    assert is_masked.sum(1).tolist() == case["num_masked"]


# ---------------------------------------------------------------- MaskGen
def text(case, prefix=""):
    """The condition tensor of a case: the pooled row, then the states. -> c (B, 1 + T, W)"""
    return torch.cat([case.tensors[prefix + key] for key in ("condition_pooled", "condition")], 1)


def captioned():
    """-> MaskGen of `tiny` with an empty caption that is not zero, c (2, 8, 24)."""
    case, model = official("maskgen_vq", "sampler_trace")
    model.empty.copy_(text(case, "null_")[0])
    return model, text(case)


@pytest.mark.parametrize("name, sizes", [
    ("tiny", {}), ("tiny_no_micro_condition", dict(depth=2, heads=8, T=5, score_width=0)),
    full("full_L", {})])
@torch.no_grad()
def test_maskgen_equals_the_official_network(name, sizes, monkeypatch):
    """Tolerance 2e-5: exact GELU in place of its tanh form changes the logits of `tiny` by 9e-4,
    epsilon 1e-5 by 1e-3, float64 by 8e-6.

    The encoding of the score is compared by itself, and the network then reads the recorded one:
    the last bit of exp differs between processors, and the 1.5e-5 that it makes in the encoding
    would grow to 3.5e-5 in the logits.
    """
    case, model = official("maskgen_vq", name, **sizes)
    official_score = case.info["config"]["model"]["maskgen"]["sample_aesthetic_score"]
    assert models.AESTHETIC_SCORE == official_score
    if model.score_width:
        scores = case.tensors["aesthetic_score"]
        encoding = models.score_encoding(scores, model.score_width)
        case.check("micro_condition_encoding", encoding, atol=2e-5)

        def recorded(score, width):
            # Officially each image has its score; here all images have the same.
            assert score.tolist() == [official_score] * len(scores) and width == model.score_width
            return torch.from_numpy(case.arrays["out_micro_condition_encoding"])
        monkeypatch.setattr(models, "score_encoding", recorded)
    case.check("logits", model(case.tensors["tokens"], text(case)), atol=2e-5)


@torch.no_grad()
def test_drop_puts_the_empty_caption_in_place_of_the_text():
    """The rows behind the text, CLIP's states for TA-TiTok, change nothing."""
    model, c = captioned()
    z = torch.full((2, 16), model.K)
    dropped = model(z, c, torch.tensor([False, True]))
    assert torch.allclose(dropped[0], model(z, c)[0], atol=1e-5)
    assert torch.allclose(dropped[1], model(z, model.empty.expand_as(c))[1], atol=1e-5)
    assert (dropped[1] - model(z, c)[1]).abs().max() > 0.1
    assert torch.equal(model(z, torch.cat([c, torch.randn(2, 5, 24)], 1)), model(z, c))


@pytest.mark.parametrize("name", ["sampler_trace", "sampler_trace_linear"])
def test_sampler_repeats_the_official_trace_of_maskgen(name, monkeypatch):
    """Each step's input and answers are compared, and the final codes. The official guidance is our
    s - 1. Its linear ramp is not ours, so the test puts that guidance in place of our own."""
    case, model = official("maskgen_vq", name)
    how, seen, guided_logits = case.info["config"]["generate"], [], fpd.guided_logits
    model.empty.copy_(text(case, "null_")[0])
    model.register_forward_hook(lambda model, z, logits: seen.append((z[0][:2].clone(), logits)))
    seed = int(re.search(r"RandomState\((\d+)\)", case.info["note"])[1])
    stream = np.random.RandomState(seed)
    steps, guidance = how["num_sample_steps"], how["guidance_scale"]

    def uniform(shape, generator, device):
        return torch.from_numpy(stream.random_sample(shape).astype(np.float32))

    def with_a_linear_ramp(model, z, c, s):
        return guided_logits(model, z, c, 2 + (guidance - 1) * (len(seen) + 1) / steps)
    monkeypatch.setattr(fpd, "uniform", uniform)
    if how.get("guidance_decay") == "linear":
        monkeypatch.setattr(fpd, "guided_logits", with_a_linear_ramp)
    z = fpd.sample_maskgen(model, text(case), steps, None, s=1 + guidance,
                           noise=how["randomize_temperature"])
    case.check("ids_before", torch.stack([ids for ids, _ in seen]).to(torch.int16))
    case.check("raw_logits", torch.stack([logits for _, logits in seen]), atol=2e-5)
    case.check("final_ids", z.to(torch.int16))
    masked = [(ids == model.K).sum(1).tolist() for ids, _ in seen]
    assert masked == case.info["masked_before_each_step"]


def test_remask_counts_equal_the_official_schedule_of_maskgen():
    """The official table says 1 for the last step, after which everything is kept. With as many
    steps as tokens, every step reveals one."""
    for key, recorded in MASKGEN_SCHEDULES["masked_after_step"].items():
        schedule, steps = key.split("/")
        if schedule == "arccos":
            assert fpd.remask_counts(128, int(steps)) == recorded[:-1] + [0], key
    assert fpd.remask_counts(16, 16) == list(range(16))[::-1]


@pytest.mark.parametrize("s, weights", [
    (13.0, [1 + g for g in MASKGEN_SCHEDULES["cfg_scale_g12"]["cosine/16"]]),
    (1.5, [1.5] * 4), (1.0, [1.0] * 4)])
def test_the_guidance_of_maskgen_ramps_up(s, weights, guided):
    """s = 1 is no guidance here, as everywhere in this project, so its ramp does not begin at 2."""
    model, c = captioned()
    fpd.sample_maskgen(model, c, len(weights), gen(), s=s)
    np.testing.assert_allclose([s for _, s, _ in guided], weights, atol=1e-5)


# ---------------------------------------------------------------- CLIP's text tower
def test_text_tower_equals_the_official_one(monkeypatch):
    """Tolerance 5e-5: exact GELU changes the states by 0.04 to 0.14, float32 against float64 by
    1e-5."""
    # Drawing random weights, which are replaced at once, would take a second.
    monkeypatch.setattr(torch.Tensor, "normal_", lambda x, *args, **kwargs: x)
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda x, *args, **kwargs: x)
    case = load_case("open_clip_text", "text_tower_quickgelu")
    gelu = load_case("open_clip_text", "text_tower_gelu")
    # The file holds the whole of CLIP, so the tower of images too.
    clip = models.load_text_encoder(case.weights() | {"visual.proj": torch.zeros(1)})
    ids = case.tensors["token_ids"]
    assert torch.equal(check_frozen(clip).tokenizer(case.info["config"]["prompts"]), ids)
    c = clip.states(ids)
    assert c.shape == (3, 155, 768) and c.dtype == torch.float32
    parts = {"pooled": c[:, :1], "penultimate": c[:, 1:78], "text_guidance": c[:, 78:]}
    for name, part in parts.items():
        case.check(name, part, atol=5e-5)
        with pytest.raises(AssertionError):
            gelu.check(name, part, atol=1e-2)


# ---------------------------------------------------------------- the backbone Phi
@pytest.mark.parametrize("name, blocks", [(TINY_BACKBONE, (2, 5, 8, 11)),
                                          ("test_vit", (0, 2, 3, 5))])
def test_backbone_maps_are_raw_block_outputs(name, blocks):
    """They equal those of a plain forward pass, without special tokens and final norm, and pass
    gradients to the images."""
    backbone = models.Backbone(name, 64).eval()
    images = (2 * torch.rand(1, 3, 64, 64, generator=gen()) - 1).requires_grad_()
    maps, outputs = backbone.maps(images, blocks), []
    assert [tuple(m.shape) for m in maps] == [(1, backbone.net.embed_dim, 4, 4)] * 4
    for i in blocks:
        backbone.net.blocks[i].register_forward_hook(lambda block, x, y: outputs.append(y))
    config = backbone.net.pretrained_cfg
    mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        backbone.net((images * 0.5 + 0.5 - mean) / std)
    for m, y in zip(maps, outputs, strict=True):
        patches = y[:, backbone.net.num_prefix_tokens:]
        torch.testing.assert_close(m.flatten(2).transpose(1, 2), patches, atol=1e-5, rtol=1e-5)
    sum(m.square().mean() for m in maps).backward()
    assert images.grad.abs().sum() > 0

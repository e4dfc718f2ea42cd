"""MaskGen, its sampler and the CLIP text tower: equal to recorded outputs of the official code
(golden/), one condition tensor for all."""
import gc
import re

import numpy as np
import pytest
import torch
from conftest import golden_fill, load_case
from safetensors.torch import save_file

import fpd
import models
import sample

SCHEDULES = load_case("maskgen_vq", "schedules").info


def text(x, prefix=""):
    """The condition tensor of a case: row 0 pooled, then the states. -> c (B, 1 + T, W)"""
    pooled, states = x[f"{prefix}condition_pooled"], x[f"{prefix}condition"]
    return torch.from_numpy(np.concatenate([pooled, states], 1))


def load_case_maskgen(name):
    """-> case, MaskGen with its weights. The sampler traces use the network of `tiny`."""
    case = load_case("maskgen_vq", name)
    config = case.info["config"]["model"]["maskgen"]
    filled = case if "tied" in case.info else load_case("maskgen_vq", "tiny")
    T = case.inputs["condition"].shape[1]
    return case, models.load_maskgen(filled.weights(), config["decoder_num_heads"],
                                     config["condition_num_classes"], T)


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
    # full_L: 2.4 GB of weights, twice while they are loaded
    gc.collect()
    case, model = load_case_maskgen(name)
    config = case.info["config"]["model"]
    sizes = config["vq_model"]
    assert (model.K, model.L) == (sizes["codebook_size"], sizes["num_latent_tokens"])
    assert not model.training
    assert sum(p.numel() for p in model.parameters()) == case.info["param_count"]
    scores = torch.from_numpy(case.inputs["aesthetic_score"])
    if config["maskgen"]["micro_condition"]:
        encoding = models.score_encoding(scores, model.score_width)
        case.check("micro_condition_encoding", encoding, atol=2e-5)
        recorded = torch.from_numpy(case.arrays["out_micro_condition_encoding"])
        monkeypatch.setattr(models, "score_encoding",
                            lambda score, width: recorded[scores == score])
    else:
        assert model.score_width == 0
    z, c = torch.from_numpy(case.inputs["tokens"].astype(np.int64)), text(case.inputs)
    logits = []
    # officially one score per image, here one for all
    for i, score in enumerate(scores):
        model.aesthetic_score = score
        logits.append(model(z[i:i + 1], c[i:i + 1]))
    case.check("logits", torch.cat(logits), atol=2e-5)
    del model
    gc.collect()


@torch.no_grad()
def test_drop_puts_the_empty_caption_in_place_of_the_text():
    model, c = tiny()
    z = torch.full((2, 16), model.K)
    dropped = model(z, c, torch.tensor([False, True]))
    assert torch.allclose(dropped[0], model(z, c)[0], atol=1e-5)
    assert torch.allclose(dropped[1], model(z, model.empty.expand_as(c))[1], atol=1e-5)
    assert (dropped[1] - model(z, c)[1]).abs().max() > 0.1


@torch.no_grad()
def test_a_guided_pass_equals_two_passes():
    """The same function serves MaskGIT with labels."""
    model, c = tiny()
    z = torch.randint(0, model.K + 1, (2, 16), generator=torch.Generator().manual_seed(0))
    cond, uncond = model(z, c), model(z, c, torch.ones(2, dtype=torch.bool))
    guided = fpd.guided_logits(model, z, c, 3.0)
    assert torch.allclose(guided, uncond + 3 * (cond - uncond), atol=1e-4)
    assert torch.equal(fpd.guided_logits(model, z, c, 1), cond)


@torch.no_grad()
def test_rows_behind_the_text_are_not_looked_at():
    """CLIP's c also holds the states that guide TA-TiTok."""
    model, c = tiny()
    z = torch.full((2, 16), model.K)
    assert torch.equal(model(z, torch.cat([c, torch.randn(2, 5, 24)], 1)), model(z, c))
    for wrong in (c[:, :7], c[..., :20], c[:, 0]):
        with pytest.raises(ValueError, match=r"text of shape \(B, 8 or more, 24\), got"):
            model(z, wrong)
    with pytest.raises(ValueError, match="made for 16 tokens, got 15"):
        model(z[:, :15], c)


def test_a_small_maskgen_has_the_official_names():
    case = load_case("maskgen_vq", "tiny")
    model = models.MaskGen(40, 16, 64, 3, 4, text_width=24, T=7, score_width=16, unused_rows=11)
    shapes = {key: list(value.shape) for key, value in model.state_dict().items()}
    official = dict(case.info["manifest"])
    del official["lm_head.weight"]
    assert shapes == official
    # codes and mask, nothing else
    assert models.MaskGen().embeddings.weight.shape == (129, 128)


def test_a_small_maskgen_learns_to_obey_its_text():
    """Its blocks begin as the identity, so that nothing of the text reaches the logits at first."""
    torch.manual_seed(0)
    model = models.MaskGen(K=8, L=4, width=32, depth=2, heads=2, text_width=6, T=2)
    c, z = torch.randn(2, 3, 6), torch.full((2, 4), model.K)
    # the same pooled vector: the difference is in the states
    c[1, 0] = c[0, 0]
    answers = torch.tensor([[0, 1, 2, 3], [4, 5, 6, 7]])
    first = model(z, c)
    assert torch.equal(first[0], first[1])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        loss = torch.nn.functional.cross_entropy(model(z, c).transpose(1, 2), answers)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1 and torch.equal(model(z, c).argmax(-1), answers)


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


@pytest.mark.parametrize("key", [key for key in SCHEDULES["masked_after_step"]
                                 if key.startswith("arccos")])
def test_remask_counts_equal_the_official_schedule(key):
    """The official table says 1 for the last step, after which everything is kept."""
    expected = SCHEDULES["masked_after_step"][key][:-1] + [0]
    assert fpd.remask_counts(128, int(key.split("/")[1])) == expected


@pytest.mark.parametrize("steps", [1, 2, 15, 16])
def test_every_step_reveals_something(steps):
    counts = [16] + fpd.remask_counts(16, steps)
    assert len(counts) == steps + 1 and counts[-1] == 0
    assert all(a > b for a, b in zip(counts, counts[1:]))


@pytest.mark.parametrize("arguments, words", [
    (dict(steps=0), "between 1 and the 16 tokens.*got 0"),
    (dict(steps=17), "got 17"),
    (dict(steps=4, ramp="steep"), "unknown ramp 'steep'; there are cosine, linear")])
def test_sampler_refuses(arguments, words):
    model, c = tiny()
    with pytest.raises(ValueError, match=words):
        fpd.sample_maskgen(model, c, generator=torch.Generator(), **arguments)


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


@pytest.mark.parametrize("steps", [1, 6, 16])
def test_an_image_does_not_depend_on_its_batch(steps):
    model, c = tiny()
    c = torch.cat([c, c.flip(0)])
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6, 7, 8)]
    z = fpd.sample_maskgen(model, c, steps, generators, s=4.0)
    assert z.shape == (4, 16) and z.min() >= 0 and z.max() < model.K
    for i, seed in enumerate((5, 6, 7, 8)):
        generators = [torch.Generator().manual_seed(seed)]
        alone = fpd.sample_maskgen(model, c[i:i + 1], steps, generators, s=4.0)
        assert torch.equal(alone[0], z[i])


# ---------------------------------------------------------------- files of MaskGen
def one_line(error):
    assert "\n" not in str(error.value) and len(str(error.value)) < 500, str(error.value)


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
    model = models.load_maskgen(next(tmp_path.iterdir()), 4, 10, T=7)
    assert torch.equal(model.embeddings.weight, table)
    # not left as whatever the memory held
    assert torch.equal(model.empty, torch.zeros(8, 24))


@pytest.mark.parametrize("fault, words", [
    ("missing key", "key blocks.1.attn.to_q.bias is missing$"),
    ("unknown key", "surprise is unknown$"),
    ("shape", r"\(5, 64\) instead of \(64, 64\)$"),
    ("two tables", "lm_head.weight is not embeddings.weight"),
    ("no table", "embeddings.weight is missing"),
    ("nan", "not finite"),
    ("another network", "embeddings.weight is missing"),
    ("heads", "5 heads do not divide the width 64.* 16"),
    ("classes", "52 rows"),
    ("wide text", "cond_pooled_proj.weight has shape")])
def test_wrong_maskgen_files(fault, words):
    state = load_case("maskgen_vq", "tiny").weights()
    if fault == "missing key":
        del state["blocks.1.attn.to_q.bias"]
    elif fault == "unknown key":
        state["surprise"] = torch.zeros(1)
    elif fault == "shape":
        state["blocks.1.attn.to_k.weight"] = state["blocks.1.attn.to_k.weight"][:5]
    elif fault == "two tables":
        state["lm_head.weight"] = state["lm_head.weight"] + 1
    elif fault == "no table":
        del state["lm_head.weight"], state["embeddings.weight"]
    elif fault == "nan":
        state["norm.linear.bias"][3] = float("nan")
    elif fault == "another network":
        state = golden_fill({"conv.weight": [3, 3, 3, 3], "conv.bias": [3]})
    elif fault == "wide text":
        state["text_embed_proj.weight"] = torch.zeros(64, 50)
    heads = 5 if fault == "heads" else 4
    classes = 50 if fault == "classes" else 10
    with pytest.raises(ValueError, match=words) as error:
        models.load_maskgen(state, heads, classes, T=7)
    one_line(error)


# ---------------------------------------------------------------- the text encoder
@pytest.fixture(scope="module")
def clip():
    """CLIP's text tower with the weights of the recorded case."""
    weights = load_case("open_clip_text", "text_tower_quickgelu").weights()
    # the whole CLIP has the other tower's keys, too
    return models.load_text_encoder(weights | {"visual.proj": torch.zeros(1)})


def test_text_tower_equals_the_official_one(clip):
    """Tolerance 5e-5: exact GELU changes the states by 0.04 to 0.14, float32 against float64 by
    1e-5."""
    case = load_case("open_clip_text", "text_tower_quickgelu")
    gelu = load_case("open_clip_text", "text_tower_gelu")
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


def test_encode(clip):
    c = clip.encode(["a red circle", ""])
    assert c.shape == (2, 155, 768) and not c.requires_grad
    # a caption does not depend on its batch
    assert torch.allclose(clip.encode([""])[0], c[1], atol=1e-4)
    for wrong in ([], "a red circle", ["a", 3]):
        with pytest.raises(ValueError, match="a list of one text or more") as error:
            clip.encode(wrong)
        one_line(error)


def test_long_captions_are_reported():
    """75 tokens fit beside start and end. What is said to be cut is exactly what makes no
    difference."""
    encoder = models.TextEncoder(width=16, depth=2, heads=2)
    fits = " ".join(["word"] * 75)
    assert encoder.cut_captions([fits, "", "a dog"]) == {}
    long = f"{fits} and a Café, too"
    assert encoder.cut_captions(["a dog", long]) == {long: "and a café , too"}
    assert torch.equal(*encoder.encode([fits, long]))
    assert encoder.encode([long]).shape == (1, 155, 16)


@pytest.mark.parametrize("fault, words", [
    ("missing key", "key ln_final.bias is missing$"),
    ("unknown key", "surprise is unknown$"),
    ("shape", r"ln_final.bias has shape \(5,\) instead of \(16,\)")])
def test_wrong_text_encoder_files(fault, words, monkeypatch):
    encoder = models.TextEncoder(width=16, depth=1, heads=1)
    # the full size takes seconds
    monkeypatch.setattr(models, "TextEncoder", lambda: encoder)
    state = encoder.tower.state_dict()
    if fault == "missing key":
        del state["ln_final.bias"]
    elif fault == "shape":
        state["ln_final.bias"] = torch.zeros(5)
    else:
        state["surprise"] = torch.zeros(1)
    with pytest.raises(ValueError, match=words) as error:
        models.load_text_encoder(state)
    one_line(error)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning",
                            "ignore:.*torch.jit:FutureWarning",
                            "ignore:.*TorchScript archive:UserWarning")
def test_a_torchscript_archive_is_named(tmp_path):
    """OpenAI's own file is one; it holds a program, which is never run."""
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "ViT-L-14-336px.pt")
    words = ("ViT-L-14-336px.pt.* is a TorchScript archive.*"
             "open_clip_model.safetensors of repository timm/")
    with pytest.raises(ValueError, match=words) as error:
        models.load_text_encoder(tmp_path / "ViT-L-14-336px.pt")
    one_line(error)


def test_where_the_text_encoder_is_looked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ("open_clip_model.safetensors of repository "
             "timm/vit_large_patch14_clip_336.openai.*--weights")
    # offline, see conftest
    with pytest.raises(ValueError, match=words) as error:
        sample.official_files("laion", False, "weights")["text"]()
    one_line(error)
    (tmp_path / "weights").mkdir()
    place = tmp_path / "weights" / "vit_large_patch14_clip_336.openai.safetensors"
    place.touch()
    assert sample.official_files("laion", False, "weights")["text"]().resolve() == place

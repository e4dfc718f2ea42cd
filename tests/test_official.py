"""The official networks of the imagenet setting: equal to recorded outputs of the official code
(golden/), and strictly read from files."""
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import golden_fill, load_case, official_files

import fpd
import models
import tokenizer

SCHEDULES = load_case("maskgit_transformer", "schedules").info
TINY_BACKBONE = "vit_tiny_patch16_dinov3_qkvb.eupe_lvd1689m"
TINY_MASKGIT = dict(K=32, L=16, num_classes=10, width=64, depth=2, heads=4, mlp=128)
TINY_VQGAN = dict(K=48, d=16, ch=32, ch_mult=(1, 2), blocks=1, attn_levels=(1,), z_channels=32,
                  image_size=32)


def tensors(case):
    """The inputs of a case, whole numbers as long."""
    found = {}
    for key, value in case.inputs.items():
        is_whole = value.dtype.kind in "iu"
        found[key] = torch.from_numpy(value.astype(np.int64) if is_whole else value)
    return found


def load_case_maskgit(name):
    """-> case, MaskGIT with its weights. The sampler traces use the network of `tiny`."""
    case = load_case("maskgit_transformer", name)
    filled = case if "manifest" in case.info else load_case("maskgit_transformer", "tiny")
    sizes = {} if name == "full256" else TINY_MASKGIT
    return case, models.load_maskgit(filled.weights(), **sizes)


def answer_mask_too(model):
    """Make a MaskGIT return the logit of "mask" as well, (B, L, K + 1): the official network does,
    and its sampler's traces were drawn over it."""
    states = []
    model.last_layer.register_forward_hook(lambda layer, args, x: states.append(x))

    def append_column(model, args, logits):
        column = states.pop() @ model.tok_emb.weight[model.K] + model.bias[:model.L, model.K]
        return torch.cat([logits, column[..., None]], -1)
    model.register_forward_hook(append_column)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return official_files(tmp_path_factory.mktemp("official"))


# ---------------------------------------------------------------- MaskGIT
@pytest.mark.parametrize("name", ["tiny", pytest.param("full256", marks=pytest.mark.slow)])
@torch.no_grad()
def test_maskgit_equals_the_official_network(name):
    """Tolerance 5e-5: a wrong LayerNorm epsilon or GELU changes the logits by 5e-4, float32 against
    float64 by 3e-6."""
    case, model = load_case_maskgit(name)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    x = tensors(case)
    z, labels, drop = x["tokens"].flatten(1), x["labels"], x["drop_label"]
    answer_mask_too(model)
    # one pass for both, over what they have in common once
    logits = model(torch.cat([z, z[drop]]), torch.cat([labels, labels[drop]]),
                   torch.cat([drop & False, drop[drop]]))
    cond, dropped = logits.split([len(z), int(drop.sum())])
    case.check("logits_cond", cond, atol=5e-5)
    case.check("logits_drop", cond.masked_scatter(drop[:, None, None], dropped), atol=5e-5)


@pytest.mark.parametrize("name", ["sampler_trace", "sampler_trace_hot"])
def test_sampler_repeats_the_official_trace(name, monkeypatch):
    """Step by step: the network's input and the guided logits; and the codes in the end. Official w
    is our s - 1, sm_temp multiplies."""
    case, model = load_case_maskgit(name)
    answer_mask_too(model)
    x, config = tensors(case), case.info["config"]
    B, steps = len(x["labels"]), config["step"]
    seen, guided_logits = [], fpd.guided_logits

    def spy(model, z, c, s):
        seen.append((z.clone(), guided_logits(model, z, c, s)))
        return seen[-1][1]
    monkeypatch.setattr(fpd, "guided_logits", spy)
    recorded_tokens, recorded_gumbel = iter(x["sampled_tokens"]), iter(x["gumbel"])
    monkeypatch.setattr(fpd, "draw", lambda *_: next(recorded_tokens))
    monkeypatch.setattr(fpd, "gumbel", lambda *_: next(recorded_gumbel))
    codes = fpd.sample_maskgit(model, x["labels"], steps, None, s=1 + config["w"],
                       temperature=1 / config["sm_temp"],
                       noise=config["r_temp"]).clamp(max=model.K - 1)
    before = torch.stack([z for z, _ in seen])
    case.check("codes_before", before.view(steps, B, 4, 4).to(torch.int16))
    case.check("guided_logits", torch.stack([logits for _, logits in seen]), atol=5e-5)
    case.check("final_codes", codes.view(B, 4, 4).to(torch.int16))
    assert fpd.reveal_counts(16, steps) == case.info["token_counts"]


def test_reveal_counts_equal_the_official_schedule():
    for key, official in SCHEDULES["adap_sche"].items():
        side, mode, steps = key.split("/")
        L, steps = int(side) ** 2, int(steps)
        if steps > L or mode != "arccos":
            continue
        counts = fpd.reveal_counts(L, steps)
        assert len(counts) == steps and sum(counts) == L and min(counts) >= 0, key
        if steps == 1:
            # the official table has NaN there
            assert counts == [L], key
        elif official[-1] >= 0:
            assert counts == official, key
        else:
            # the table overshoots; the sampler fixes what there is and stops
            left = L
            for ours, theirs in zip(counts, official, strict=True):
                assert ours == max(0, min(theirs, left)), key
                left -= ours


def test_the_training_mask_equals_the_official_one():
    """Ratios and counts, in the mode that the teacher was trained in."""
    case, = (case for case in SCHEDULES["get_mask_code"]["cases"] if case["mode"] == "arccos")
    ratio = fpd.gamma(torch.tensor(case["r"]))
    np.testing.assert_allclose(ratio, case["val_to_mask"], atol=1e-6)
    z, generator = torch.zeros(len(ratio), 256, dtype=torch.long), torch.Generator().manual_seed(0)
    _, is_masked = fpd.remask(z, ratio, 1024, generator)
    assert is_masked.sum(1).tolist() == case["num_masked"]


# ---------------------------------------------------------------- VQGAN
@pytest.mark.parametrize("name", ["tiny", pytest.param("full_f16_1024", marks=pytest.mark.slow)])
@torch.no_grad()
def test_vqgan_equals_the_official_network(name):
    """Tolerance 5e-5: a wrong epsilon in the group norms changes the image by 2e-4. Every nearest
    code must be the same."""
    case = load_case("taming_vqgan", name)
    x = tensors(case)
    model = tokenizer.load_vqgan(case.weights(), **TINY_VQGAN if name == "tiny" else {})
    assert (model.K, model.L) == (case.info["config"]["n_embed"], x["codes"][0].numel())
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    z_shape = case.info["outputs"]["z"]["shape"]
    e = model.embed(x["image"].float())                                # (B, L, d)
    case.check("z", e.transpose(1, 2).reshape(z_shape), atol=5e-5)
    z = model.nearest(e)
    case.check("indices", z.view(case.info["outputs"]["indices"]["shape"]).to(torch.int16))
    both = model.decode(model.E[torch.cat([x["codes"].flatten(1), z])])
    case.check("decoded", both[:len(z)], atol=5e-5)
    case.check("reconstruction", both[len(z):], atol=5e-5)


# ---------------------------------------------------------------- the backbone Phi
@pytest.mark.parametrize("name", [TINY_BACKBONE, "test_vit"])
def test_backbone_maps_are_raw_block_outputs(name):
    """Computed once more from a plain forward pass: four blocks, special tokens dropped, no final
    norm; gradients reach the images."""
    blocks, size = (0, 2, 3, 5) if name == "test_vit" else (2, 5, 8, 11), 64
    backbone = models.Backbone(name, size).eval()
    generator = torch.Generator().manual_seed(0)
    images = (2 * torch.rand(1, 3, size, size, generator=generator) - 1).requires_grad_()
    maps, outputs = backbone.maps(images, blocks), []
    side = size // 16
    assert [tuple(m.shape) for m in maps] == [(1, backbone.net.embed_dim, side, side)] * 4
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


def test_timm_is_imported_beside_a_torchvision_that_does_not_fit(monkeypatch):
    """Importing torchvision then ends in a RuntimeError; what it lacks is declared."""
    models.import_timm()
    declared = []

    def find_spec(name, *_):
        if name == "torchvision":
            raise RuntimeError("operator torchvision::nms does not exist")
    monkeypatch.delitem(sys.modules, "torchvision")
    monkeypatch.setattr(sys, "meta_path", [types.SimpleNamespace(find_spec=find_spec)])
    monkeypatch.setattr(torch.library, "define", lambda name, _: declared.append(name))
    assert models.import_timm().__name__ == "timm"
    assert declared == ["torchvision::nms", "torchvision::qnms"]


# ---------------------------------------------------------------- reading files
def test_official_files_load(files):
    """As they are shipped: a .pth with an optimizer, a Lightning checkpoint of classes that do not
    exist here, a .safetensors file."""
    _, expected = load_case_maskgit("tiny")
    maskgit = models.load_maskgit(files["maskgit"], **TINY_MASKGIT)
    vqgan = tokenizer.load_vqgan(files["vqgan"], **TINY_VQGAN)
    backbone = models.load_backbone(files["backbone"], 64, TINY_BACKBONE)
    for key, value in expected.state_dict().items():
        assert torch.equal(maskgit.state_dict()[key], value)
    for key, value in load_case("taming_vqgan", "tiny").weights().items():
        assert torch.equal(vqgan.state_dict()[key], value)
    for module in (maskgit, vqgan, backbone):
        assert not module.training and not any(p.requires_grad for p in module.parameters())
    assert backbone.maps(torch.zeros(1, 3, 64, 64))[0].shape == (1, 192, 4, 4)


def test_weights_with_other_keys_or_of_another_network_are_refused(files):
    """They would give wrong images, and no error. All loaders share what tells them."""
    state, own = tokenizer.read_weights(files["maskgit"]), "first_layer.2.weight"
    missing = {key: value for key, value in state.items() if key != own}
    other = golden_fill({"conv.weight": [3, 3, 3, 3], "conv.bias": [3]})
    for wrong, words in ((missing, own), (state | {"surprise": torch.zeros(1)}, "surprise"),
                         (state | {own: state[own][:5]}, own), (other, own)):
        with pytest.raises(RuntimeError, match=words):
            models.load_maskgit(wrong, **TINY_MASKGIT)


# ---------------------------------------------------------------- where files are looked for
def test_files_come_from_the_folder_else_from_the_hub(tmp_path, monkeypatch):
    """Where neither has it, one line says which file of which repository belongs where."""
    repo, file = "llvictorll/Maskgit-pytorch", "pretrained_maskgit/VQGAN/last.ckpt"
    # offline, see conftest
    with pytest.raises(ValueError) as error:
        models.find_weights(tmp_path, "last.ckpt", repo, file)
    for words in (str(tmp_path / "last.ckpt"), repo, file, "--weights"):
        assert words in str(error.value)
    assert "\n" not in str(error.value)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda repo, file: f"hub/{repo}/{file}")
    found = models.find_weights(tmp_path, "last.ckpt", repo, file)
    assert found == Path("hub", repo, file)
    (tmp_path / "last.ckpt").touch()
    found = models.find_weights(tmp_path, "last.ckpt", repo, file)
    assert found == tmp_path / "last.ckpt"


@pytest.mark.parametrize("name, repo", [
    (models.BACKBONE, f"timm/{models.BACKBONE}"),
    (models.FEATURE_NETWORKS["deit"], "timm/deit_base_distilled_patch16_224.fb_in1k"),
    (models.FEATURE_NETWORKS["efficientnet"], "timm/tf_efficientnet_lite0.in1k")])
def test_networks_of_timm_are_found_by_their_names(tmp_path, name, repo):
    with pytest.raises(ValueError, match=f"model.safetensors of repository {repo} "):
        models.find_backbone(name, tmp_path)

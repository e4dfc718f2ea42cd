"""TA-TiTok: equal to recorded outputs of the official code (golden/), the border to our own
conventions, and what a wrong file says."""
import numpy as np
import pytest
import torch
from conftest import load_case
from safetensors.torch import save_file

import tokenizer
from tokenizer import TATiTok, load_tatitok


def load_case_tatitok(name):
    """-> case, its network, its inputs as tensors; the image taken from the official [0, 1] to our
    [-1, 1]."""
    case = load_case("tatitok_vq", name)
    config = case.info["config"]
    sizes, vq_model = config["model_sizes"].values(), config["model"]["vq_model"]
    head_width, = {size["width"] // size["heads"] for size in sizes}
    image_size = config["dataset"]["preprocessing"]["crop_size"]
    model = load_tatitok(case.weights(), image_size, head_width, vq_model["use_l2_norm"])
    assert (model.K, model.L) == (vq_model["codebook_size"], vq_model["num_latent_tokens"])
    x = {}
    for key, value in case.inputs.items():
        x[key] = torch.from_numpy(value.astype(np.int64) if value.dtype.kind in "iu" else value)
    return case, model, x["image"] * 2 - 1, x["tokens"], x["text_guidance"]


@pytest.fixture(scope="module")
def tiny():
    return load_case_tatitok("tiny")


# -------------------------------------------------------------------- the official network
@pytest.mark.parametrize("name", [
    "tiny", "tiny_l2norm", pytest.param("full_bl128", marks=pytest.mark.slow)])
@torch.no_grad()
def test_tatitok_equals_the_official_network(name):
    """Tolerance 5e-5, in the official [0, 1]: a wrong LayerNorm epsilon or GELU changes the image
    by 7e-4 or more, float32 against
    float64 by 5e-6. Every nearest code must be the same."""
    case, model, images, tokens, text = load_case_tatitok(name)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    e = model.embed(images)                                            # (B, L, d)
    case.check("z", e.transpose(1, 2).unsqueeze(2), atol=5e-5)
    z = model.encode(images)
    assert torch.equal(z, model.nearest(e))
    case.check("indices", z.unsqueeze(1).to(torch.int16))
    case.check("decoded", (model.decode(model.E[tokens], text) + 1) / 2, atol=5e-5)


# -------------------------------------------------------------------- the interface
@torch.no_grad()
def test_only_the_last_rows_of_the_condition_are_read(tiny):
    """MaskGen's states come before the decoder's text, all in one tensor."""
    _, model, _, tokens, text = tiny
    y = model.decode(model.E[tokens], text)
    longer = torch.cat([torch.randn(3, 8, 20), text], 1)
    assert torch.equal(model.decode(model.E[tokens], longer), y)
    # and in their order
    rolled = model.decode(model.E[tokens], text.roll(1, 1))
    assert (rolled - y).abs().amax((1, 2, 3)).min() > 0.01


@pytest.mark.parametrize("name", ["tiny", "tiny_l2norm"])
def test_straight_through_embeddings_enter_the_decoder(name):
    """What the student hands over (Eq. 8) has the value of E[z] and decodes to the same image; the
    gradient reaches every token."""
    _, model, _, tokens, text = load_case_tatitok(name)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(*tokens.shape, model.K, generator=generator, requires_grad=True)
    e_soft = logits.softmax(-1) @ model.E
    e = model.E[tokens] + (e_soft - e_soft.detach())
    y = model.decode(e, text)
    assert torch.equal(e, model.E[tokens])
    # without gradient, torch has a fused attention
    torch.testing.assert_close(y, model.decode(model.E[tokens], text), atol=2e-5, rtol=0)
    y.square().mean().backward()
    assert logits.grad.isfinite().all() and logits.grad.abs().amax(-1).min() > 0
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", ["tiny", "tiny_l2norm"])
def test_a_code_is_its_own_nearest_code(name):
    _, model, *_ = load_case_tatitok(name)
    z = torch.arange(model.K)
    assert torch.equal(model.nearest(model.E), z)
    assert torch.equal(model.nearest(3 * model.E), z) == model.l2norm


def test_images_are_not_clamped(tiny):
    _, model, _, tokens, text = tiny
    y = model.decode(model.E[tokens], text)
    assert y.min() < -1.1 and y.max() > 1.1


def test_random_weights():
    """As --smoke builds it, at other sizes than any file's: images become tokens, tokens images,
    and all weights learn."""
    torch.manual_seed(0)
    model = TATiTok(K=30, d=4, L=9, width=(32, 48), depth=(1, 2), patch=4, text=(5, 12),
                    image_size=16, head_width=16)
    images, text = torch.rand(2, 3, 16, 16) * 2 - 1, torch.randn(2, 5, 12)
    z = model.encode(images)
    assert z.shape == (2, 9) and z.dtype == torch.long and z.min() >= 0 and z.max() < 30
    assert model.E.shape == (30, 4)
    y = model.decode(model.E[z] + model.embed(images), text)
    assert y.shape == images.shape
    y.square().mean().backward()
    assert not [key for key, p in model.named_parameters() if p.grad is None or not p.grad.any()]


def test_both_tokenizers_are_called_alike(tiny):
    vq = tokenizer.VQGAN(K=5, d=4, ch=4, ch_mult=(1,), z_channels=4, image_size=8)
    e = vq.E[torch.zeros(2, 64, dtype=torch.long)]
    assert torch.equal(vq.decode(e, torch.tensor([3, 4])), vq.decode(e))
    for name in ("E", "K", "L", "image_size", "encode", "decode", "embed", "nearest"):
        assert hasattr(tiny[1], name), name


@pytest.mark.parametrize("shape", [(3, 6, 20), (3, 7, 21), (2, 7, 20), (3,), None])
def test_wrong_conditions(tiny, shape):
    _, model, _, tokens, _ = tiny
    got = "no text" if shape is None else "a text"
    with pytest.raises(ValueError, match="6 tokens with a text of 7 rows or more, of width 20, "
                                         f"got .*{got}"):
        model.decode(model.E[tokens], None if shape is None else torch.zeros(shape))


def test_wrong_image_and_token_sizes(tiny):
    _, model, _, tokens, text = tiny
    with pytest.raises(ValueError, match=r"32 x 32 pixels, got \(64, 32\)"):
        model.encode(torch.zeros(1, 3, 64, 32))
    with pytest.raises(ValueError, match=r"decodes 6 tokens .* got tokens of shape \(3, 5, 12\)"):
        model.decode(model.E[tokens[:, :5]], text)


# -------------------------------------------------------------------- reading files
def test_both_kinds_of_file_load(tiny, tmp_path):
    state = tiny[0].weights()
    save_file(state, tmp_path / "model.safetensors")
    torch.save(state, tmp_path / "tatitok_bl128_vq.bin")
    for file in ("model.safetensors", "tatitok_bl128_vq.bin"):
        model = load_tatitok(tmp_path / file, 32, head_width=16)
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("options, words", [
    (dict(image_size=64), "16 patches of 8 x 8 pixels, not of 64 x 64"),
    (dict(image_size=31), "not of 31 x 31"),
    (dict(head_width=64), r"widths \[64, 96\] should be multiples of 64")])
def test_sizes_that_do_not_fit_the_file(tiny, options, words):
    with pytest.raises(ValueError, match=words) as error:
        load_tatitok(tiny[0].weights(), **(dict(image_size=32, head_width=16) | options))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("fault, words", [
    ("missing file", "no such file"), ("cut", "cannot be read as weights"),
    ("missing key", "decoder.mask_token is missing$"),
    ("unknown key", "surprise is unknown$"),
    ("shape", r"decoder.ffn.0.weight has shape \(190, 96, 1, 1\) instead of \(192, 96, 1, 1\)$"),
    ("nan", "decoder.ln_pre.bias has values that are not finite"), ("empty", "it is empty"),
    ("VQGAN", "key latent_tokens is missing"),
    ("no patch", "16 patches of 0 x 0 pixels"), ("no width", r"widths \[0, 96\]"),
    ("dimensions", "latent_tokens has shape .* 2 dimensions")])
def test_wrong_files(tiny, tmp_path, fault, words):
    state = tiny[0].weights()
    src = tmp_path / "model.safetensors"
    if fault == "cut":
        save_file(state, src)
        src.write_bytes(src.read_bytes()[:-30])
    elif fault != "missing file":
        src = {"VQGAN": load_case("taming_vqgan", "tiny").weights(), "empty": {}}.get(fault, state)
    if fault == "missing key":
        del state["decoder.mask_token"]
    changes = {"unknown key": {"surprise": torch.zeros(1)},
               "shape": {"decoder.ffn.0.weight": torch.zeros(190, 96, 1, 1)},
               "nan": {"decoder.ln_pre.bias": torch.full((96,), float("nan"))},
               "no patch": {"encoder.patch_embed.weight": torch.zeros(64, 3, 0, 0)},
               "no width": {"encoder.class_embedding": torch.zeros(1, 0)},
               "dimensions": {"latent_tokens": torch.zeros(6)}}
    state |= changes.get(fault, {})
    with pytest.raises(ValueError, match=words) as error:
        load_tatitok(src, 32, head_width=16)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500, str(error.value)

"""TA-TiTok: equal to recorded outputs of the official code (golden/), and the border to our own
conventions."""
import pytest
import torch
from conftest import load_case
from safetensors.torch import save_file
from test_official import tensors

from tokenizer import load_tatitok

TINY = dict(K=50, d=12, L=6, width=(64, 96), depth=(2, 3), patch=8, text=(7, 20), image_size=32,
            head_width=16)


def load_case_tatitok(name):
    """-> case, its network, its inputs as tensors; the image taken from the official [0, 1] to our
    [-1, 1]."""
    case = load_case("tatitok_vq", name)
    model = load_tatitok(case.weights(), **TINY if name == "tiny" else {})
    vq_model = case.info["config"]["model"]["vq_model"]
    assert (model.K, model.L) == (vq_model["codebook_size"], vq_model["num_latent_tokens"])
    x = tensors(case)
    return case, model, x["image"] * 2 - 1, x["tokens"], x["text_guidance"]


@pytest.fixture(scope="module")
def tiny():
    return load_case_tatitok("tiny")


@pytest.mark.parametrize("name", ["tiny", pytest.param("full_bl128", marks=pytest.mark.slow)])
@torch.no_grad()
def test_tatitok_equals_the_official_network(name):
    """Tolerance 5e-5, in the official [0, 1]: a wrong LayerNorm epsilon or GELU changes the image
    by 7e-4 or more, float32 against float64 by 5e-6. Every nearest code must be the same."""
    case, model, images, tokens, text = load_case_tatitok(name)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    e = model.embed(images)                                            # (B, L, d)
    case.check("z", e.transpose(1, 2).unsqueeze(2), atol=5e-5)
    z = model.nearest(e)
    case.check("indices", z.unsqueeze(1).to(torch.int16))
    # the full size takes seconds
    assert name != "tiny" or torch.equal(model.encode(images), z)
    case.check("decoded", (model.decode(model.E[tokens], text) + 1) / 2, atol=5e-5)


@torch.no_grad()
def test_only_the_last_rows_of_the_condition_are_read(tiny):
    """MaskGen's states come before the decoder's text, all in one tensor."""
    _, model, _, tokens, text = tiny
    y = model.decode(model.E[tokens], text)
    longer = torch.cat([torch.randn(3, 8, 20), text], 1)
    assert torch.equal(model.decode(model.E[tokens], longer), y)
    # The order of the rows counts.
    rolled = model.decode(model.E[tokens], text.roll(1, 1))
    assert (rolled - y).abs().amax((1, 2, 3)).min() > 0.01


def test_gradient_passes_the_decoder_to_every_token(tiny):
    _, model, _, tokens, text = tiny
    e = model.E[tokens].requires_grad_()
    model.decode(e, text).square().mean().backward()
    assert e.grad.isfinite().all() and e.grad.abs().amax(-1).min() > 0
    assert all(p.grad is None for p in model.parameters())


def test_both_kinds_of_file_load(tiny, tmp_path):
    state = tiny[0].weights()
    save_file(state, tmp_path / "model.safetensors")
    torch.save(state, tmp_path / "tatitok_bl128_vq.bin")
    for file in ("model.safetensors", "tatitok_bl128_vq.bin"):
        model = load_tatitok(tmp_path / file, **TINY)
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())

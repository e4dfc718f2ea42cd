"""TA-TiTok: equal to recorded outputs of the official code (golden/), and the border to our own
conventions."""
import numpy as np
import pytest
import torch
from conftest import load_case
from safetensors.torch import save_file

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
    x = {}
    for key, value in case.inputs.items():
        x[key] = torch.from_numpy(value.astype(np.int64) if value.dtype.kind in "iu" else value)
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
    z = model.encode(images)
    assert torch.equal(z, model.nearest(e))
    case.check("indices", z.unsqueeze(1).to(torch.int16))
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


def test_straight_through_embeddings_enter_the_decoder(tiny):
    """What the student hands over (Eq. 8) has the value of E[z] and decodes to the same image; the
    gradient reaches every token."""
    _, model, _, tokens, text = tiny
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(*tokens.shape, model.K, generator=generator, requires_grad=True)
    e_soft = logits.softmax(-1) @ model.E
    e = model.E[tokens] + (e_soft - e_soft.detach())
    y = model.decode(e, text)
    assert torch.equal(e, model.E[tokens])
    # Without a gradient, torch uses a fused attention, which rounds in another way.
    torch.testing.assert_close(y, model.decode(model.E[tokens], text), atol=2e-5, rtol=0)
    y.square().mean().backward()
    assert logits.grad.isfinite().all() and logits.grad.abs().amax(-1).min() > 0
    assert all(p.grad is None for p in model.parameters())


def test_both_kinds_of_file_load_and_only_with_the_right_keys(tiny, tmp_path):
    state = tiny[0].weights()
    save_file(state, tmp_path / "model.safetensors")
    torch.save(state, tmp_path / "tatitok_bl128_vq.bin")
    for file in ("model.safetensors", "tatitok_bl128_vq.bin"):
        model = load_tatitok(tmp_path / file, **TINY)
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
        assert all(type(p) is torch.nn.Parameter and p.dtype == torch.float32
                   for p in model.parameters())
    for wrong in ({key: state[key] for key in list(state)[1:]},
                  state | {"surprise": torch.zeros(1)},
                  state | {"decoder.ffn.0.weight": torch.zeros(190, 96, 1, 1)}):
        with pytest.raises(RuntimeError, match="state_dict"):
            load_tatitok(wrong, **TINY)

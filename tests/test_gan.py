"""The GAN of Sec. 3.4: StyleGAN-XL's projected discriminator and its augmentation equal recorded
outputs of the official code (golden/), and its gradient has the size it should have."""
import contextlib
import copy
import json
import types

import numpy as np
import pytest
import torch
from conftest import GOLDEN, gen, golden_fill, load_case
from PIL import Image
from torch import nn

import fpd
import models
import tokenizer
import train

FLOAT32 = contextlib.nullcontext()
DEIT = models.FEATURE_NETWORKS["deit"]
EFFICIENTNET = models.FEATURE_NETWORKS["efficientnet"]


def timm_weights(name):
    """Weights with timm's keys, the classifier's among them, as on the hub. Counters stay 0."""
    manifest = json.loads((GOLDEN / "stylegan_xl_d" / "timm_manifests.json").read_text())[name]
    counters = {key: torch.tensor(0) for key in manifest if key.endswith("num_batches_tracked")}
    return golden_fill(manifest, nonfloat_keys=counters) | counters


def spectral_fill(case):
    """Weights of the heads and projections. The two vectors that spectral norm keeps for each
    matrix are its leading singular vectors."""
    state = case.weights()
    for key in list(state):
        if key.endswith("weight_orig"):
            W = state[key].flatten(1).double()
            u = torch.linalg.eigh(W @ W.T)[1][:, -1]
            # with this sign, u W v > 0
            v = W.T @ u
            state[key.replace("_orig", "_u")] = u.float()
            state[key.replace("_orig", "_v")] = (v / v.norm()).float()
        elif key.endswith("num_batches_tracked"):
            state[key] = torch.tensor(0)
    return state


@pytest.fixture(scope="module")
def official():
    """-> case, the whole discriminator with its weights, the images (2, 3, 256, 256)"""
    case = load_case("stylegan_xl_d", "projected_discriminator_uncond")
    with pytest.MonkeyPatch.context() as patch:
        # random weights, which are replaced at once, take seconds
        for name in ("normal_", "uniform_"):
            patch.setattr(torch.Tensor, name, lambda x, *args, **kwargs: x)
        D = models.load_discriminator({"deit": timm_weights(DEIT),
                                       "efficientnet": timm_weights(EFFICIENTNET)})
    D.load_state_dict(spectral_fill(case), strict=True)
    cells = np.random.RandomState(801).uniform(-1, 1, size=(2, 3, 64, 64)).astype(np.float32)
    return case, D, torch.from_numpy(cells.repeat(4, 2).repeat(4, 3))


def padded(logits):
    """As in the recorded case: one row for each network and image, (2 B, 100)."""
    return torch.cat([nn.functional.pad(x, (0, 100 - x.shape[1])) for x in logits])


def check_hinge(case, logits, which):
    """The official losses are sums over images and networks. Logits of 2 and -2 are beyond the
    hinge and add nothing."""
    recorded = case.info[f"hinge_losses_{which}"]
    rows = sum(len(x) for x in logits)
    assert rows == recorded["rows"]
    real = [torch.full_like(x, 2.0) for x in logits]
    fake = [torch.full_like(x, -2.0) for x in logits]
    losses = {"generator": fpd.gan_loss(logits),
              "discriminator_fake": fpd.discriminator_loss(real, logits),
              "discriminator_real": fpd.discriminator_loss(logits, fake)}
    for name, ours in losses.items():
        assert abs(rows * ours.item() - recorded[name]) < 2e-4, name


# ---------------------------------------------------------------- the official discriminator
@torch.no_grad()
def test_features_equal_the_official_ones(official):
    """Maps of both feature networks, before and after mixing. The mixed maps are as large as 190,
    hence their tolerance of 1e-3."""
    case, D, images = official
    for name, short in ((DEIT, "deit"), (EFFICIENTNET, "effnet")):
        maps, projection = D.networks[name].maps(images), D.feature_networks[name]
        features = maps
        if name == DEIT:
            layers = projection.pretrained.values()
            features = [layer(m) for layer, m in zip(layers, maps, strict=True)]
        assert len(features) == 4
        for i, (feature, mixed) in enumerate(zip(features, projection(maps), strict=True)):
            case.check(f"{short}_feature{i}", feature)
            case.check(f"{short}_mixed{i}", mixed, atol=1e-3)


@torch.no_grad()
def test_logits_equal_the_official_ones(official):
    case, D, images = official
    assert sum(p.numel() for p in D.discriminators.parameters()) == case.info["heads_param_count"]
    logits = D.eval()(images)
    assert [x.shape[1] for x in logits for _ in images] == case.info["row_lengths"]
    case.check("logits_all", padded(logits))
    for short, x in zip(("deit", "effnet"), logits, strict=True):
        for i, of_head in enumerate(x.chunk(4, 1)):
            case.check(f"{short}_head{i}_logits", of_head)
    check_hinge(case, logits, "eval")
    # training mode comes last, because it changes the running statistics of BatchNorm
    D.train()
    logits = D(images)
    case.check("logits_all_train_mode", padded(logits))
    check_hinge(case, logits, "train")


@torch.no_grad()
def test_heads_equal_the_official_ones():
    case = load_case("stylegan_xl_d", "heads_uncond")
    rs, features = np.random.RandomState(803), []
    for c, size in zip((64, 64, 128, 256), (112, 56, 28, 14)):
        features.append(torch.from_numpy(rs.standard_normal((2, c, size, size)).astype(np.float32)))
    judges = nn.ModuleList(models.head(x.shape[1], x.shape[2], 64) for x in features)
    heads = nn.ModuleDict({"mini_discs": judges})
    heads.load_state_dict(spectral_fill(case), strict=True)

    def run():
        return torch.cat([judge(x).flatten(1) for judge, x in zip(judges, features)], 1)
    heads.eval()
    logits = run()
    case.check("logits", logits)
    check_hinge(case, [logits], "eval")
    heads.train()
    case.check("logits_train_mode", run())


def test_gradient_passes_both_official_networks(official):
    """Both networks are frozen, but the images get a gradient from each of them. The convolutional
    one resizes small images only."""
    _, D, images = official
    images = images[:1].clone().requires_grad_()
    for logits in D.eval()(images):
        gradient, = torch.autograd.grad(logits.mean(), images)
        assert torch.isfinite(gradient).all() and gradient.flatten(2).norm(dim=2).min() > 0
    network = D.networks[EFFICIENTNET]
    with torch.no_grad():
        assert [m.shape[-1] for m in network.maps(images[..., :128, :128])] == [56, 28, 14, 7]
        assert [m.shape[-1] for m in network.maps(images)] == [64, 32, 16, 8]


def test_images_are_augmented_anew_for_each_network():
    phi = models.ConvNet()
    D = models.Discriminator({"one": phi, "two": phi}, image_size=32, width=8)
    seen, generator = [], gen()

    def augment(images):
        seen.append(fpd.diff_augment(images, generator))
        return seen[-1]
    D(torch.zeros(2, 3, 32, 32), augment)
    assert len(seen) == 2 and not torch.equal(*seen)


# ---------------------------------------------------------------- augmentation, blur, losses
def test_diff_augment_equals_the_official_one(monkeypatch):
    """With the recorded draws. Where they are whole numbers, the uniform ones that give them."""
    case = load_case("stylegan_xl_d", "diffaugment")
    draws = [torch.from_numpy(case.inputs[f"draw{i}"]).double() for i in range(7)]
    for i, (low, n) in enumerate(((-3, 7), (-3, 7), (0, 21), (0, 24)), 3):
        draws[i] = (draws[i] - low + 0.5) / n
    drawn = torch.stack(draws, 1).float()
    monkeypatch.setattr(fpd, "uniform", lambda shape, generator, device: drawn)
    image = torch.from_numpy(case.inputs["image"])
    case.check("image", fpd.diff_augment(image, None), atol=1e-6)


def test_blur_equals_the_official_one():
    case = load_case("stylegan_xl_d", "blur")
    image = torch.from_numpy(case.inputs["image"])
    sigmas = case.info["config"]["sigmas"]
    assert len(sigmas) > 0
    for sigma in sigmas:
        case.check(f"blurred_{sigma}", fpd.blur(image, sigma), atol=1e-6)
        line = torch.zeros(1, 3, 1, 41)
        line[..., 20] = 1
        size = case.info["outputs"][f"kernel_{sigma}"]["shape"][0]
        # all rows are equal, so only the blur along the rows has an effect
        wide = fpd.blur(line.expand(1, 3, 41, 41), sigma)[0, 0, 20]
        case.check(f"kernel_{sigma}", wide[20 - size // 2:21 + size // 2], atol=1e-6)
        assert wide.gt(0).sum() == size
    assert fpd.blur(image, 0.0) is image and fpd.blur(image, 0.3) is image


def test_hinge_values():
    """By hand. Both networks have the same weight, although one has more logits."""
    real = [torch.tensor([[2.0, 0.0]]), torch.tensor([[0.5] * 4])]
    fake = [torch.tensor([[-3.0, 1.0]]), torch.tensor([[-1.0] * 4])]
    assert fpd.gan_loss(fake).item() == ((3 - 1) / 2 + 1) / 2
    of_real, of_fake = ((0 + 1) / 2 + 0.5) / 2, ((0 + 2) / 2 + 0) / 2
    assert fpd.discriminator_loss(real, fake).item() == of_real + of_fake


# ---------------------------------------------------------------- the GAN in a training step
def make_gan(seed=0, drawn=0, **settings):
    """-> train.Gan as a small world has it, with an untrained Phi, after so many random numbers"""
    torch.manual_seed(0)
    phi = models.ConvNet(width=4).eval().requires_grad_(False)
    parts = types.SimpleNamespace(tokenizer=tokenizer.VQGAN(), phi=phi)
    torch.rand(drawn)
    return train.Gan(train.Config(smoke=True, seed=seed, **settings), parts, "cpu")


def some_images():
    """Drafts as the loop has them, (4, 3, 32, 32), and the drift's gradient there."""
    images = torch.randn(4, 3, 32, 32, generator=gen(0)).requires_grad_()
    return images, 1e-3 * torch.randn(4, 3, 32, 32, generator=gen(100))


def changed(network, before):
    """Names of the tensors that differ from those of the state dict `before`."""
    return [key for key, value in network.state_dict().items()
            if not torch.equal(value, before[key])]


@pytest.mark.parametrize("weight", [0.5, 3.0])
def test_the_gans_gradient_is_as_long_as_its_weight_says(weight):
    """It is gan_weight times as long as the drift's, whatever the scale of the discriminator, and
    `gan_scale` is the paper's lambda. Of all networks, only the heads are trained."""
    gan, (images, gradient) = make_gan(gan_weight=weight), some_images()
    phi = gan.discriminator.networks["phi"]
    before, phi_before = (copy.deepcopy(net.state_dict()) for net in (gan.discriminator, phi))
    loss = (images * gradient).sum()
    total, logs = gan.gradient(loss, images, 3, gen(), FLOAT32)
    assert ((total - gradient).norm() / gradient.norm()).item() == pytest.approx(weight, rel=1e-4)
    assert logs.keys() == {"gan_real", "gan_fake", "gan_loss", "gan_scale"}
    assert all(value.ndim == 0 for value in logs.values())
    names = changed(gan.discriminator, before)
    assert any(name.endswith("weight_orig") for name in names)
    assert {name.split(".")[0] for name in names} == {"discriminators"}
    assert not changed(phi, phi_before)
    assert images.grad is None and not total.requires_grad
    # two steps of four drafts come before the third
    other = make_gan()
    alone, _ = fpd.gan_step(other.discriminator, other.opt, images, other.real(4, 8), 8, gen(),
                            FLOAT32)
    torch.testing.assert_close(total, gradient + logs["gan_scale"] * alone)


def test_the_gans_gradient_lowers_its_loss():
    gan, (images, _) = make_gan(), some_images()
    gradient, _ = fpd.gan_step(gan.discriminator, gan.opt, images, gan.real(4, 0), 0, gen(),
                               FLOAT32)
    discriminator = gan.discriminator.eval()

    def loss(x):
        """The mean over eight draws of the augmentation."""
        x = x.repeat(8, 1, 1, 1)
        return fpd.gan_loss(discriminator(x, lambda y: fpd.diff_augment(y, gen()))).item()
    step = 20 * gradient / gradient.norm()
    assert loss(images - step) < loss(images + step)


def test_discriminator_and_real_images_depend_on_the_seed_and_the_step_alone():
    """They do not depend on which random numbers were drawn before, for instance in preparation."""
    first, again, other = make_gan(), make_gan(drawn=7), make_gan(seed=1)
    state = first.discriminator.state_dict()
    assert changed(other.discriminator, state) and not changed(again.discriminator, state)
    real = first.real(5, seen=8)
    assert torch.equal(real, again.real(5, seen=8))
    for different in (first.real(5, seen=16), other.real(5, seen=8)):
        assert not torch.equal(real, different)
    world = tokenizer.to_float(tokenizer.world(train.Config(smoke=True), "train")[0])
    assert all((image == world).flatten(1).all(1).any() for image in real)
    assert real.unique(dim=0).shape[0] == 5


def test_real_images_from_files_and_an_unreadable_one_is_skipped(tmp_path, monkeypatch, capsys):
    """It is named, and another image takes its place, so that the batch keeps its size."""
    files = [tmp_path / f"{i}.png" for i in range(3)]
    for i, file in enumerate(files):
        Image.new("RGB", (50, 40), (40 * i, 0, 255)).save(file)
    monkeypatch.setattr(train, "load_discriminator", lambda *args: make_gan().discriminator)
    monkeypatch.setattr(train, "find_backbone", lambda *args: None)
    parts = types.SimpleNamespace(tokenizer=tokenizer.VQGAN())
    cfg = train.Config(dataset="imagenet", gan_weight=1.0, data=str(tmp_path))
    gan = train.Gan(cfg, parts, "cpu")
    real = gan.real(20, 0)
    assert real.shape == (20, 3, 32, 32) and (real[:, 2] == 1).all()
    assert len(real[:, 0, 0, 0].unique()) == 3 and "skipped" not in capsys.readouterr().out
    files[1].write_bytes(files[1].read_bytes()[:60])
    fewer = gan.real(20, 0)
    assert fewer.shape == real.shape and len(fewer[:, 0, 0, 0].unique()) == 2
    said = capsys.readouterr().out
    assert "skipped" in said and str(files[1]) in said

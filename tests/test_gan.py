"""The GAN of Sec. 3.4: StyleGAN-XL's projected discriminator equals recorded outputs of the
official code (golden/), and the gradient arrives."""
import json

import numpy as np
import pytest
import torch
from conftest import GOLDEN, golden_fill, load_case
from safetensors.torch import save_file
from torch import nn

import fpd
import models
import tokenizer

DEIT = "deit_base_distilled_patch16_224"
EFFICIENTNET = "tf_efficientnet_lite0"
TINY_BACKBONE = "vit_tiny_patch16_dinov3_qkvb.eupe_lvd1689m"


def timm_weights(name):
    """Under timm's keys, with the classifier, as on the hub; the integer counters stay 0."""
    manifest = json.loads((GOLDEN / "stylegan_xl_d" / "timm_manifests.json").read_text())[name]
    counters = {key: torch.tensor(0) for key in manifest if key.endswith("num_batches_tracked")}
    return golden_fill(manifest, nonfloat_keys=counters) | counters


def spectral_fill(case):
    """Weights of the heads and of the mixing: where spectral norm keeps two vectors, they are the
    leading singular ones."""
    state = case.weights()
    for key in list(state):
        if key.endswith("weight_orig"):
            W = state[key].flatten(1).double()
            u = torch.linalg.eigh(W @ W.T)[1][:, -1]
            # so that u W v > 0
            v = W.T @ u
            state[key.replace("_orig", "_u")] = u.float()
            state[key.replace("_orig", "_v")] = (v / v.norm()).float()
        elif key.endswith("num_batches_tracked"):
            state[key] = torch.tensor(0)
    return state


@pytest.fixture(scope="module")
def official():
    """-> case, the whole discriminator with its weights, the image (2, 3, 256, 256)"""
    case = load_case("stylegan_xl_d", "projected_discriminator_uncond")
    D = models.load_discriminator({"deit": timm_weights(DEIT),
                                   "efficientnet": timm_weights(EFFICIENTNET)})
    # the official keys, none more and none less
    tokenizer.load_strictly(D, spectral_fill(case), "the fixture")
    cells = np.random.RandomState(801).uniform(-1, 1, size=(2, 3, 64, 64)).astype(np.float32)
    return case, D, torch.from_numpy(cells.repeat(4, 2).repeat(4, 3))


@pytest.fixture
def small():
    """The same class on the small worlds' Phi, in training mode."""
    torch.manual_seed(0)
    phi = models.ConvNet().eval().requires_grad_(False)
    return models.Discriminator({"phi": phi}, image_size=32, width=8).train(), phi


def padded(logits):
    """As the fixture keeps them: a row per network and image, (2 B, 100)."""
    return torch.cat([nn.functional.pad(x, (0, 100 - x.shape[1])) for x in logits])


def check_hinge(case, logits, which):
    """The official losses are sums over images and networks. 2 and -2 are beyond the hinge: they
    add nothing."""
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
    """Inputs, raw blocks and mixed maps of both feature networks. Mixed ones are as large as 190:
    1e-3 there."""
    case, D, images = official
    for name, short in ((DEIT, "deit"), (EFFICIENTNET, "effnet")):
        seen, network, projection = [], D.networks[name], D.feature_networks[name]
        # of a ViT, timm calls the parts, not the whole
        first = network.net.patch_embed if name == DEIT else network.net
        blocks = (2, 5, 8, 11) if name == DEIT else ()
        hooks = [first.register_forward_pre_hook(lambda module, x: seen.append(x[0]))]
        for i in blocks:
            block = network.net.blocks[i]
            hooks.append(block.register_forward_hook(lambda module, x, y: seen.append(y)))
        maps = network.maps(images)
        for hook in hooks:
            hook.remove()
        case.check(f"{short}_network_input", seen[0])
        for i, tokens in zip(blocks, seen[1:], strict=True):
            case.check(f"deit_block{i}_tokens", tokens)
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
    # after evaluating: it moves BatchNorm's running statistics
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
    tokenizer.load_strictly(heads, spectral_fill(case), "the fixture")

    def run():
        return torch.cat([judge(x).flatten(1) for judge, x in zip(judges, features)], 1)
    logits = run()
    case.check("logits", logits)
    check_hinge(case, [logits], "eval")
    heads.train()
    case.check("logits_train_mode", run())


def test_gradient_passes_both_official_networks(official):
    """Frozen weights, but the images get a gradient from each network; only the ViT and small
    images are resized."""
    _, D, images = official
    images = images[:1].clone().requires_grad_()
    of_deit, of_efficientnet = D.eval()(images)
    for logits in (of_deit, of_efficientnet):
        (gradient,) = torch.autograd.grad(logits.mean(), images)
        assert torch.isfinite(gradient).all() and gradient.flatten(2).norm(dim=2).min() > 0
    assert {p.requires_grad for p in D.discriminators.parameters()} == {True}
    frozen = [D.feature_networks, *D.networks.values()]
    assert not any(p.requires_grad for module in frozen for p in module.parameters())
    network = D.networks[EFFICIENTNET]
    with torch.no_grad():
        assert [m.shape[-1] for m in network.maps(images[..., :128, :128])] == [56, 28, 14, 7]
        assert [m.shape[-1] for m in network.maps(images)] == [64, 32, 16, 8]


def test_classifier_and_counters_are_not_needed(tmp_path, monkeypatch):
    """Files with and without what the discriminator does not use; a missing or foreign one is told
    in one line."""
    # the second network in the first one's place, without its 87 M parameters
    class Tiny(models.EfficientNet):
        part = "deit"
    monkeypatch.setattr(models, "FEATURE_NETWORKS", (Tiny, models.EfficientNet))
    monkeypatch.chdir(tmp_path)
    # offline, see conftest
    words = (f"no weights for deit: .*model.safetensors of .* timm/{EFFICIENTNET}.in1k "
             ".*--weights")
    with pytest.raises(ValueError, match=words) as error:
        models.find_backbone(EFFICIENTNET, "weights", "deit")
    assert "\n" not in str(error.value)
    state = timm_weights(EFFICIENTNET)
    bare = {key: x for key, x in state.items() if not key.endswith("num_batches_tracked")}
    whole = state | {"classifier.weight": torch.zeros(1000, 1280),
                     "conv_head.weight": torch.zeros(1280, 320, 1, 1),
                     "bn2.bias": torch.zeros(1280)}
    D = models.load_discriminator({"deit": whole, "efficientnet": bare}, image_size=64)
    for key, value in D.networks[EFFICIENTNET].net.state_dict().items():
        assert torch.equal(value, state[key])
    (tmp_path / "weights").mkdir()
    save_file(whole, tmp_path / "weights" / f"{EFFICIENTNET}.safetensors")
    found = models.find_backbone(EFFICIENTNET, "weights")
    models.load_discriminator({"deit": found, "efficientnet": found}, image_size=64)
    del bare["conv_stem.weight"]
    for src, words in ((bare, "tf_efficientnet_lite0.* key conv_stem.weight is missing$"),
                       (tmp_path / "no.pth", "no such file")):
        with pytest.raises(ValueError, match=words) as error:
            models.load_discriminator({"deit": src})
        assert "\n" not in str(error.value)


# ---------------------------------------------------------------- the same class, small
def test_small_discriminator(small):
    """Any four maps will do: a ConvNet's 16, 8, 8, 4 pixels, or four of one size, a ViT's, which
    become 16, 8, 4, 2."""
    D, phi = small
    mixed = D.feature_networks["phi"](phi.maps(torch.zeros(1, 3, 32, 32)))
    shapes = [tuple(m.shape[1:]) for m in mixed]
    assert shapes == [(8, 32, 32), (8, 16, 16), (16, 8, 8), (32, 8, 8)]
    (logits,) = D(torch.zeros(5, 3, 32, 32))
    assert logits.shape == (5, 25 + 25 + 1 + 1)
    vit = models.Backbone(TINY_BACKBONE, image_size=64)
    D = models.Discriminator({"vit": vit}, image_size=64, width=8)
    assert not vit.training and not any(p.requires_grad for p in vit.parameters())
    mixed = D.feature_networks["vit"](vit.maps(torch.zeros(1, 3, 64, 64)))
    assert [m.shape[-1] for m in mixed] == [32, 16, 8, 4]
    assert [len(x) for x in D(torch.zeros(2, 3, 64, 64))] == [2]
    with pytest.raises(ValueError, match="looks at 4 maps, and vit has 2"):
        models.Discriminator({"vit": models.Backbone(TINY_BACKBONE, (2, 5), 64)}, 64)


def test_frozen_parts_stay_frozen(small):
    """Feature networks stay in eval mode, whatever is asked of the discriminator, and only the
    heads can be made trainable."""
    D, phi = small

    def frozen():
        return phi.state_dict() | D.feature_networks.state_dict()
    before = {key: value.clone() for key, value in frozen().items()}
    D.train().requires_grad_(True)
    assert not any(module.training for module in phi.modules()) and D.discriminators.training
    trained = {name for name, p in D.named_parameters() if p.requires_grad}
    of_heads = {name for name, _ in D.named_parameters() if name.startswith("discriminators.")}
    assert trained == of_heads and len(of_heads) > 0
    opt = torch.optim.AdamW([p for p in D.parameters() if p.requires_grad], lr=1e-2)
    real, fake = torch.randn(4, 3, 32, 32), torch.randn(4, 3, 32, 32)
    fpd.discriminator_loss(D(real), D(fake)).backward()
    opt.step()
    assert all(torch.equal(value, before[key]) for key, value in frozen().items())
    assert not any(p.requires_grad for p in D.requires_grad_(False).parameters())
    # a checkpoint does not carry them
    assert not any(key.startswith("networks") for key in D.state_dict())


def test_spectral_norm(small):
    """Every convolution of the heads has largest singular value 1, once the power iteration has
    run; so have no other weights."""
    D, _ = small
    with torch.no_grad():
        # one iteration per pass in training mode
        for _ in range(200):
            D(torch.zeros(2, 3, 32, 32))
    convs = [module for module in D.discriminators.modules() if isinstance(module, nn.Conv2d)]
    assert len(convs) == (2 + 1) + 3 * (1 + 1)
    for conv in convs:
        assert abs(torch.linalg.matrix_norm(conv.weight.flatten(1), 2) - 1) < 0.02
        assert torch.linalg.matrix_norm(conv.weight_orig.flatten(1), 2) != 1
    assert not any(hasattr(module, "weight_orig") for module in D.feature_networks.modules())
    D.eval()
    u = {key: value.clone() for key, value in D.state_dict().items() if key.endswith("weight_u")}
    assert len(u) == len(convs)
    D(torch.zeros(2, 3, 32, 32))
    assert all(torch.equal(value, D.state_dict()[key]) for key, value in u.items())


def test_augmentation_is_drawn_for_each_network_and_real_images_go_apart(small):
    """Two networks never see the same picture; and with batch statistics, a batch of both kinds
    would be another batch."""
    _, phi = small
    D = models.Discriminator({"one": phi, "two": phi}, image_size=32, width=8)
    seen, generator = [], torch.Generator().manual_seed(0)

    def augment(images):
        seen.append(fpd.diff_augment(images, generator))
        return seen[-1]
    D(torch.zeros(2, 3, 32, 32), augment)
    assert len(seen) == 2 and not torch.equal(*seen)
    a, b = torch.randn(4, 3, 32, 32), 3 * torch.randn(4, 3, 32, 32)
    assert (D(a)[0] - D(torch.cat([a, b]))[0][:4]).abs().max() > 1e-2
    D.eval()
    torch.testing.assert_close(D(a)[0], D(torch.cat([a, b]))[0][:4], atol=1e-5, rtol=1e-5)


def test_gradient_reaches_the_students_logits():
    """L_gan goes back through heads, Phi, blur, augmentation, decoder and straight-through (Eq. 8).
    In eval mode it is one function."""
    torch.manual_seed(0)
    vq = tokenizer.VQGAN().eval().requires_grad_(False)
    D = models.Discriminator({"phi": models.ConvNet()}, image_size=32, width=8)
    D.requires_grad_(False).eval()
    logits = torch.randn(3, vq.L, vq.K, requires_grad=True)
    z_hat, e = fpd.straight_through(logits, vq.E, torch.Generator().manual_seed(0))
    images = vq.decode(e)                                              # (B, 3, 32, 32)
    images.retain_grad()

    def loss_of(x):
        generator = torch.Generator().manual_seed(1)
        return fpd.gan_loss(fpd.gan_logits(D, x, generator, sigma=1.0))
    loss = loss_of(images)
    loss.backward()
    assert images.grad.flatten(1).norm(dim=1).min() > 0
    assert torch.isfinite(logits.grad).all() and logits.grad.flatten(1).norm(dim=1).min() > 0
    assert all(p.grad is None for module in (vq, D) for p in module.parameters())
    step = 0.1 * images.grad / images.grad.norm()
    assert loss_of(images - step) < loss < loss_of(images + step)


def test_discriminator_learns_to_tell_two_kinds_of_images_apart(small):
    """Flat against noisy: training the heads suffices, even on the features of an untrained
    network."""
    D, _ = small
    generator = torch.Generator().manual_seed(0)
    trained = [p for p in D.parameters() if p.requires_grad]
    opt = torch.optim.Adam(trained, 2e-3, betas=(0.0, 0.99))
    losses = []
    for _ in range(40):
        real = torch.rand(8, 3, 1, 1, generator=generator).expand(8, 3, 32, 32)
        fake = torch.rand(8, 3, 32, 32, generator=generator)
        loss = fpd.discriminator_loss(D(real), D(fake))
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert np.mean(losses[:3]) > 1.7 and np.mean(losses[-5:]) < 1.3, losses


# ---------------------------------------------------------------- augmentation, blur, losses
def test_diff_augment_equals_the_official_one(monkeypatch):
    """With the recorded draws; whole numbers become the uniform ones that lead to them."""
    case = load_case("stylegan_xl_d", "diffaugment")
    draws = [torch.from_numpy(case.inputs[f"draw{i}"]).double() for i in range(7)]
    for i, (low, n) in enumerate(((-3, 7), (-3, 7), (0, 21), (0, 24)), 3):
        draws[i] = (draws[i] - low + 0.5) / n
    drawn = torch.stack(draws, 1).float()
    monkeypatch.setattr(fpd, "uniform", lambda shape, generator, device: drawn)
    image = torch.from_numpy(case.inputs["image"])
    case.check("image", fpd.diff_augment(image, None), atol=1e-6)


def test_diff_augment_facts():
    """Each image its own draw, that of its own generator; gradients pass, zero where the image was
    cut away."""
    images = torch.full((4, 3, 32, 32), 0.25, requires_grad=True)

    def generators():
        return [torch.Generator().manual_seed(i) for i in range(4)]
    out = fpd.diff_augment(images, generators())
    assert torch.equal(out[2:], fpd.diff_augment(images[2:], generators()[2:]))
    assert len({x.max().item() for x in out}) == 4
    empty = (out == 0).all(1).float().mean((1, 2))
    assert empty.min() > 0 and empty.max() < (6 / 32) ** 2 + 2 * 4 / 32
    (gradient,) = torch.autograd.grad(out.square().sum(), images)
    assert torch.isfinite(gradient).all() and gradient.abs().flatten(1).sum(1).min() > 0
    many = fpd.diff_augment(torch.ones(2000, 3, 16, 16), torch.Generator().manual_seed(0))
    # grey 1 + brightness: saturation and contrast keep flat images
    value = many.amax((1, 2, 3))
    assert 0.5 <= value.min() < 0.51 and 1.49 < value.max() <= 1.5


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
        # the same in every row: only the other direction shows
        wide = fpd.blur(line.expand(1, 3, 41, 41), sigma)[0, 0, 20]
        case.check(f"kernel_{sigma}", wide[20 - size // 2:21 + size // 2], atol=1e-6)
        assert wide.gt(0).sum() == size
    assert fpd.blur(image, 0.0) is image and fpd.blur(image, 0.3) is image
    assert [fpd.blur_sigma(n) for n in (0, 150_000, 300_000, 10 ** 6)] == [2.0, 1.0, 0.0, 0.0]


def test_hinge_values():
    """By hand. Networks count alike, although one has more logits."""
    real = [torch.tensor([[2.0, 0.0]]), torch.tensor([[0.5] * 4])]
    fake = [torch.tensor([[-3.0, 1.0]]), torch.tensor([[-1.0] * 4])]
    assert fpd.gan_loss(fake).item() == ((3 - 1) / 2 + 1) / 2
    of_real, of_fake = ((0 + 1) / 2 + 0.5) / 2, ((0 + 2) / 2 + 0) / 2
    assert fpd.discriminator_loss(real, fake).item() == of_real + of_fake

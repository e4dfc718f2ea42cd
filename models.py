"""models.py - the networks: student and teacher, text encoders, Phi and more; their weights.

MaskGIT              z (B, L) codes or mask, labels (B,) -> logits (B, L, K): teacher and student
MaskGen              z, text c (B, rows, W) -> logits (B, L, K): the same with captions
Words, TextEncoder   captions -> c (B, rows, W), row 0 pooled, then states: our own, and CLIP's
ConvNet, Backbone    images (B, 3, H, W) -> maps (B, D, h, w): Phi, small and large (Sec. 3.3)
Discriminator        images -> logits (B, n): real or draft? For the optional GAN (Sec. 3.4)
Inception            images -> features, logits: for FID and Inception Score (evaluate.py)

One class serves the small worlds and the official network. Each load_* function knows the sizes of
the released network and loads its file strictly, by the official key names.
"""
import math
from collections import OrderedDict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import spectral_norm

from tokenizer import (SCENE_WORDS, load_tatitok, load_vqgan, load_weights, parse_caption,
                       read_weights)


# ---------------------------------------------------------------- pretrained weights
# The folder in which official files are looked for, unless --weights names another one
WEIGHTS = "weights"


def find_weights(folder, name, repo, filename):
    """Path of a weight file: <folder>/<name>, else that of a Hugging Face repository (downloaded
    once). ValueError that names file, repository and place where there is neither."""
    place = Path(folder, name)
    if place.is_file():
        return place
    # imported here because it is slow, and the small worlds need no hub
    from huggingface_hub import hf_hub_download
    try:
        return Path(hf_hub_download(repo, filename))
    except Exception as error:
        # one of dozens of types: offline, no such repository, disk full, ...
        raise ValueError(f"no weights at {place}, nor from the hub ({type(error).__name__}). Put "
                         f"the file {filename} of repository {repo} (Hugging Face hub) there, or "
                         "name another folder with --weights") from None


def import_timm():
    """timm, even where torchvision does not fit torch, as PyPI's beside a CPU build of torch.

    Where torchvision's compiled part cannot be loaded, its import fails on two operators that are
    then undefined. timm and open_clip use neither, so it is enough to declare them.
    """
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for operator in ("nms", "qnms"):
            torch.library.define(f"torchvision::{operator}", "(Tensor x) -> Tensor")
    import timm
    return timm


# ---------------------------------------------------------------- MaskGIT (Besnier and Chen 2023)
class Residual(nn.Module):
    """x + fn(norm(x)), with attention ("mha") or an MLP ("net") as fn."""
    def __init__(self, width, **fn):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fn = nn.ModuleDict(fn)

    def forward(self, x):
        y = self.norm(x)
        if "mha" in self.fn:
            return x + self.fn["mha"](y, y, y, need_weights=False)[0]
        return x + self.fn["net"](y)


class MaskGIT(nn.Module):
    """Bidirectional transformer over L image tokens and a class token. Defaults: a small world's.

    One table of K + 1 + num_classes + 1 rows holds everything:
        0 .. K-1 codes | K mask | K+1 .. K+num_classes classes | the last one: null class

    forward(z (B, L) long 0..K, labels (B,) long, drop (B,) bool | None: True = null class)
        -> logits (B, L, K)
    """
    def __init__(self, K=128, L=64, num_classes=24, width=128, depth=4, heads=4, mlp=512):
        super().__init__()
        self.K, self.L, self.num_classes = K, L, num_classes
        rows = K + 1 + num_classes + 1
        self.pos_emb = nn.Parameter(torch.zeros(1, L + 1, width))
        # the output's bias: one number per position and row
        self.bias = nn.Parameter(torch.zeros(L + 1, rows))
        self.tok_emb = nn.Embedding(rows, width)
        # the official key names count the dropout modules, hence an Identity in place of each
        self.first_layer = nn.Sequential(
            nn.LayerNorm(width, eps=1e-12), nn.Identity(), nn.Linear(width, width), nn.GELU(),
            nn.LayerNorm(width, eps=1e-12), nn.Identity(), nn.Linear(width, width))
        layers = []
        for _ in range(depth):
            mha = nn.MultiheadAttention(width, heads, batch_first=True)
            net = nn.Sequential(nn.Linear(width, mlp), nn.GELU(), nn.Identity(),
                                nn.Linear(mlp, width))
            layers.append(nn.ModuleList([Residual(width, mha=mha), Residual(width, net=net)]))
        self.transformer = nn.Module()
        self.transformer.layers = nn.ModuleList(layers)
        self.last_layer = nn.Sequential(
            nn.LayerNorm(width, eps=1e-12), nn.Identity(), nn.Linear(width, width), nn.GELU(),
            nn.LayerNorm(width, eps=1e-12))
        self.init_weights()

    def init_weights(self):
        """Every layer begins by keeping the variance. Officially the standard deviation is 0.02
        everywhere, with which small widths learn slowly at first."""
        for p in self.parameters():
            if p is self.pos_emb or p is self.tok_emb.weight:
                nn.init.normal_(p, std=0.02)
            elif p.ndim > 1 and p is not self.bias:
                nn.init.normal_(p, std=p.shape[1] ** -0.5)

    def forward(self, z, labels, drop=None):
        row = self.K + 1 + labels                                               # (B,)
        if drop is not None:
            row = torch.where(drop, self.K + 1 + self.num_classes, row)
        x = self.tok_emb(torch.cat([z, row[:, None]], 1)) + self.pos_emb        # (B, L + 1, width)
        x = self.first_layer(x)
        for attention, mlp in self.transformer.layers:
            x = mlp(attention(x))
        # over the codes alone: an answer is never "mask" or a class
        x = self.last_layer(x[:, :self.L])                                      # (B, L, width)
        return x @ self.tok_emb.weight[:self.K].T + self.bias[:self.L, :self.K]


def load_maskgit(src, **sizes):
    """The official MaskGIT, version 1: `pretrained_maskgit/MaskGIT/MaskGIT_ImageNet_256.pth` of
    llvictorll/Maskgit-pytorch on the hub. sizes: of a network of another size (tests)."""
    # 16 heads, where the official default is 8: the shapes of the weights do not tell
    released = dict(K=1024, L=256, num_classes=1000, width=768, depth=24, heads=16, mlp=3072)
    with torch.device("meta"):
        model = MaskGIT(**released | sizes)
    return load_weights(model, src)


def imagenet_names():
    """The names of the 1000 classes. Namesakes carry their number: "crane 134", "crane 517"."""
    import_timm()
    from timm.data import ImageNetInfo
    info = ImageNetInfo()
    # the first of several synonyms
    names = [info.index_to_description(i).split(",")[0] for i in range(1000)]
    return [f"{name} {i}" if names.count(name) > 1 else name for i, name in enumerate(names)]


# ---------------------------------------------------------------- MaskGen (Kim et al. 2025)
# How pleasing the images are to be: the score that the released configuration has for sampling
AESTHETIC_SCORE = 6.5


class AdaptiveNorm(nn.Module):
    """n vectors (B, 1, width) from the condition (B, width): shifts, scales and gates.
    The LayerNorm itself, `modulate`, has no weights."""
    def __init__(self, width, n):
        super().__init__()
        self.n = n
        self.linear = nn.Linear(width, n * width)

    def forward(self, cond):
        return self.linear(F.silu(cond))[:, None].chunk(self.n, -1)


def modulate(x, shift, scale):
    """x (B, rows, width), shift and scale (B, 1, width)."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


class FeedForward(nn.Module):
    def __init__(self, width):
        super().__init__()
        # the official keys: net.0.proj and net.2
        self.net = nn.ModuleList([nn.Module(), nn.Identity(), nn.Linear(4 * width, width)])
        self.net[0].proj = nn.Linear(width, 4 * width)

    def forward(self, x):
        return self.net[2](F.gelu(self.net[0].proj(x), approximate="tanh"))


class JointAttention(nn.Module):
    """Image tokens and text states attend to both, each stream through its own projections."""
    def __init__(self, width, heads, last):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.add_q_proj = nn.Linear(width, width)
        self.add_k_proj = nn.Linear(width, width)
        self.add_v_proj = nn.Linear(width, width)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])
        if not last:
            self.to_add_out = nn.Linear(width, width)

    def split_heads(self, x):
        """(B, rows, width) -> (B, heads, rows, width / heads)"""
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)

    def forward(self, x, text):
        """x (B, L, width), text (B, T, width) -> the same shapes, text before `to_add_out`."""
        L = x.shape[1]
        q = self.split_heads(torch.cat([self.to_q(x), self.add_q_proj(text)], 1))
        k = self.split_heads(torch.cat([self.to_k(x), self.add_k_proj(text)], 1))
        v = self.split_heads(torch.cat([self.to_v(x), self.add_v_proj(text)], 1))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.to_out[0](mixed[:, :L]), mixed[:, L:]


class JointBlock(nn.Module):
    """Block of Stable Diffusion 3. The last one reads the text without changing it."""
    def __init__(self, width, heads, last):
        super().__init__()
        self.last = last
        self.norm1 = AdaptiveNorm(width, 6)
        self.norm1_context = AdaptiveNorm(width, 2 if last else 6)
        self.attn = JointAttention(width, heads, last)
        self.ff = FeedForward(width)
        if not last:
            self.ff_context = FeedForward(width)

    def forward(self, x, text, cond):
        """x (B, L, width), text (B, T, width), cond (B, width) -> x, text."""
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.norm1(cond)
        of_text = self.norm1_context(cond)
        if self.last:
            # the official layer gives them in this order
            text_scale, text_shift = of_text
        else:
            text_shift, text_scale, text_gate = of_text[:3]
            text_mlp_shift, text_mlp_scale, text_mlp_gate = of_text[3:]
        from_x, from_text = self.attn(modulate(x, shift, scale),
                                      modulate(text, text_shift, text_scale))
        x = x + gate * from_x
        x = x + mlp_gate * self.ff(modulate(x, mlp_shift, mlp_scale))
        if not self.last:
            text = text + text_gate * self.attn.to_add_out(from_text)
            changed = self.ff_context(modulate(text, text_mlp_shift, text_mlp_scale))
            text = text + text_mlp_gate * changed
        return x, text


def score_encoding(score, width):
    """Scores (B,) -> (B, width): sines, then cosines; the usual 10000 is 1000 here."""
    half = width // 2
    exponents = -math.log(1000) * torch.arange(half, device=score.device) / half
    # in float32 the last bit of exp depends on the processor, which moves angles of 650 by 4e-5
    frequencies = exponents.double().exp().float()
    angles = 100 * score[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], 1)


class MaskGen(nn.Module):
    """Bidirectional transformer over L image tokens and text. Defaults: a small world's.

    text_width    W, of the text c (B, rows, W): row 0 is the pooled vector, rows 1..T are what the
                  image tokens attend to; further rows are not read
    score_width   of the encoding of AESTHETIC_SCORE, which joins the pooled vector; 0: none
    unused_rows   of the token table behind codes and mask; the official file has some
    .empty        (1 + T, W), c of the empty caption, by which `drop` replaces c. Zeros until it is
                  set (sample.set_text); not in the state dict

    forward(z (B, L) long 0..K, c (B, >= 1 + T, W), drop (B,) bool | None: True = empty caption)
        -> logits (B, L, K)
    """
    def __init__(self, K=128, L=64, width=128, depth=4, heads=4, text_width=128, T=12,
                 score_width=0, unused_rows=0):
        super().__init__()
        self.K, self.L, self.score_width = K, L, score_width
        self.pos_embed = nn.Parameter(torch.zeros(1, L, width))
        self.text_embed_proj = nn.Linear(text_width, width)
        self.cond_pooled_proj = nn.Linear(text_width + score_width, width)
        self.blocks = nn.ModuleList(JointBlock(width, heads, last=i == depth - 1)
                                    for i in range(depth))
        self.norm = AdaptiveNorm(width, 2)
        # 0 .. K-1 codes | K mask | unused; the output layer has the same weights
        self.embeddings = nn.Embedding(K + 1 + unused_rows, width)
        self.register_buffer("empty", torch.zeros(1 + T, text_width), persistent=False)
        self.init_weights()

    def init_weights(self):
        """Every layer begins by keeping the variance: with 0.02 everywhere, small widths need twice
        the steps for the same loss. Gates of 0 make every block begin as the identity."""
        for p in self.parameters():
            if p.ndim > 1:
                nn.init.trunc_normal_(p, std=0.02)
            else:
                nn.init.zeros_(p)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features ** -0.5)
        for module in self.modules():
            if isinstance(module, AdaptiveNorm):
                nn.init.zeros_(module.linear.weight)

    def forward(self, z, c, drop=None):
        c = c[:, :len(self.empty)]                                              # (B, 1 + T, W)
        if drop is not None:
            c = torch.where(drop[:, None, None], self.empty, c)
        pooled = c[:, 0]                                                        # (B, W)
        if self.score_width:
            score = torch.full((len(c),), AESTHETIC_SCORE, device=c.device)
            pooled = torch.cat([pooled, score_encoding(score, self.score_width)], 1)
        cond = self.cond_pooled_proj(pooled)                                    # (B, width)
        text = self.text_embed_proj(c[:, 1:])                                   # (B, T, width)
        x = self.embeddings(z) + self.pos_embed                                 # (B, L, width)
        for block in self.blocks:
            x, text = block(x, text, cond)
        # the official layer gives them in this order
        scale, shift = self.norm(cond)
        # over the codes alone: an answer is never "mask"
        return modulate(x, shift, scale) @ self.embeddings.weight[:self.K].T    # (B, L, K)


def load_maskgen(src, **sizes):
    """The official MaskGen-L VQ: `model.safetensors` of turkeyju/generator_maskgen_vq_l on the hub,
    or `maskgen_vq_l.bin` of fun-research/MaskGen. sizes: of a network of another size (tests)."""
    # the unused rows are those of 1000 classes and a null class
    released = dict(K=8192, L=128, width=1024, depth=16, heads=16, text_width=768, T=77,
                    score_width=256, unused_rows=1001)
    state = dict(read_weights(src))
    # the token table is the output layer, too: files have it under either name, or under both
    if "lm_head.weight" in state:
        table = state.pop("lm_head.weight")
        state.setdefault("embeddings.weight", table)
    with torch.device("meta"):
        model = MaskGen(**released | sizes)
    load_weights(model, state)
    # not in the file, hence made without values
    model.empty.zero_()
    return model


# ---------------------------------------------------------------- words: text of the scenes world
class Words(nn.Module):
    """Text c of the scenes world's captions, with nothing to learn: every row is a sum of random
    vectors, one for each word of the caption and its distance from the row.

    So the row of "square" also tells that it is blue, and above something, as CLIP's rows do. The
    small teacher's few minutes do not suffice to learn that from words and positions alone.
    width: W. T: rows; captions have at most 8 words
    """
    def __init__(self, width=128, T=12):
        super().__init__()
        self.T = T
        generator = torch.Generator().manual_seed(0)
        vectors = torch.randn(2 * T + 1, len(SCENE_WORDS), width, generator=generator)
        self.register_buffer("vectors", vectors)

    def encode(self, captions):
        """Captions, a list of str -> c (B, 1 + T, W). Row 0 stands before the first word, row i at
        the i-th; rows behind the last word are zeros, as is all of "", which means "no condition".
        ValueError for what parse_caption does not know."""
        c = self.vectors.new_zeros(len(captions), 1 + self.T, self.vectors.shape[2])
        for row, caption in zip(c, captions):
            if not caption.strip():
                continue
            parse_caption(caption)
            words = torch.tensor([SCENE_WORDS.index(word) for word in caption.lower().split()])
            at = torch.arange(len(words) + 1)
            # of each word from each row, between -T and T
            distance = at[1:] - at[:, None]                             # (1 + words, words)
            row[at] = self.vectors[self.T + distance, words].sum(1) / len(words) ** 0.5
        return c


# ---------------------------------------------------------------- CLIP (Radford et al. 2021)
class TextEncoder(nn.Module):
    """The text tower of CLIP ViT-L/14-336 as open_clip builds it (its name there:
    ViT-L-14-336-quickgelu), with random weights.

    It makes the text c of MaskGen-L and TA-TiTok, (B, 1 + 77 + 77, width) float32:
        row 0        the pooled vector: the final state at the end of the text, projected
        rows 1..77   states before the last block, without final norm: what MaskGen attends to
        the last 77  states after the last block and the final norm: what guides TA-TiTok
    """
    def __init__(self, width=768, depth=12, heads=12):
        super().__init__()
        # open_clip imports torchvision as well
        import_timm()
        from open_clip import get_tokenizer
        from open_clip.transformer import QuickGELU, TextTransformer
        self.tokenizer = get_tokenizer("ViT-L-14-336-quickgelu")
        self.tower = TextTransformer(width=width, layers=depth, heads=heads, output_dim=width,
                                     act_layer=QuickGELU)
        # OpenAI trained with x sigmoid(1.702 x). Some releases of open_clip build these towers with
        # GELU and only warn, and every text comes out slightly wrong
        blocks = self.tower.transformer.resblocks
        if not all(isinstance(block.mlp.gelu, QuickGELU) for block in blocks):
            raise ValueError("this release of open_clip builds CLIP's text tower without QuickGELU")

    @torch.no_grad()
    def states(self, ids):
        """Token ids (B, 77), 0 behind the end token -> c (B, 155, width)."""
        tower = self.tower
        x = tower.token_embedding(ids) + tower.positional_embedding     # (B, 77, width)
        for block in tower.transformer.resblocks:
            before_last = x
            x = block(x, attn_mask=tower.attn_mask)
        x = tower.ln_final(x)
        # the end token has the largest id
        end = ids.argmax(1)                                             # (B,)
        pooled = x[torch.arange(len(x), device=x.device), end] @ tower.text_projection
        return torch.cat([pooled[:, None], before_last, x], 1).float()

    def encode(self, captions):
        """Captions, a list of str -> c (B, 155, width). "" is the empty caption, which stands for
        "no condition". What is longer than 75 tokens is cut off."""
        ids = self.tokenizer(captions)                                  # (B, 77)
        # non_blocking: without waiting for the work that a GPU has still to do
        return self.states(ids.to(self.tower.positional_embedding.device, non_blocking=True))


def load_text_encoder(src):
    """CLIP's text tower with OpenAI's weights: `open_clip_model.safetensors` of
    timm/vit_large_patch14_clip_336.openai, what open_clip's tag "openai" loads."""
    encoder = TextEncoder()
    load_weights(encoder.tower, src, unused=("visual.", "logit_scale"))
    return encoder.eval()


# ---------------------------------------------------------------- Phi and judge of the small worlds
class ConvNet(nn.Module):
    """A small residual classifier, trained here on the world's classes. Used twice, with different
    seeds and widths: as Phi, and as the judge of the samples, in evaluate.py alone."""
    def __init__(self, num_classes=24, width=32):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, stride=2, padding=1)
        # channels in, channels out, stride
        sizes = [(width, width, 1), (width, 2 * width, 2), (2 * width, 2 * width, 1),
                 (2 * width, 4 * width, 2)]
        self.blocks = nn.ModuleList(self.block(a, b, stride) for a, b, stride in sizes)
        self.skips = nn.ModuleList(nn.Conv2d(a, b, 1, stride=stride) for a, b, stride in sizes)
        self.head = nn.Linear(4 * width, num_classes)

    @staticmethod
    def block(a, b, stride):
        return nn.Sequential(
            nn.Conv2d(a, b, 3, stride=stride, padding=1), nn.BatchNorm2d(b), nn.ReLU(),
            nn.Conv2d(b, b, 3, padding=1), nn.BatchNorm2d(b))

    def maps(self, images, blocks=(0, 1, 2, 3)):
        """Images (B, 3, H, W) in [-1, 1] -> the outputs of these blocks, each (B, D, h, w)."""
        x = F.relu(self.stem(images))
        maps = []
        for block, skip in zip(self.blocks, self.skips):
            x = F.relu(block(x) + skip(x))
            maps.append(x)
        return [maps[i] for i in blocks]

    def forward(self, images):
        """-> features (B, 4 width), logits (B, num_classes)."""
        features = self.maps(images)[-1].mean((2, 3))
        return features, self.head(features)


# ---------------------------------------------------------------- Phi: DINOv3 (Simeoni et al. 2025)
BACKBONE = "vit_base_patch16_dinov3.lvd1689m"


class Backbone(nn.Module):
    """The feature network Phi of Sec. 3.3, with random weights: DINOv3 ViT-B/16, or another vision
    transformer by its name in timm.

    image_size   pixels per side that it looks at; images of other sizes are resized to it. With a
                 fixed size, DINOv3 computes its encoding of positions once, not in every pass
    """
    def __init__(self, name=BACKBONE, image_size=256):
        super().__init__()
        self.image_size = image_size
        self.net = import_timm().create_model(name, num_classes=0, img_size=image_size,
                                              dynamic_img_size=False)
        # of the images that it was trained on; not in its file
        for key in ("mean", "std"):
            value = torch.tensor(self.net.pretrained_cfg[key]).view(1, 3, 1, 1)
            self.register_buffer(key, value, persistent=False)

    def maps(self, images, blocks=(2, 5, 8, 11)):
        """Images (B, 3, H, W) in [-1, 1] -> the raw outputs of these blocks, without final norm and
        without class and register tokens: (B, D, image_size / patch, image_size / patch) each.

        Gradients reach the images. Values beyond [-1, 1] are not clamped (Sec. 3.3).
        """
        if images.shape[-1] != self.image_size:
            images = F.interpolate(images, (self.image_size, self.image_size), mode="bilinear")
        x = ((images + 1) / 2 - self.mean) / self.std
        return self.net.forward_intermediates(x, indices=list(blocks), norm=False, stop_early=True,
                                              intermediates_only=True)


def find_backbone(name, folder):
    """Path of a timm network's weights: <folder>/<name>.safetensors, else from the hub."""
    repo = import_timm().get_pretrained_cfg(name).hf_hub_id
    return find_weights(folder, f"{name}.safetensors", repo, "model.safetensors")


def load_backbone(src, image_size=256, name=BACKBONE):
    """A vision transformer with pretrained weights, from a path or state dict with timm's keys."""
    backbone = Backbone(name, image_size)
    # classifiers, and constants of the positions that timm computes itself
    load_weights(backbone.net, src, unused=("head.", "head_dist.", "rope."))
    return backbone.eval()


# ---------------------------------------------------------------- the discriminator (Sec. 3.4)
# StyleGAN-XL's feature networks by timm's names: a vision transformer and a convolutional one
FEATURE_NETWORKS = {"deit": "deit_base_distilled_patch16_224",
                    "efficientnet": "tf_efficientnet_lite0"}


class EfficientNet(nn.Module):
    """The convolutional feature network. It looks at images of 224 x 224 pixels or more."""
    def __init__(self):
        super().__init__()
        self.net = import_timm().create_model(FEATURE_NETWORKS["efficientnet"], features_only=True,
                                              out_indices=(1, 2, 3, 4))

    def maps(self, images):
        """Images (B, 3, H, W) in [-1, 1] -> (B, D, h, w) at 1/4, 1/8, 1/16, 1/32 of the side."""
        if images.shape[-1] < 224:
            images = F.interpolate(images, (224, 224), mode="bilinear")
        return self.net(images)


class Projection(nn.Module):
    """Mixes the maps of a feature network over channels and scales, at random (Sauer et al. 2021),
    so that the heads cannot settle on a few channels. Never trained.

    maps    (B, D, h, w), four from fine to coarse, of which only the shapes matter here: each mixed
            map has the size of the next finer one, the finest twice its own
    width   channels of the finest mixed map
    """
    def __init__(self, maps, width):
        super().__init__()
        D = [m.shape[1] for m in maps]
        if maps[0].shape == maps[3].shape:
            # a vision transformer's maps, of one size: they are made into a pyramid
            D = [D[0] // 8, D[0] // 4, D[0] // 2, D[0]]
            resize = [nn.ConvTranspose2d(D[0], D[0], 4, stride=4),
                      nn.ConvTranspose2d(D[1], D[1], 2, stride=2),
                      nn.Identity(),
                      nn.Conv2d(D[3], D[3], 3, stride=2, padding=1)]
            self.pretrained = nn.ModuleDict()
            for i, m in enumerate(maps):
                # "3", "4": the official keys count the reshaping before
                layers = OrderedDict({"3": nn.Conv2d(m.shape[1], D[i], 1), "4": resize[i]})
                self.pretrained[f"layer{i + 1}"] = nn.Sequential(layers)
        self.scratch = nn.ModuleDict()
        for i, channels in enumerate([width, 2 * width, 4 * width, 8 * width]):
            # ccm: cross-channel mixing, csm: cross-scale mixing
            self.scratch[f"layer{i}_ccm"] = nn.Conv2d(D[i], channels, 1)
            out_conv = nn.Conv2d(channels, max(width, channels // 2), 1)
            self.scratch[f"layer{i}_csm"] = nn.ModuleDict({"out_conv": out_conv})
        self.requires_grad_(False)

    def forward(self, maps):
        if hasattr(self, "pretrained"):
            maps = [layer(m) for layer, m in zip(self.pretrained.values(), maps)]
        h, w = maps[0].shape[2:]
        sizes = [(2 * h, 2 * w)] + [m.shape[2:] for m in maps[:3]]
        mixed = []
        below = 0.0
        for i in (3, 2, 1, 0):
            x = self.scratch[f"layer{i}_ccm"](maps[i]) + below
            x = self.scratch[f"layer{i}_csm"]["out_conv"](x)
            # officially it is enlarged before out_conv, which is the same for four times the work
            below = F.interpolate(x, sizes[i], mode="bilinear", align_corners=True)
            mixed.insert(0, below)
        return mixed


def head(channels, size, width):
    """A small network with spectral norm, (B, channels, size, size) -> (B, 1, n, n): it halves the
    side until it is about 8, then come the logits; n is 4 or 5 for maps of 8 pixels and more."""
    halvings = max(1, round(math.log2(size / 8)))
    layers = []
    for i in range(halvings):
        out = 8 * width >> (halvings - 1 - i)
        conv = spectral_norm(nn.Conv2d(channels, out, 4, stride=2, padding=1))
        block = nn.Sequential(conv, nn.BatchNorm2d(out), nn.LeakyReLU(0.2))
        layers.append(nn.Sequential(OrderedDict(main=block)))
        channels = out
    kernel = min(4, size >> halvings)
    layers.append(spectral_norm(nn.Conv2d(channels, 1, kernel, bias=False)))
    return nn.Sequential(OrderedDict(main=nn.Sequential(*layers)))


class Discriminator(nn.Module):
    """The projected discriminator of StyleGAN-XL (Sauer et al. 2022), unconditional: feature
    network -> `Projection` -> four heads, for each feature network. Only the heads are trained.

    networks     name -> module with .maps(images (B, 3, H, W) in [-1, 1]) -> four maps, fine to
                 coarse: StyleGAN-XL's two (`load_discriminator`) or Phi alone (the small worlds)
    image_size   pixels per side of the images
    width        channels of the finest mixed map

    forward(images, augment=None: a function of images, called anew for each network)
        -> list of logits (B, n), one per network
    In training mode the heads' BatchNorm takes its statistics from the batch: real images and
    drafts go through in separate calls.
    """
    def __init__(self, networks, image_size=256, width=64):
        super().__init__()
        # a plain dict: as submodules, the frozen networks would be saved with the discriminator,
        # and its train() would reach them
        self.networks = dict(networks)
        self.feature_networks = nn.ModuleDict()
        self.discriminators = nn.ModuleDict()
        for name, network in self.networks.items():
            network.eval().requires_grad_(False)
            device = next(network.parameters()).device
            with torch.no_grad():
                maps = network.maps(torch.zeros(1, 3, image_size, image_size, device=device))
                maps = [m.cpu() for m in maps]
                projection = Projection(maps, width)
                mixed = projection(maps)
            heads = nn.ModuleList(head(m.shape[1], m.shape[2], width) for m in mixed)
            self.feature_networks[name] = projection
            self.discriminators[name] = nn.ModuleDict({"mini_discs": heads})

    def forward(self, images, augment=None):
        logits = []
        for name, network in self.networks.items():
            seen = augment(images) if augment else images
            mixed = self.feature_networks[name](network.maps(seen))
            heads = self.discriminators[name]["mini_discs"]
            of_heads = [head(m).flatten(1) for head, m in zip(heads, mixed)]
            logits.append(torch.cat(of_heads, 1))                       # (B, n)
        return logits


def load_discriminator(weights, image_size=256, device="cpu"):
    """StyleGAN-XL's discriminator: pretrained feature networks; all else is random, as when its
    training began. weights: {"deit": ..., "efficientnet": ...}, as of load_backbone."""
    deit = load_backbone(weights["deit"], 224, FEATURE_NETWORKS["deit"])
    efficientnet = EfficientNet()
    load_weights(efficientnet.net, weights["efficientnet"],
                 unused=("conv_head.", "bn2.", "classifier."))
    networks = {FEATURE_NETWORKS["deit"]: deit.to(device),
                FEATURE_NETWORKS["efficientnet"]: efficientnet.to(device)}
    return Discriminator(networks, image_size).to(device)


# ---------------------------------------------------------------- FID's Inception (2015)
# Not on the hub: from https://github.com/mseitzer/pytorch-fid, release fid_weights
INCEPTION = "pt_inception-2015-12-05-6726825d.pth"


def resize_tensorflow1(x, size):
    """Bilinear, source coordinate = i * in / out without the half pixel, no antialiasing.
    (B, C, H, W) float -> (B, C, size, size)."""
    def neighbours(n):
        # float32, like the original: the last bits count here
        at = torch.arange(size, dtype=x.dtype, device=x.device) * (n / size)
        low = at.long()
        return low, (low + 1).clamp(max=n - 1), at - low
    low, high, share = neighbours(x.shape[3])
    x = x[..., low] * (1 - share) + x[..., high] * share                # (B, C, H, size)
    low, high, share = neighbours(x.shape[2])
    share = share[:, None]
    return x[:, :, low] * (1 - share) + x[:, :, high] * share


class Inception(nn.Module):
    """The feature network of FID and of the Inception Score (Szegedy et al. 2015), Google's of
    2015-12-05: timm's Inception-v3 but for how two kinds of blocks pool.

    forward(images (B, 3, H, W) uint8, path) -> features (B, 2048), logits (B, 1008)
    The logits lack their bias, because the original Inception Score and torch-fidelity ignore it.
    The path is one of two ways to resize the images, which give different scores:
    "pytorch-fid"   torch's bilinear resize to 299 x 299, scaled to [-1, 1]
    "legacy"        TensorFlow 1's resize and scaling, as in torch-fidelity, Di[M]O and the ADM
                    references
    """
    def __init__(self):
        super().__init__()
        self.net = import_timm().create_model("inception_v3", num_classes=1008)

    @torch.no_grad()
    def forward(self, images, path="pytorch-fid"):
        assert path in ("pytorch-fid", "legacy"), path
        if images.dtype != torch.uint8:
            raise ValueError(f"Inception wants uint8 images, got {images.dtype}: rounding to 8 "
                             "bits is part of the score")
        x = images.to(self.net.fc.weight.device).float()
        if path == "pytorch-fid":
            x = F.interpolate(x / 255, (299, 299), mode="bilinear", align_corners=False)
            x = 2 * x - 1
        else:
            x = (resize_tensorflow1(x, 299) - 128) / 128
        # TF32, a GPU's default for convolutions, rounds to 10 bits, which changes the score
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            for name, block in self.net.named_children():
                if name == "global_pool":
                    break
                if not hasattr(block, "branch_pool"):
                    x = block(x)
                    continue
                # a block of parallel branches, whose last one pools in the original's way
                if name == "Mixed_7c":
                    # a slip of the original in its last block, now part of FID
                    pooled = F.max_pool2d(x, 3, stride=1, padding=1)
                else:
                    # TensorFlow averages without the padding
                    pooled = F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
                # the last one of timm's branches is its own pooling
                branches = block._forward(x)[:-1]
                x = torch.cat([*branches, block.branch_pool(pooled)], 1)
        features = x.mean((2, 3))                                       # (B, 2048)
        return features, F.linear(features, self.net.fc.weight)         # no bias


def load_inception(src):
    """The FID Inception, from pytorch-fid's file or torch-fidelity's, which is equal."""
    inception = Inception()
    load_weights(inception.net, src)
    return inception.eval()


# ---------------------------------------------------------------- the paper's public networks
# On the Hugging Face hub: repository, file, loader
MASKGIT_REPO = "llvictorll/Maskgit-pytorch"
OFFICIAL = {
    "imagenet": {
        "tokenizer": (MASKGIT_REPO, "pretrained_maskgit/VQGAN/last.ckpt", load_vqgan),
        "teacher": (MASKGIT_REPO, "pretrained_maskgit/MaskGIT/MaskGIT_ImageNet_256.pth",
                    load_maskgit)},
    "laion": {
        "tokenizer": ("turkeyju/tokenizer_tatitok_bl128_vq", "model.safetensors", load_tatitok),
        "teacher": ("turkeyju/generator_maskgen_vq_l", "model.safetensors", load_maskgen),
        "text": ("timm/vit_large_patch14_clip_336.openai", "open_clip_model.safetensors",
                 load_text_encoder)}}
# How the public teachers are sampled. MaskGIT: the settings that Di[M]O's code has for it (their
# w = 3 is our guidance 4). MaskGen: its authors' configuration (their guidance 12 is our 13)
PUBLIC = {"imagenet": dict(sample_guidance=4.0, confidence_noise=4.5),
          "laion": dict(sample_guidance=13.0, confidence_noise=2.0)}
# What the public MaskGen draws where no prompt is given
PROMPTS = ["a photo of a dog", "a red car next to a blue house",
           "three green apples on a wooden table", "a lighthouse at sunset", "a bowl of soup",
           "a small boat on a lake in the mountains", "an astronaut riding a horse",
           "a yellow bird above a white fence"]

"""models.py - the networks of the paper, and how their public weights are loaded.

MaskGIT              tokens z (B, L), labels (B,) -> logits (B, L, K): teacher and student
MaskGen              tokens z (B, L), text c (B, rows, W) -> logits (B, L, K): the same for captions
Words, TextEncoder   captions -> text c (B, rows, W), a pooled row and then states. Words is our
                     own, for the scenes world; TextEncoder is CLIP's
ConvNet, Backbone    images (B, 3, H, W) -> maps (B, D, h, w): Phi, small and large (Sec. 3.3)
Discriminator        images -> logits (B, n), real or draft: for the optional GAN (Sec. 3.4)
Inception            images -> features, logits: for FID and Inception Score (evaluate.py)

Public networks are those whose weights anybody can download. Each load_* function knows the sizes
of one of them, and loads its file strictly, by the key names of the official code, which is the
code of its authors. In our small worlds (see tokenizer.py) MaskGIT and MaskGen are smaller.
"""
import math
from collections import OrderedDict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import spectral_norm

from tokenizer import (SCENE_WORDS, load_tatitok, load_vqgan, load_weights, parse_caption,
                       read_weights, without_values)


# ---------------------------------------------------------------- weights of public networks
# Their files are looked for in this folder, unless --weights names another one.
WEIGHTS = "weights"


def find_weights(folder, name, repo, filename):
    """Path of a weight file: <folder>/<name> if it exists, otherwise the file of a Hugging Face
    repository, which is downloaded once. If both fail, the ValueError says which file is needed."""
    path = Path(folder, name)
    if path.is_file():
        return path
    # This import is slow, and the small worlds do not need it.
    from huggingface_hub import hf_hub_download
    try:
        return Path(hf_hub_download(repo, filename))
    except Exception as error:
        # The hub raises errors of many types: offline, no such repository, disk full, ...
        raise ValueError(f"there is no file {path}, and the Hugging Face hub cannot be reached or "
                         f"does not have it ({type(error).__name__}). Download {filename} of "
                         f"repository {repo} to this path, or name another folder with --weights"
                         ) from None


def import_timm():
    """Import timm even if the installed torchvision does not fit torch, for example PyPI's
    torchvision beside a CPU build of torch.

    In this case the compiled part of torchvision cannot be loaded, and its import fails because two
    operators are undefined. timm and open_clip use neither, so it is enough to declare them.
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
    """x + fn(norm(x)), where fn is attention ("mha") or an MLP ("net")."""
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
    """Bidirectional transformer over L image tokens and a class token. The default sizes are for
    the small worlds.

    One table with K + 1 + num_classes + 1 rows embeds codes, mask and classes:
        0 .. K-1 codes | K mask | K+1 .. K+num_classes classes | the last row: null class

    forward(z (B, L) long 0..K, labels (B,) long, drop (B,) bool or None) -> logits (B, L, K)
    Where drop is True, the null class replaces the label.
    """
    def __init__(self, K=128, L=64, num_classes=24, width=128, depth=4, heads=4, mlp=512):
        super().__init__()
        self.K, self.L, self.num_classes = K, L, num_classes
        rows = K + 1 + num_classes + 1
        self.pos_emb = nn.Parameter(torch.zeros(1, L + 1, width))
        # The bias of the output has one number per position and row of the table.
        self.bias = nn.Parameter(torch.zeros(L + 1, rows))
        self.tok_emb = nn.Embedding(rows, width)
        # The official key names count the dropout modules, so an Identity replaces each of them.
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
        """Initialise every layer such that it keeps the variance. With the official standard
        deviation, which is 0.02 everywhere, small widths learn slowly at first."""
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
        # Only the codes have logits, so the network never predicts the mask or a class.
        x = self.last_layer(x[:, :self.L])                                      # (B, L, width)
        return x @ self.tok_emb.weight[:self.K].T + self.bias[:self.L, :self.K]


def load_maskgit(src, **sizes):
    """The public MaskGIT, version 1. src: see `load_weights`; PUBLIC names the file. sizes: other
    sizes, for the tests."""
    # The public network has 16 heads. The default of the official code is 8, which also fits the
    # weights.
    public = dict(K=1024, L=256, num_classes=1000, width=768, depth=24, heads=16, mlp=3072)
    return load_weights(without_values(MaskGIT, **public | sizes), src)


def imagenet_names():
    """The names of the 1000 classes. If two classes have the same name, their numbers follow:
    "crane 134", "crane 517"."""
    import_timm()
    from timm.data import ImageNetInfo
    info = ImageNetInfo()
    # Each description is a list of synonyms, of which we take the first.
    names = [info.index_to_description(i).split(",")[0] for i in range(1000)]
    return [f"{name} {i}" if names.count(name) > 1 else name for i, name in enumerate(names)]


# ---------------------------------------------------------------- MaskGen (Kim et al. 2025)
# MaskGen's condition includes a score of how pleasing the image should be. This is the score with
# which the official configuration samples.
AESTHETIC_SCORE = 6.5


class AdaptiveNorm(nn.Module):
    """Computes n vectors (B, 1, width) from the condition (B, width): shifts, scales and gates. The
    LayerNorm to which they belong has no weights of its own; see `modulate`."""
    def __init__(self, width, n):
        super().__init__()
        self.n = n
        self.linear = nn.Linear(width, n * width)

    def forward(self, cond):
        return self.linear(F.silu(cond))[:, None].chunk(self.n, -1)


def modulate(x, shift, scale):
    """LayerNorm, then scale and shift. x (B, rows, width), shift and scale (B, 1, width)."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


class FeedForward(nn.Module):
    def __init__(self, width):
        super().__init__()
        # The official key names are net.0.proj and net.2.
        self.net = nn.ModuleList([nn.Module(), nn.Identity(), nn.Linear(4 * width, width)])
        self.net[0].proj = nn.Linear(width, 4 * width)

    def forward(self, x):
        return self.net[2](F.gelu(self.net[0].proj(x), approximate="tanh"))


class JointAttention(nn.Module):
    """Image tokens and text states all attend to each other, but have separate projections."""
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
        """(B, rows, width) -> (B, heads, rows, width / heads)."""
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)

    def forward(self, x, text):
        """x (B, L, width), text (B, T, width) -> the same shapes. JointBlock applies the last
        projection of the text, `to_add_out`."""
        L = x.shape[1]
        q = self.split_heads(torch.cat([self.to_q(x), self.add_q_proj(text)], 1))
        k = self.split_heads(torch.cat([self.to_k(x), self.add_k_proj(text)], 1))
        v = self.split_heads(torch.cat([self.to_v(x), self.add_v_proj(text)], 1))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # (B, L + T, width)
        return self.to_out[0](y[:, :L]), y[:, L:]


class JointBlock(nn.Module):
    """A block of Stable Diffusion 3. The last block reads the text but does not change it."""
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
        if self.last:
            # In the official layer of the last block, the scale comes first.
            text_scale, text_shift = self.norm1_context(cond)
        else:
            (text_shift, text_scale, text_gate,
             text_mlp_shift, text_mlp_scale, text_mlp_gate) = self.norm1_context(cond)
        y, text_y = self.attn(modulate(x, shift, scale), modulate(text, text_shift, text_scale))
        x = x + gate * y
        x = x + mlp_gate * self.ff(modulate(x, mlp_shift, mlp_scale))
        if not self.last:
            text = text + text_gate * self.attn.to_add_out(text_y)
            text_y = self.ff_context(modulate(text, text_mlp_shift, text_mlp_scale))
            text = text + text_mlp_gate * text_y
        return x, text


def score_encoding(score, width):
    """Sinusoidal encoding of scores (B,) -> (B, width), sines first, then cosines. The constant
    1000 is the official one; 10000 is more usual."""
    half = width // 2
    exponents = -math.log(1000) * torch.arange(half, device=score.device) / half
    # exp is computed in float64: in float32 its last bit depends on the processor, and would change
    # angles of 650 by 4e-5.
    frequencies = exponents.double().exp().float()
    angles = 100 * score[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], 1)


class MaskGen(nn.Module):
    """Bidirectional transformer over L image tokens and text. The default sizes are for the small
    worlds.

    text_width    width W of the text c (B, rows, W). Row 0 of c is the pooled vector, and rows 1..T
                  are the states that the image tokens attend to. Further rows are not read.
    score_width   width of the encoding of AESTHETIC_SCORE, which is appended to the pooled vector;
                  0 means no score
    unused_rows   rows of the official token table that are neither codes nor mask
    .empty        (1 + T, W), the text c of the empty caption. sample.set_text sets it; until then
                  it is zero. It is not in the state dict.

    forward(z (B, L) long 0..K, c (B, >= 1 + T, W), drop (B,) bool or None) -> logits (B, L, K)
    Where drop is True, the empty caption replaces c.
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
        # 0 .. K-1 codes | K mask | unused. The output layer has the same weights.
        self.embeddings = nn.Embedding(K + 1 + unused_rows, width)
        self.register_buffer("empty", torch.zeros(1 + T, text_width), persistent=False)
        self.init_weights()

    def init_weights(self):
        """Initialise every layer such that it keeps the variance: with a standard deviation of 0.02
        everywhere, small widths need twice the steps for the same loss. All gates are 0 at first,
        so that every block starts as the identity."""
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
        # In the official layer the scale comes first here as well.
        scale, shift = self.norm(cond)
        # Only the codes have logits, so the network never predicts the mask.
        return modulate(x, shift, scale) @ self.embeddings.weight[:self.K].T    # (B, L, K)


def load_maskgen(src, **sizes):
    """The public MaskGen-L VQ. src: see `load_weights`; PUBLIC names the file, in place of which
    `maskgen_vq_l.bin` of fun-research/MaskGen can be read. sizes: other sizes, for the tests."""
    # The unused rows are for 1000 classes and a null class.
    public = dict(K=8192, L=128, width=1024, depth=16, heads=16, text_width=768, T=77,
                  score_width=256, unused_rows=1001)
    state = dict(read_weights(src))
    # The token table is also the output layer. A file has it under one or both of the two names.
    if "lm_head.weight" in state:
        state.setdefault("embeddings.weight", state["lm_head.weight"])
    model = without_values(MaskGen, **public | sizes)
    load_weights(model, state, unused="lm_head.weight")
    # `empty` is not in the file, so it does not have any values yet.
    model.empty.zero_()
    return model


# ---------------------------------------------------------------- words: text of the scenes world
class Words(nn.Module):
    """Text encoder for the captions of the scenes world. It learns nothing: every row is a sum of
    fixed random vectors. Each pair (word, distance of the word from the row) has its own vector.

    In this way the row of "square" also tells that the square is blue and above something, as the
    states of CLIP do. The small teacher trains for a few minutes only, too short to learn this from
    words and positions alone.

    width   W, the width of c
    T       number of rows after the pooled one. Captions have at most 8 words.
    """
    def __init__(self, width=128, T=12):
        super().__init__()
        self.T = T
        generator = torch.Generator().manual_seed(0)
        vectors = torch.randn(2 * T + 1, len(SCENE_WORDS), width, generator=generator)
        self.register_buffer("vectors", vectors)

    def encode(self, captions):
        """Captions, a list of str -> c (B, 1 + T, W). Row i belongs to the i-th word, and row 0 to
        the place before the first word. Rows after the last word are zero. All rows of "", which
        means "no condition", are zero. ValueError for captions that parse_caption does not know."""
        c = self.vectors.new_zeros(len(captions), 1 + self.T, self.vectors.shape[2])
        for row, caption in zip(c, captions):
            if not caption.strip():
                continue
            parse_caption(caption)
            words = torch.tensor([SCENE_WORDS.index(word) for word in caption.lower().split()])
            position = torch.arange(len(words) + 1)
            # The distance of each word from each row is between -T and T.
            distance = position[1:] - position[:, None]                 # (1 + words, words)
            row[position] = self.vectors[self.T + distance, words].sum(1) / len(words) ** 0.5
        return c


# ---------------------------------------------------------------- CLIP (Radford et al. 2021)
class TextEncoder(nn.Module):
    """The text encoder of CLIP ViT-L/14-336 as open_clip builds it under the name
    ViT-L-14-336-quickgelu, with random weights.

    It computes the text c of MaskGen-L and TA-TiTok, (B, 1 + 77 + 77, width) float32:
        row 0        the pooled vector: the final state of the end token, projected
        rows 1..77   states before the last block, without the final norm; MaskGen attends to them
        the last 77  states after the last block and the final norm; TA-TiTok's decoder reads them
    """
    def __init__(self, width=768, depth=12, heads=12):
        super().__init__()
        # open_clip imports torchvision as well, which import_timm makes possible.
        import_timm()
        from open_clip import get_tokenizer
        from open_clip.transformer import QuickGELU, TextTransformer
        self.tokenizer = get_tokenizer("ViT-L-14-336-quickgelu")
        self.tower = TextTransformer(width=width, layers=depth, heads=heads, output_dim=width,
                                     act_layer=QuickGELU)
        # OpenAI trained CLIP with QuickGELU, x sigmoid(1.702 x). Some versions of open_clip build
        # the network with GELU and only print a warning: every text is then slightly wrong.
        if not all(isinstance(block.mlp.gelu, QuickGELU)
                   for block in self.tower.transformer.resblocks):
            raise ValueError("this version of open_clip builds CLIP without QuickGELU")

    @torch.no_grad()
    def states(self, ids):
        """Token ids (B, 77), which are 0 after the end token -> c (B, 155, width)."""
        tower = self.tower
        x = tower.token_embedding(ids) + tower.positional_embedding     # (B, 77, width)
        for block in tower.transformer.resblocks:
            before_last = x
            x = block(x, attn_mask=tower.attn_mask)
        x = tower.ln_final(x)
        # The end token has the largest id.
        end = ids.argmax(1)                                             # (B,)
        pooled = x[torch.arange(len(x), device=x.device), end] @ tower.text_projection
        return torch.cat([pooled[:, None], before_last, x], 1).float()

    def encode(self, captions):
        """Captions, a list of str -> c (B, 155, width). The empty caption "" means "no condition".
        Captions are cut off after 75 tokens."""
        ids = self.tokenizer(captions)                                  # (B, 77)
        # non_blocking means that the copy does not wait until the GPU has finished earlier work.
        return self.states(ids.to(self.tower.positional_embedding.device, non_blocking=True))


def load_text_encoder(src):
    """CLIP's text encoder with OpenAI's weights: `open_clip_model.safetensors` of
    timm/vit_large_patch14_clip_336.openai, which open_clip loads for its tag "openai"."""
    encoder = TextEncoder()
    load_weights(encoder.tower, src, unused=("visual.", "logit_scale"))
    return encoder.eval()


# ---------------------------------------------------------------- Phi of the small worlds
class ConvNet(nn.Module):
    """A small residual classifier, which train.py trains on the classes of a world. It is used
    twice, with different seeds and widths: as Phi, and as the judge, the evaluation classifier,
    which only evaluate.py uses."""
    def __init__(self, num_classes=24, width=32):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, stride=2, padding=1)
        # Input channels, output channels and stride of each block.
        sizes = [(width, width, 1), (width, 2 * width, 2), (2 * width, 2 * width, 1),
                 (2 * width, 4 * width, 2)]
        self.blocks = nn.ModuleList(self.block(*size) for size in sizes)
        self.skips = nn.ModuleList(nn.Conv2d(c_in, c_out, 1, stride=stride)
                                   for c_in, c_out, stride in sizes)
        self.head = nn.Linear(4 * width, num_classes)

    @staticmethod
    def block(c_in, c_out, stride):
        return nn.Sequential(
            nn.Conv2d(c_in, c_out, 3, stride=stride, padding=1), nn.BatchNorm2d(c_out), nn.ReLU(),
            nn.Conv2d(c_out, c_out, 3, padding=1), nn.BatchNorm2d(c_out))

    def maps(self, images, blocks=(0, 1, 2, 3)):
        """Images (B, 3, H, W) in [-1, 1] -> the outputs of these blocks, each (B, D, h, w)."""
        x = F.relu(self.stem(images))
        maps = []
        for block, skip in zip(self.blocks, self.skips):
            x = F.relu(block(x) + skip(x))
            maps.append(x)
        return [maps[i] for i in blocks]

    def forward(self, images):
        """Images (B, 3, H, W) -> features (B, 4 width), logits (B, num_classes)."""
        features = self.maps(images)[-1].mean((2, 3))
        return features, self.head(features)


# ---------------------------------------------------------------- Phi: DINOv3 (Simeoni et al. 2025)
BACKBONE = "vit_base_patch16_dinov3.lvd1689m"


class Backbone(nn.Module):
    """The feature network Phi of Sec. 3.3, with random weights: DINOv3 ViT-B/16, or another vision
    transformer by its name in timm.

    image_size   pixels per side of its input; other images are resized. With a fixed size, DINOv3
                 computes its encoding of positions once, not in every pass.
    """
    def __init__(self, name=BACKBONE, image_size=256):
        super().__init__()
        self.image_size = image_size
        self.net = import_timm().create_model(name, num_classes=0, img_size=image_size,
                                              dynamic_img_size=False)
        # The mean and std of its training images, which are not among its weights.
        for key in ("mean", "std"):
            value = torch.tensor(self.net.pretrained_cfg[key]).view(1, 3, 1, 1)
            self.register_buffer(key, value, persistent=False)

    def maps(self, images, blocks=(2, 5, 8, 11)):
        """Images (B, 3, H, W) in [-1, 1] -> the raw outputs of these blocks, without the final norm
        and without class and register tokens: (B, D, image_size / patch, image_size / patch) each.

        Gradients reach the images. Values outside [-1, 1] are not clamped.
        """
        if images.shape[-1] != self.image_size:
            images = F.interpolate(images, (self.image_size, self.image_size), mode="bilinear")
        x = ((images + 1) / 2 - self.mean) / self.std
        return self.net.forward_intermediates(x, indices=list(blocks), norm=False, stop_early=True,
                                              intermediates_only=True)


def find_backbone(name, folder):
    """Path of the weights of a timm network: <folder>/<name>.safetensors, or the hub's file."""
    repo = import_timm().get_pretrained_cfg(name).hf_hub_id
    return find_weights(folder, f"{name}.safetensors", repo, "model.safetensors")


def load_backbone(src, image_size=256, name=BACKBONE):
    """A vision transformer with public weights. src: path or state dict, with timm's keys."""
    backbone = Backbone(name, image_size)
    # Unused are classifiers, and constants of the position encoding, which timm computes itself.
    load_weights(backbone.net, src, unused=("head.", "head_dist.", "rope."))
    return backbone.eval()


# ---------------------------------------------------------------- the discriminator (Sec. 3.4)
# StyleGAN-XL's feature networks, a vision transformer and a convolutional one: their names in timm.
FEATURE_NETWORKS = {"deit": "deit_base_distilled_patch16_224",
                    "efficientnet": "tf_efficientnet_lite0"}


class EfficientNet(nn.Module):
    """The convolutional feature network. Images smaller than 224 x 224 pixels are enlarged."""
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
    """Mixes the maps of a feature network over channels and scales with random weights, which are
    never trained (Sauer et al. 2021). This keeps the discriminator from using a few channels only.

    maps    four example maps (B, D, h, w) from fine to coarse, of which only the shapes are used.
            The finest mixed map is twice as large as the finest map, and every other one is as
            large as the next finer map.
    width   channels of the finest mixed map
    """
    def __init__(self, maps, width):
        super().__init__()
        D = [m.shape[1] for m in maps]
        if maps[0].shape == maps[3].shape:
            # A vision transformer's maps all have the same size. Resized, they form a pyramid.
            D = [D[0] // 8, D[0] // 4, D[0] // 2, D[0]]
            resize = [nn.ConvTranspose2d(D[0], D[0], 4, stride=4),
                      nn.ConvTranspose2d(D[1], D[1], 2, stride=2),
                      nn.Identity(),
                      nn.Conv2d(D[3], D[3], 3, stride=2, padding=1)]
            self.pretrained = nn.ModuleDict()
            for i, m in enumerate(maps):
                # In the official keys, "3" and "4" follow three layers that reshape.
                layers = OrderedDict({"3": nn.Conv2d(m.shape[1], D[i], 1), "4": resize[i]})
                self.pretrained[f"layer{i + 1}"] = nn.Sequential(layers)
        self.scratch = nn.ModuleDict()
        for i, channels in enumerate([width, 2 * width, 4 * width, 8 * width]):
            # ccm is cross-channel mixing, and csm is cross-scale mixing.
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
        coarser = 0.0
        for i in (3, 2, 1, 0):
            x = self.scratch[f"layer{i}_ccm"](maps[i]) + coarser
            x = self.scratch[f"layer{i}_csm"]["out_conv"](x)
            # The official code enlarges before out_conv: the same result for four times the work.
            coarser = F.interpolate(x, sizes[i], mode="bilinear", align_corners=True)
            mixed.insert(0, coarser)
        return mixed


def head(channels, size, width):
    """A small network with spectral norm: (B, channels, size, size) -> logits (B, 1, n, n). It
    halves the maps at least once, and until their side is about 8. With the maps of StyleGAN-XL's
    two networks n is 4 or 5."""
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
    """The projected discriminator of StyleGAN-XL (Sauer et al. 2022), unconditional. Each feature
    network is followed by a `Projection` and four heads. Only the heads are trained.

    networks     dict: name -> module with .maps(images (B, 3, H, W) in [-1, 1]) -> four maps from
                 fine to coarse: StyleGAN-XL's two (`load_discriminator`), or Phi (small worlds)
    image_size   pixels per side of the images
    width        channels of the finest mixed map

    forward(images, augment=None) -> list of logits (B, n), one entry per network
    The function `augment` is applied to the images, separately for each network. In training mode
    the BatchNorm of the heads normalises with the statistics of the batch, so real images and
    drafts have to be passed in separate calls.
    """
    def __init__(self, networks, image_size=256, width=64):
        super().__init__()
        # This is a plain dict because submodules would be saved with the discriminator, and its
        # train() would take them out of eval mode.
        self.networks = dict(networks)
        self.feature_networks = nn.ModuleDict()
        self.discriminators = nn.ModuleDict()
        for name, network in self.networks.items():
            network.eval().requires_grad_(False)
            device = next(network.parameters()).device
            with torch.no_grad():
                blank = torch.zeros(1, 3, image_size, image_size, device=device)
                maps = [m.cpu() for m in network.maps(blank)]
                projection = Projection(maps, width)
                mixed = projection(maps)
            heads = nn.ModuleList(head(m.shape[1], m.shape[2], width) for m in mixed)
            self.feature_networks[name] = projection
            self.discriminators[name] = nn.ModuleDict({"mini_discs": heads})

    def forward(self, images, augment=None):
        logits = []
        for name, network in self.networks.items():
            x = augment(images) if augment else images
            mixed = self.feature_networks[name](network.maps(x))
            heads = self.discriminators[name]["mini_discs"]
            logits.append(torch.cat([one_head(m).flatten(1)
                                     for one_head, m in zip(heads, mixed)], 1))     # (B, n)
        return logits


def load_discriminator(weights, image_size=256, device="cpu"):
    """StyleGAN-XL's discriminator, untrained: only the feature networks have public weights, all
    others are random. weights: {"deit": path, "efficientnet": path}, or state dicts."""
    deit = load_backbone(weights["deit"], 224, FEATURE_NETWORKS["deit"])
    efficientnet = EfficientNet()
    load_weights(efficientnet.net, weights["efficientnet"],
                 unused=("conv_head.", "bn2.", "classifier."))
    networks = {FEATURE_NETWORKS["deit"]: deit.to(device),
                FEATURE_NETWORKS["efficientnet"]: efficientnet.to(device)}
    return Discriminator(networks, image_size).to(device)


# ---------------------------------------------------------------- FID's Inception (2015)
# The file is not on the hub. Get it from https://github.com/mseitzer/pytorch-fid, release
# fid_weights.
INCEPTION = "pt_inception-2015-12-05-6726825d.pth"


def resize_tensorflow1(x, size):
    """Bilinear resize of TensorFlow 1: (B, C, H, W) float -> (B, C, size, size). Output pixel i is
    read at i * in / out, without the usual half pixel, and there is no antialiasing."""
    def neighbours(n):
        # This is float32, like the original, because the last bits matter here.
        position = torch.arange(size, dtype=x.dtype, device=x.device) * (n / size)
        low = position.long()
        return low, (low + 1).clamp(max=n - 1), position - low
    low, high, weight = neighbours(x.shape[3])
    x = x[..., low] * (1 - weight) + x[..., high] * weight              # (B, C, H, size)
    low, high, weight = neighbours(x.shape[2])
    weight = weight[:, None]
    return x[:, :, low] * (1 - weight) + x[:, :, high] * weight


class Inception(nn.Module):
    """The feature network of FID and of the Inception Score (Szegedy et al. 2015), in Google's
    version of 2015-12-05. It is timm's Inception-v3, but two kinds of blocks pool differently.

    forward(images (B, 3, H, W) uint8, path) -> features (B, 2048), logits (B, 1008)
    The logits lack their bias, because the original Inception Score and torch-fidelity ignore it.
    `path` is one of two ways to resize the images, which give different scores:
    "pytorch-fid"   torch's bilinear resize to 299 x 299, scaled to [-1, 1]
    "legacy"        TensorFlow 1's resize and scaling, as in torch-fidelity, Di[M]O and the ADM
                    references
    """
    def __init__(self):
        super().__init__()
        self.net = import_timm().create_model("inception_v3", num_classes=1008)

    @torch.no_grad()
    def forward(self, images, path="pytorch-fid"):
        if images.dtype != torch.uint8:
            raise ValueError(f"Inception needs uint8 images, not {images.dtype}: rounding to 8 "
                             "bits is part of the score")
        x = images.to(self.net.fc.weight.device).float()
        if path == "pytorch-fid":
            x = 2 * F.interpolate(x / 255, (299, 299), mode="bilinear", align_corners=False) - 1
        else:
            x = (resize_tensorflow1(x, 299) - 128) / 128
        # TF32, the default of a GPU for convolutions, rounds to 10 bits, which changes the score.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            for name, block in self.net.named_children():
                if name == "global_pool":
                    break
                if not hasattr(block, "branch_pool"):
                    x = block(x)
                    continue
                # The block has parallel branches, of which the last one begins with pooling.
                if name == "Mixed_7c":
                    # Google's network takes the maximum in its last block, by mistake; so does FID.
                    pooled = F.max_pool2d(x, 3, stride=1, padding=1)
                else:
                    # TensorFlow does not count the padding in the average, but timm does.
                    pooled = F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
                # The last branch that timm computes has timm's pooling, so it is left out.
                branches = block._forward(x)[:-1]
                x = torch.cat([*branches, block.branch_pool(pooled)], 1)
        features = x.mean((2, 3))                                       # (B, 2048)
        return features, F.linear(features, self.net.fc.weight)         # no bias


def load_inception(src):
    """The Inception network of FID. pytorch-fid and torch-fidelity use the same weights."""
    inception = Inception()
    load_weights(inception.net, src)
    return inception.eval()


# ---------------------------------------------------------------- the paper's public networks
# Each entry has a repository on the Hugging Face hub, a file in it, and the function that loads it.
MASKGIT_REPO = "llvictorll/Maskgit-pytorch"
PUBLIC = {
    "imagenet": {
        "tokenizer": (MASKGIT_REPO, "pretrained_maskgit/VQGAN/last.ckpt", load_vqgan),
        "teacher": (MASKGIT_REPO, "pretrained_maskgit/MaskGIT/MaskGIT_ImageNet_256.pth",
                    load_maskgit)},
    "laion": {
        "tokenizer": ("turkeyju/tokenizer_tatitok_bl128_vq", "model.safetensors", load_tatitok),
        "teacher": ("turkeyju/generator_maskgen_vq_l", "model.safetensors", load_maskgen),
        "text": ("timm/vit_large_patch14_clip_336.openai", "open_clip_model.safetensors",
                 load_text_encoder)}}
# How the public teachers are sampled. During sampling, the guidance s grows to sample_guidance, and
# the Gumbel noise falls from confidence_noise to 0. The guided logits are uncond + s (cond -
# uncond), so s = 1 means no guidance.
# MaskGIT: the settings of Di[M]O's code, whose w = 3 is our 4 and whose r_temp is our noise.
# MaskGen: the official configuration, whose guidance 12 is our 13.
SAMPLING = {"imagenet": dict(sample_guidance=4.0, confidence_noise=4.5),
          "laion": dict(sample_guidance=13.0, confidence_noise=2.0)}
# The public MaskGen draws these prompts if none are given.
PROMPTS = ["a photo of a dog", "a red car next to a blue house",
           "three green apples on a wooden table", "a lighthouse at sunset", "a bowl of soup",
           "a small boat on a lake in the mountains", "an astronaut riding a horse",
           "a yellow bird above a white fence"]

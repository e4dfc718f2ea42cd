"""models.py - the networks: student and teacher, text encoders, Phi and more; their weights.

MaskGIT        z (B, L) codes or mask, labels (B,) -> logits (B, L, K)
               student g_theta and teacher f_phi (Sec. 3.1)
MaskGen        z, text c (B, rows, W) -> logits (B, L, K)
               the same with captions
Words,         captions -> text c (B, rows, W): row 0 pooled, then states
TextEncoder    of the scenes world, and CLIP's, whose last rows TA-TiTok reads
ConvNet,       images (B, 3, H, W) -> 4 maps (B, D, h, w)
Backbone       Phi: what "lifted" means (Sec. 3.3)
Discriminator  images (B, 3, H, W) -> logits (B, n): real or draft?
               for the optional GAN (Sec. 3.4)
Inception      images -> features, logits
               of FID and Inception Score (evaluate.py)

One class each for the small worlds and for the official networks: an official file loads strictly
by its own key names.
"""
import math
import re
from collections import OrderedDict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import spectral_norm

from tokenizer import (SCENE_WORDS, count, load_strictly, parse_caption, read_weights, shape_of,
                       source_name)


# ---------------------------------------------------------------- where pretrained weights are
# The folder of official files, where --weights names no other
WEIGHTS = "weights"


def find_weights(part, folder, name, repo, filename):
    """Path of a weight file: <folder>/<name>, else the hub's (its cache, a download).

    part             "tokenizer", "teacher", ...: how the message calls it
    repo, filename   repository of the Hugging Face hub, path of the file inside it
    ValueError in one line that names file, repository and place
    """
    place = Path(folder, name)
    if place.is_file():
        return place
    try:
        # imported here: it is slow to import, and the small worlds need no hub
        import huggingface_hub as hub
        cached = hub.try_to_load_from_cache(repo, filename)
        if isinstance(cached, str):
            return Path(cached)
        # offline this fails at once, where a download would try for 25 s
        hub.get_hf_file_metadata(hub.hf_hub_url(repo, filename), timeout=10)
        return Path(hub.hf_hub_download(repo, filename))
    except Exception as error:
        # offline, no such file, disk full: dozens of types
        raise ValueError(f"no weights for {part}: the hub gives none ({type(error).__name__}). "
                         f"Put the file {filename} of repository {repo} (Hugging Face hub) at "
                         f"{place}, or name another folder with --weights") from None


# ---------------------------------------------------------------- MaskGIT (Besnier and Chen 2023)
class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.mha = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, x):
        return self.mha(x, x, x, need_weights=False)[0]


class MLP(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Identity(),
                                 nn.Linear(hidden, width))

    def forward(self, x):
        return self.net(x)


class PreNorm(nn.Module):
    def __init__(self, width, fn):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fn = fn

    def forward(self, x):
        return x + self.fn(self.norm(x))


class MaskGIT(nn.Module):
    """Bidirectional transformer over L image tokens and one class token (version 1 of the code).
    Defaults: the small worlds' size.

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
        # of the output; one per position and row
        self.bias = nn.Parameter(torch.zeros(L + 1, rows))
        self.tok_emb = nn.Embedding(rows, width)
        # the official key names count the dropout modules: an Identity in the place of each
        self.first_layer = nn.Sequential(
            nn.LayerNorm(width, eps=1e-12), nn.Identity(), nn.Linear(width, width), nn.GELU(),
            nn.LayerNorm(width, eps=1e-12), nn.Identity(), nn.Linear(width, width))
        layers = [nn.ModuleList([PreNorm(width, Attention(width, heads)),
                                 PreNorm(width, MLP(width, mlp))]) for _ in range(depth)]
        self.transformer = nn.Module()
        self.transformer.layers = nn.ModuleList(layers)
        self.last_layer = nn.Sequential(
            nn.LayerNorm(width, eps=1e-12), nn.Identity(), nn.Linear(width, width), nn.GELU(),
            nn.LayerNorm(width, eps=1e-12))
        self.init_weights()

    def init_weights(self):
        """Every layer begins by keeping the variance. Officially the standard deviation is 0.02
        everywhere, which at small widths is a slow start."""
        for p in self.parameters():
            if p is self.pos_emb or p is self.tok_emb.weight:
                nn.init.normal_(p, std=0.02)
            elif p.ndim > 1 and p is not self.bias:
                nn.init.normal_(p, std=p.shape[1] ** -0.5)

    def forward(self, z, labels, drop=None, mask_column=False):
        """mask_column=True also returns the logit of "mask", (B, L, K + 1): the official sampler's
        traces were drawn over it (tests)."""
        if z.shape[1] != self.L:
            raise ValueError(f"this MaskGIT was made for {self.L} tokens, got {z.shape[1]}")
        row = self.K + 1 + labels                                               # (B,)
        if drop is not None:
            row = torch.where(drop, self.K + 1 + self.num_classes, row)
        x = self.tok_emb(torch.cat([z, row[:, None]], 1)) + self.pos_emb        # (B, L + 1, width)
        x = self.first_layer(x)
        for attention, mlp in self.transformer.layers:
            x = mlp(attention(x))
        # the class token gives no logits, and nobody may answer "mask" or a class
        x = self.last_layer(x[:, :self.L])                                      # (B, L, width)
        columns = self.K + 1 if mask_column else self.K
        return x @ self.tok_emb.weight[:columns].T + self.bias[:self.L, :columns]


def codes_in_table(name, rows, width, heads, num_classes, released):
    """K, read off a token table of (rows, width); ValueError where the options cannot be meant."""
    if width == 0 or heads < 1 or width % heads:
        raise ValueError(f"{name}: {heads} heads do not divide the width {width}; "
                         f"the released {released} has 16")
    K = rows - num_classes - 2
    if K < 1:
        raise ValueError(f"{name}: a table of {rows} rows cannot hold a mask, {num_classes} "
                         "classes and a null class besides codes")
    return K


def load_maskgit(src, heads=16, num_classes=1000):
    """The official MaskGIT, in eval mode, or a Di[M]O generator (a bare state dict,
    `pytorch_model.bin`), which is the same network.

    src           path or state dict of `pretrained_maskgit/MaskGIT/MaskGIT_ImageNet_256.pth` of
                  llvictorll/Maskgit-pytorch on the hub
    heads         of the attention; no tensor tells, and the official constructor's default, 8,
                  is not what the released weights have
    num_classes   likewise: the tensors tell only K + num_classes, from the rows of the table
    ValueError in one line when the file cannot be read or does not fit
    """
    name = source_name(src, "MaskGIT")
    state = read_weights(src, "MaskGIT")
    rows, width = shape_of(state, "tok_emb.weight", 2, name)
    L = shape_of(state, "pos_emb", 3, name)[1] - 1
    K = codes_in_table(name, rows, width, heads, num_classes, "ImageNet network")
    # A wrong number of classes would shift every class and the mask without an error. Training
    # shows it: only the columns of codes and mask are ever answers, so the bias of classes and null
    # class stays exactly as it began, zero (in our own training mask's does, too).
    columns = shape_of(state, "bias", 2, name)[1]
    used = state["bias"].any(0).nonzero()
    if len(used):
        zeros = int(columns - used.max() - 1)
        if zeros not in (0, num_classes + 1, num_classes + 2):
            raise ValueError(f"{name} seems to have {zeros - 1} classes, by its bias, "
                             f"instead of {num_classes}")
    mlp = shape_of(state, "transformer.layers.0.1.fn.net.0.weight", 2, name)[0]
    depth = count(state, "transformer.layers.{}.0.norm.weight")
    # no memory and no random numbers before the file fits
    with torch.device("meta"):
        model = MaskGIT(K, L, num_classes, width, depth, heads, mlp)
    return load_strictly(model, state, name)


def imagenet_names():
    """The 1000 class names in the order of the labels, "tench" ... "golden retriever" (207) ...
    Namesakes carry their number, "crane 134"."""
    import_timm()
    from timm.data import ImageNetInfo
    info = ImageNetInfo()
    # the first of several synonyms
    names = [info.index_to_description(i).split(",")[0] for i in range(1000)]
    return [f"{name} {i}" if names.count(name) > 1 else name for i, name in enumerate(names)]


# ---------------------------------------------------------------- MaskGen (Kim et al. 2025)
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
        """x (B, L, width), text (B, T, width) -> two of the same shapes; `to_add_out` has yet to
        project the text's."""
        L = x.shape[1]
        q = self.split_heads(torch.cat([self.to_q(x), self.add_q_proj(text)], 1))
        k = self.split_heads(torch.cat([self.to_k(x), self.add_k_proj(text)], 1))
        v = self.split_heads(torch.cat([self.to_v(x), self.add_v_proj(text)], 1))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.to_out[0](mixed[:, :L]), mixed[:, L:]


class JointBlock(nn.Module):
    """Block of Stable Diffusion 3. In the last one the text is only read: nobody would use what
    becomes of it."""
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
    """Aesthetic scores (B,) -> (B, width): sines, then cosines. The longest period is about 1000,
    not 10000 as is usual."""
    half = width // 2
    exponents = -math.log(1000) * torch.arange(half, device=score.device) / half
    # float32's exp differs in the last bit between processors, which at angles of 650 is 4e-5
    frequencies = exponents.double().exp().float()
    angles = 100 * score[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], 1)


class MaskGen(nn.Module):
    """Bidirectional transformer over L image tokens, conditioned on text. Defaults: the small
    worlds' size.

    text_width        W, of the text c (B, rows, W): row 0 the pooled vector, rows 1..T what is
                      attended to; more rows are not looked at
    score_width       of the encoding of an aesthetic score, which joins the pooled vector; 0: none
    aesthetic_score   that score, one for all images: the released config's, meant for sampling
    unused_rows       of the token table behind codes and mask: the official file has some
    .empty            (1 + T, W), c of the empty caption, which `drop` puts in place of c. Zeros
                      until it is set; not in the state dict

    forward(z (B, L) long 0..K, c (B, >= 1 + T, W), drop (B,) bool | None: True = empty caption)
        -> logits (B, L, K)
    """
    def __init__(self, K=128, L=64, width=128, depth=4, heads=4, text_width=128, T=12,
                 score_width=0, aesthetic_score=6.5, unused_rows=0):
        super().__init__()
        self.K, self.L = K, L
        self.score_width, self.aesthetic_score = score_width, aesthetic_score
        self.pos_embed = nn.Parameter(torch.zeros(1, L, width))
        self.text_embed_proj = nn.Linear(text_width, width)
        self.cond_pooled_proj = nn.Linear(text_width + score_width, width)
        self.blocks = nn.ModuleList(JointBlock(width, heads, last=i == depth - 1)
                                    for i in range(depth))
        self.norm = AdaptiveNorm(width, 2)
        # 0 .. K-1 codes | K mask | unused; this is the output layer, too
        self.embeddings = nn.Embedding(K + 1 + unused_rows, width)
        self.register_buffer("empty", torch.zeros(1 + T, text_width), persistent=False)
        self.init_weights()

    def init_weights(self):
        """Every layer begins by keeping the variance: 0.02 everywhere would be a slow start at
        small widths (measured: twice the steps to the same loss). Gates of 0: every block begins
        as the identity."""
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
        rows, W = self.empty.shape
        if z.shape[1] != self.L:
            raise ValueError(f"this MaskGen was made for {self.L} tokens, got {z.shape[1]}")
        if c.ndim != 3 or c.shape[1] < rows or c.shape[2] != W:
            raise ValueError(f"this MaskGen was made for text of shape (B, {rows} or more, {W}), "
                             f"got {tuple(c.shape)}")
        c = c[:, :rows]                                                         # (B, 1 + T, W)
        if drop is not None:
            c = torch.where(drop[:, None, None], self.empty, c)
        pooled = c[:, 0]                                                        # (B, W)
        if self.score_width:
            score = torch.full((len(c),), float(self.aesthetic_score), device=c.device)
            pooled = torch.cat([pooled, score_encoding(score, self.score_width)], 1)
        cond = self.cond_pooled_proj(pooled)                                    # (B, width)
        text = self.text_embed_proj(c[:, 1:])                                   # (B, T, width)
        x = self.embeddings(z) + self.pos_embed                                 # (B, L, width)
        for block in self.blocks:
            x, text = block(x, text, cond)
        # the official layer gives them in this order
        scale, shift = self.norm(cond)
        # nobody may answer "mask"
        return modulate(x, shift, scale) @ self.embeddings.weight[:self.K].T    # (B, L, K)


def load_maskgen(src, heads=16, num_classes=1000, T=77):
    """The official MaskGen-L VQ, in eval mode. Its `empty` is still to be set (text encoder).

    src           path or state dict of `model.safetensors` of turkeyju/generator_maskgen_vq_l on
                  the hub, or of `maskgen_vq_l.bin` of fun-research/TA-TiTok
    heads, T      of the attention, and rows of text: no tensor tells
    num_classes   likewise: the tensors tell only K + num_classes, from the rows of the table, whose
                  classes nobody uses here
    ValueError in one line when the file cannot be read or does not fit
    """
    name = source_name(src, "MaskGen")
    state = read_weights(src, "MaskGen")
    # the token table under its name as output layer: files have either name, or both
    head = state.pop("lm_head.weight", None)
    if head is not None and not torch.equal(state.setdefault("embeddings.weight", head), head):
        raise ValueError(f"{name} does not fit: lm_head.weight is not embeddings.weight")
    rows, width = shape_of(state, "embeddings.weight", 2, name)
    K = codes_in_table(name, rows, width, heads, num_classes, "MaskGen-L")
    text_width = shape_of(state, "text_embed_proj.weight", 2, name)[1]
    score_width = shape_of(state, "cond_pooled_proj.weight", 2, name)[1] - text_width
    L = shape_of(state, "pos_embed", 3, name)[1]
    depth = count(state, "blocks.{}.attn.to_q.weight")
    # no memory and no random numbers before the file fits
    with torch.device("meta"):
        model = MaskGen(K, L, width, depth, heads, text_width, T, max(0, score_width),
                        unused_rows=num_classes + 1)
    model = load_strictly(model, state, name)
    # no longer meta, but never filled
    model.empty.zero_()
    return model


# ---------------------------------------------------------------- words: text of the scenes world
def check_captions(captions):
    """ValueError unless they are texts, at least one. (A str alone is a sequence of str, too.)"""
    if (isinstance(captions, str) or not captions
            or not all(isinstance(caption, str) for caption in captions)):
        raise ValueError(f"captions should be a list of one text or more, got {captions!r}"[:200])


class Words(nn.Module):
    """Text c of the scenes world's captions, with nothing to learn: every row is a random sum of
    what words there are, and how far from it.

    So the row of "square" knows that it is blue, and above something: like CLIP's rows, it has read
    its context. (Of rows that know no more than their own word and place, the small teacher would
    have to learn that first; in its minutes it does not.)

    width   W       T   rows; captions have at most 8 words
    """
    def __init__(self, width=128, T=12):
        super().__init__()
        self.T = T
        generator = torch.Generator().manual_seed(0)
        vectors = torch.randn(2 * T + 1, len(SCENE_WORDS), width, generator=generator)
        self.register_buffer("vectors", vectors)

    def encode(self, captions):
        """Captions, a list of str -> c (B, 1 + T, W): row 0 reads from before the first word, row i
        from the i-th, and zeros behind the last.

        "" is the empty caption, which stands for "no condition": zeros.
        ValueError for words and sentences that parse_caption does not know
        """
        check_captions(captions)
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
        row 0        the pooled vector: final states at the end of the text, projected
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
        # GELU and only warn: every text would come out slightly wrong, and no error would show it
        blocks = self.tower.transformer.resblocks
        if not all(isinstance(block.mlp.gelu, QuickGELU) for block in blocks):
            raise ValueError("this release of open_clip does not build the text tower of CLIP with "
                             "QuickGELU, its activation")

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
        "no condition". See `cut_captions`."""
        check_captions(captions)
        ids = self.tokenizer(captions)                                  # (B, 77)
        device = self.tower.positional_embedding.device
        # without a wait for what the GPU has still to do
        return self.states(ids.to(device, non_blocking=True))

    def cut_captions(self, captions):
        """Which captions are longer than the tower reads, 75 tokens, and what is lost
        -> {caption: the text that is cut off}."""
        # beside start and end
        room = self.tokenizer.context_length - 2
        cut = {}
        for caption in captions:
            tokens = self.tokenizer.encode(caption)
            if len(tokens) > room:
                cut[caption] = self.tokenizer.decode(tokens[room:]).strip()
        return cut


# what open_clip's tag "openai" loads
CLIP_FILE = "open_clip_model.safetensors"
CLIP_REPO = "timm/vit_large_patch14_clip_336.openai"


def load_text_encoder(weights):
    """CLIP's text tower with OpenAI's weights, frozen, in eval mode.

    weights   path or state dict with open_clip's keys, with or without the visual tower
    ValueError in one line when the file cannot be read or does not fit
    """
    name = source_name(weights, "the text encoder")
    try:
        state = read_weights(weights, "the text encoder")
    except ValueError as error:
        if "TorchScript" not in str(error):
            raise
        raise ValueError(f"{name} is a TorchScript archive, such as OpenAI's ViT-L-14-336px.pt. "
                         f"Needed are the tensors alone: the file {CLIP_FILE} of repository "
                         f"{CLIP_REPO} (Hugging Face hub)") from None
    model = TextEncoder()
    # not of the text tower: the other tower, and the scale of the similarities between the two
    load_strictly(model.tower, state, name, ignore_prefix=("visual.", "logit_scale"))
    return model.eval().requires_grad_(False)


# ---------------------------------------------------------------- Phi and judge of the small worlds
class ConvNet(nn.Module):
    """A small residual classifier. Trained here on the world's classes; four blocks to lift from,
    as Phi's {2, 5, 8, 11}.

    Used twice, from different seeds, widths and images: as Phi (train.py) and as the judge, which
    evaluate.py alone may see.
    """
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

    def maps(self, images):
        """Images (B, 3, H, W) in [-1, 1] -> the outputs of the four blocks, each (B, D, h, w)."""
        x = F.relu(self.stem(images))
        maps = []
        for block, skip in zip(self.blocks, self.skips):
            x = F.relu(block(x) + skip(x))
            maps.append(x)
        return maps

    def forward(self, images):
        """-> features (B, 4 width), logits (B, num_classes)."""
        features = self.maps(images)[-1].mean((2, 3))
        return features, self.head(features)


# ---------------------------------------------------------------- Phi: DINOv3 (Simeoni et al. 2025)
def import_timm():
    """timm, even where torchvision's compiled part does not fit torch, as beside a CPU build.

    timm and open_clip take nothing but image transforms from torchvision, yet importing it fails
    when it describes operators (nms, qnms) that its missing part should have defined. A declaration
    in their place is enough: nobody here calls them.
    """
    for _ in range(8):
        try:
            import torchvision  # noqa: F401
            break
        except RuntimeError as error:
            operator = re.match(r"operator (torchvision::\w+) does not exist", str(error))
            if operator is None:
                raise
            torch.library.define(operator[1], "(Tensor x) -> Tensor")
    import timm
    return timm


class Backbone(nn.Module):
    """The feature network Phi of Sec. 3.3: a vision transformer of timm, DINOv3 ViT-B/16 unless
    another is named, with random weights.

    blocks       whose outputs are the maps, 0 .. depth - 1, rising; the paper's are 2, 5, 8, 11
    image_size   pixels per side, a multiple of the patch: 256 gives DINOv3's own 16 x 16 map, other
                 sizes work as well; then it takes images of this size only
    """
    def __init__(self, name="vit_base_patch16_dinov3.lvd1689m", blocks=(2, 5, 8, 11),
                 image_size=256):
        super().__init__()
        # DINOv3 has no table of positions, only rotations ("rope"): made once for images of this
        # size, instead of on the CPU in every pass. Others fit their table, which their file has in
        # one size, to the image
        size = {"dynamic_img_size": True}
        if "dinov3" in name:
            size = {"dynamic_img_size": False, "img_size": image_size}
        try:
            self.net = import_timm().create_model(name, num_classes=0, **size)
            depth = len(self.net.blocks)
            patch = self.net.patch_embed.patch_size[0]
        except (RuntimeError, TypeError, AttributeError) as error:
            # no such model; or not a vision transformer
            raise ValueError(f"{name!r} is not a vision transformer of timm ({error})") from error
        is_rising = list(blocks) == sorted(set(blocks))
        if not is_rising or not all(0 <= block < depth for block in blocks):
            raise ValueError(f"{name} has blocks 0 to {depth - 1}; {tuple(blocks)} should be some "
                             "of them, in rising order")
        if image_size % patch:
            raise ValueError(f"images of {image_size} pixels do not split into the {patch}-pixel "
                             f"patches of {name}")
        self.blocks = list(blocks)
        # what the network was trained with; not in its file
        for key in ("mean", "std"):
            value = torch.tensor(self.net.pretrained_cfg[key]).view(1, 3, 1, 1)
            self.register_buffer(key, value, persistent=False)

    def maps(self, images):
        """Images (B, 3, H, W) in [-1, 1] -> one (B, D, H / patch, W / patch) per block: its raw
        output, without the final norm.

        Class and register tokens are left out. Gradients reach the images, and values beyond
        [-1, 1] are not clamped (Sec. 3.3).
        """
        x = ((images + 1) / 2 - self.mean) / self.std
        return self.net.forward_intermediates(x, indices=self.blocks, norm=False, stop_early=True,
                                              intermediates_only=True)


def find_backbone(name, folder, part="backbone"):
    """Path of the weights of a timm network: <folder>/<name>.safetensors, else repository
    timm/<name> on the hub. part: as of `find_weights`."""
    config = import_timm().get_pretrained_cfg(name)
    if config is None:
        raise ValueError(f"{name!r} is not a network with pretrained weights of timm")
    return find_weights(part, folder, f"{name}.safetensors", config.hf_hub_id or f"timm/{name}",
                        "model.safetensors")


def load_backbone(name, weights, blocks=(2, 5, 8, 11), image_size=256):
    """Phi with its pretrained weights, frozen, in eval mode.

    weights   path or state dict with timm's keys, complete but for a classifier
    ValueError in one line when the file cannot be read or does not fit
    """
    model = Backbone(name, blocks, image_size)
    what = f"the backbone {name}"
    # "head.": a classifier, which we do not build; "rope.": constants that timm computes itself
    load_strictly(model.net, read_weights(weights, what), source_name(weights, what),
                  ignore_prefix=("head.", "rope."))
    return model.eval().requires_grad_(False)


# ---------------------------------------------------------------- the discriminator (Sec. 3.4)
class DeiT(Backbone):
    """One of StyleGAN-XL's two feature networks: a vision transformer, which always looks at
    224 x 224 pixels."""
    name = "deit_base_distilled_patch16_224"
    part = "deit"
    unused = ("head.", "head_dist.")

    def __init__(self):
        super().__init__(self.name, image_size=224)

    def maps(self, images):
        return super().maps(F.interpolate(images, (224, 224), mode="bilinear"))


class EfficientNet(nn.Module):
    """The other one, convolutional. It sees images as large as they are, but at least 224 x 224
    pixels."""
    name = "tf_efficientnet_lite0"
    part = "efficientnet"
    unused = ("conv_head.", "bn2.", "classifier.")

    def __init__(self):
        super().__init__()
        self.net = import_timm().create_model(self.name, features_only=True,
                                              out_indices=(1, 2, 3, 4))

    def maps(self, images):
        """Images (B, 3, H, W) in [-1, 1], as the network was trained with -> (B, D, h, w) at 1/4,
        1/8, 1/16, 1/32 of the side."""
        if images.shape[-1] < 224:
            images = F.interpolate(images, (224, 224), mode="bilinear")
        return self.net(images)


FEATURE_NETWORKS = (DeiT, EfficientNet)


class Projection(nn.Module):
    """Mixes the maps of a feature network over channels and scales, at random (Sauer et al. 2021):
    heads cannot settle on a few channels. Never trained, either.

    maps    (B, D, h, w), four from fine to coarse, whose sizes are all that is looked at here: each
            mixed map has the size of the next finer one, the finest twice its own
    width   channels of the finest mixed map
    """
    def __init__(self, maps, width):
        super().__init__()
        D = [m.shape[1] for m in maps]
        if maps[0].shape == maps[3].shape:
            # of a vision transformer: a pyramid is made of them
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
            # officially before out_conv: the same, for four times the work
            below = F.interpolate(x, sizes[i], mode="bilinear", align_corners=True)
            mixed.insert(0, below)
        return mixed


def head(channels, size, width):
    """A small convolutional judge of one mixed map: halve its side until it is about 8, then
    logits. Every convolution has spectral norm.

    (B, channels, size, size) -> (B, 1, n, n); n = 4 or 5 for maps of 8 pixels and more
    """
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
    network -> `Projection` -> four heads, only these trained, for each of its feature networks.

    networks     name -> module with .maps(images (B, 3, H, W) in [-1, 1]) -> four maps, fine to
                 coarse: StyleGAN-XL's two (`load_discriminator`) or Phi alone (the small worlds).
                 They are frozen here, and stay what they are: no .train(), .to() or state_dict() of
                 the discriminator reaches them
    image_size   pixels per side, to learn the sizes of the maps
    width        channels of the finest mixed map; 64 in StyleGAN-XL

    forward(images, augment=None: a function of images, called anew for each network)
        -> list of logits (B, n), one per network
    In training mode the heads' BatchNorm takes its statistics from the batch: real images and
    drafts go through in separate calls.
    """
    def __init__(self, networks, image_size=256, width=64):
        super().__init__()
        # a plain dict, hence not part of the state dict
        self.networks = dict(networks)
        self.feature_networks = nn.ModuleDict()
        self.discriminators = nn.ModuleDict()
        for name, network in self.networks.items():
            network.eval().requires_grad_(False)
            device = next(network.parameters()).device
            with torch.no_grad():
                maps = network.maps(torch.zeros(1, 3, image_size, image_size, device=device))
                maps = [m.cpu() for m in maps]
                if len(maps) != 4:
                    raise ValueError("the discriminator looks at 4 maps, and "
                                     f"{name} has {len(maps)}")
                projection = Projection(maps, width)
                mixed = projection(maps)
            heads = nn.ModuleList(head(m.shape[1], m.shape[2], width) for m in mixed)
            self.feature_networks[name] = projection
            self.discriminators[name] = nn.ModuleDict({"mini_discs": heads})

    def requires_grad_(self, requires_grad=True):
        """Of the heads only: the rest stays frozen."""
        self.discriminators.requires_grad_(requires_grad)
        return self

    def forward(self, images, augment=None):
        logits = []
        for name, network in self.networks.items():
            seen = augment(images) if augment else images
            mixed = self.feature_networks[name](network.maps(seen))
            heads = self.discriminators[name]["mini_discs"]
            of_heads = [judge(m).flatten(1) for judge, m in zip(heads, mixed)]
            logits.append(torch.cat(of_heads, 1))                       # (B, n)
        return logits


def load_discriminator(weights, image_size=256, device="cpu"):
    """StyleGAN-XL's discriminator: pretrained feature networks, everything else as random as at the
    start of its training.

    weights   {"deit": ..., "efficientnet": ...}, paths or state dicts with timm's keys, with or
              without a classifier
    ValueError in one line when a file cannot be read or does not fit
    """
    networks = {}
    for cls in FEATURE_NETWORKS:
        model = cls()
        src = weights[cls.part]
        what = f"the discriminator's {cls.name}"
        load_strictly(model.net, read_weights(src, what), source_name(src, what),
                      ignore_prefix=cls.unused)
        networks[cls.name] = model.to(device)
    return Discriminator(networks, image_size).to(device)


# ---------------------------------------------------------------- FID's Inception (2015)
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

    forward(images (B, 3, H, W) uint8) -> features (B, 2048), logits (B, 1008). The two paths are
    not interchangeable:
    path "pytorch-fid"   torch's bilinear resize to 299, [-1, 1]
         "legacy"        TensorFlow 1's resize and scaling, logits without bias: torch-fidelity,
                         Di[M]O and the ADM references
    """
    def __init__(self):
        super().__init__()
        self.net = import_timm().create_model("inception_v3", num_classes=1008)

    @torch.no_grad()
    def forward(self, images, path="pytorch-fid"):
        if images.dtype != torch.uint8:
            raise ValueError("Inception wants uint8 images: rounding to 8 bits is part of the "
                             f"score; got {images.dtype}")
        x = images.to(self.net.fc.weight.device).float()
        if path == "pytorch-fid":
            x = F.interpolate(x / 255, (299, 299), mode="bilinear", align_corners=False)
            x = 2 * x - 1
            bias = self.net.fc.bias
        elif path == "legacy":
            x = (resize_tensorflow1(x, 299) - 128) / 128
            bias = None
        else:
            raise ValueError(f"path should be 'pytorch-fid' or 'legacy', got {path!r}")
        for name, block in self.net.named_children():
            # what follows turns maps into features and logits
            if name == "global_pool":
                break
            if hasattr(block, "branch_pool"):
                x = self.pooling_block(name, block, x)
            else:
                x = block(x)
        features = x.mean((2, 3))                                       # (B, 2048)
        return features, F.linear(features, self.net.fc.weight, bias)

    def pooling_block(self, name, block, x):
        """A block of parallel branches, the last of which pools in the original's way."""
        if name == "Mixed_7c":
            # a slip of the original in its last block, now part of FID
            pooled = F.max_pool2d(x, 3, stride=1, padding=1)
        else:
            # TensorFlow averages without the padding
            pooled = F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
        # the last one of timm's branches is its own pooling
        branches = block._forward(x)[:-1]
        return torch.cat([*branches, block.branch_pool(pooled)], 1)


# ends in the beginning of its own sha256
INCEPTION = "pt_inception-2015-12-05-6726825d.pth"


def find_inception(folder):
    """Path of the FID Inception's weights in a folder. They are on GitHub, not on the hub."""
    path = Path(folder, INCEPTION)
    if not path.is_file():
        raise ValueError(f"no weights for inception: put the file {INCEPTION} of "
                         "https://github.com/mseitzer/pytorch-fid (release fid_weights) at "
                         f"{path}, or name another folder with --weights")
    return path


def load_inception(src):
    """The FID Inception, frozen, from pt_inception-2015-12-05-6726825d.pth (releases of
    mseitzer/pytorch-fid; torch-fidelity's is equal).

    src: a path or a state dict; keys must match exactly. ValueError in one line otherwise.
    """
    # its 10 bits would move the score
    torch.backends.cudnn.allow_tf32 = False
    model = Inception()
    what = "the FID Inception"
    load_strictly(model.net, read_weights(src, what), source_name(src, what))
    return model.eval().requires_grad_(False)

"""models.py - the networks: MaskGIT (student and teacher), the feature backbone Phi, official weights.

    z (B, L) codes or mask, labels (B,)  -- MaskGIT --> logits (B, L, K)          student g_theta and teacher f_phi (Sec. 3.1)
    images (B, 3, H, W)                  -- Phi     --> 4 maps (B, D, h, w)       what "lifted" means (Sec. 3.3)

One class each for the small worlds and for the official networks: an official file loads strictly by its own key names.
"""
import re

import torch
import torch.nn.functional as F
from torch import nn

from tokenizer import count, find_weights, load_strictly, read_weights, shape_of, source_name


# ------------------------------------------------------------------------------------------------ MaskGIT (Besnier and Chen 2023, version 1)
class Attention(nn.Module):
    def __init__(self, width, heads, dropout):
        super().__init__()
        self.mha = nn.MultiheadAttention(width, heads, dropout=dropout, batch_first=True)

    def forward(self, x):
        return self.mha(x, x, x, need_weights=False)[0]


class MLP(nn.Module):
    def __init__(self, width, hidden, dropout):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, width), nn.Dropout(dropout))

    def forward(self, x):
        return self.net(x)


class PreNorm(nn.Module):
    def __init__(self, width, fn):
        super().__init__()
        self.norm, self.fn = nn.LayerNorm(width), fn

    def forward(self, x):
        return x + self.fn(self.norm(x))


class MaskGIT(nn.Module):
    """Bidirectional transformer over L image tokens and one class token. Defaults: the small worlds' size.

    One table of K + 1 + num_classes + 1 rows holds everything:  0 .. K-1 codes | K mask | K+1 .. K+num_classes classes | null class
    forward(z (B, L) long 0..K, labels (B,) long, drop (B,) bool | None: True = null class) -> logits (B, L, K)
    """
    def __init__(self, K=128, L=64, num_classes=24, width=128, depth=4, heads=4, mlp=512, dropout=0.0):
        super().__init__()
        self.K, self.L, self.num_classes = K, L, num_classes
        rows = K + 1 + num_classes + 1
        self.pos_emb = nn.Parameter(torch.zeros(1, L + 1, width))
        self.bias = nn.Parameter(torch.zeros(L + 1, rows))                       # of the output; one per position and row
        self.tok_emb = nn.Embedding(rows, width)
        # the official key names count the dropout modules, hence the exact order
        self.first_layer = nn.Sequential(nn.LayerNorm(width, eps=1e-12), nn.Dropout(dropout), nn.Linear(width, width), nn.GELU(),
                                         nn.LayerNorm(width, eps=1e-12), nn.Dropout(dropout), nn.Linear(width, width))
        self.transformer = nn.Module()
        self.transformer.layers = nn.ModuleList(nn.ModuleList([PreNorm(width, Attention(width, heads, dropout)),
                                                               PreNorm(width, MLP(width, mlp, dropout))]) for _ in range(depth))
        self.last_layer = nn.Sequential(nn.LayerNorm(width, eps=1e-12), nn.Dropout(dropout), nn.Linear(width, width), nn.GELU(),
                                        nn.LayerNorm(width, eps=1e-12))
        for p in self.parameters():
            if p.ndim > 1 and p is not self.bias:
                nn.init.trunc_normal_(p, std=0.02)

    def forward(self, z, labels, drop=None, mask_column=False):
        """mask_column=True also returns the logit of "mask" (B, L, K + 1): the official sampler's traces were drawn over it (tests)."""
        if z.shape[1] != self.L:
            raise ValueError(f"this MaskGIT was made for {self.L} tokens, got {z.shape[1]}")
        row = self.K + 1 + labels                                                # (B,)
        if drop is not None:
            row = torch.where(drop, self.K + 1 + self.num_classes, row)
        x = self.tok_emb(torch.cat([z, row[:, None]], 1)) + self.pos_emb         # (B, L + 1, width)
        x = self.first_layer(x)
        for attention, mlp in self.transformer.layers:
            x = mlp(attention(x))
        x = self.last_layer(x[:, :self.L])                                       # the class token gives no logits
        columns = self.K + 1 if mask_column else self.K                          # nobody may answer "mask" or a class
        return x @ self.tok_emb.weight[:columns].T + self.bias[:self.L, :columns]


def load_maskgit(src, heads=16, num_classes=1000):
    """The official MaskGIT, in eval mode, or a DiMO generator (bare state dict, `pytorch_model.bin`), which is the same network.

    src           path or state dict of `pretrained_maskgit/MaskGIT/MaskGIT_ImageNet_256.pth`, llvictorll/Maskgit-pytorch on the hub
    heads         of the attention; no tensor tells, and the official constructor's default, 8, is not what the released weights have
    num_classes   likewise: the tensors tell only K + num_classes, from the rows of the table
    ValueError in one line when the file cannot be read or does not fit
    """
    name = source_name(src, "MaskGIT")
    state = read_weights(src, "MaskGIT")
    if all(key.startswith("module.") for key in state):                          # saved from inside DistributedDataParallel
        state = {key.removeprefix("module."): value for key, value in state.items()}
    rows, width = shape_of(state, "tok_emb.weight", 2, name)
    K, L = rows - num_classes - 2, shape_of(state, "pos_emb", 3, name)[1] - 1
    if width == 0 or heads < 1 or width % heads:
        raise ValueError(f"{name}: {heads} heads do not divide the width {width}; the released ImageNet network has 16")
    if K < 1:
        raise ValueError(f"{name}: a table of {rows} rows cannot hold a mask, {num_classes} classes and a null class besides codes")
    # A wrong number of classes would shift every class and the mask without an error. Training shows it: only the columns of codes and
    # mask are ever answers, so the bias of classes and null class stays exactly as it began, zero (in our own training mask's does, too).
    zeros = int(shape_of(state, "bias", 2, name)[1] - state["bias"].any(0).nonzero().max() - 1) if state["bias"].any() else 0
    if zeros and zeros not in (num_classes + 1, num_classes + 2):
        raise ValueError(f"{name} seems to have {zeros - 1} classes, by its bias, instead of {num_classes}")
    mlp = shape_of(state, "transformer.layers.0.1.fn.net.0.weight", 2, name)[0]
    with torch.device("meta"):                                                   # no memory and no random numbers before the file fits
        model = MaskGIT(K, L, num_classes, width, count(state, "transformer.layers.{}.0.norm.weight"), heads, mlp)
    return load_strictly(model, state, name)


# ------------------------------------------------------------------------------------------------ Phi and the judge of the small worlds
class ConvNet(nn.Module):
    """A small residual classifier. Trained here on the world's classes; four blocks to lift from, as Phi's {2, 5, 8, 11}.

    Used twice, from different seeds, widths and images: as Phi (train.py) and as the judge, which evaluate.py alone may see.
    """
    def __init__(self, num_classes=24, width=32):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, stride=2, padding=1)
        widths, strides = [width, width, 2 * width, 2 * width, 4 * width], [1, 2, 1, 2]
        self.blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(a, b, 3, stride=s, padding=1), nn.BatchNorm2d(b), nn.ReLU(),
                                                  nn.Conv2d(b, b, 3, padding=1), nn.BatchNorm2d(b))
                                    for a, b, s in zip(widths, widths[1:], strides))
        self.skips = nn.ModuleList(nn.Conv2d(a, b, 1, stride=s) for a, b, s in zip(widths, widths[1:], strides))
        self.head = nn.Linear(widths[-1], num_classes)

    def maps(self, images):
        """Images (B, 3, H, W) in [-1, 1] -> the outputs of the four blocks, each (B, D, h, w)."""
        x, maps = F.relu(self.stem(images)), []
        for block, skip in zip(self.blocks, self.skips):
            x = F.relu(block(x) + skip(x))
            maps.append(x)
        return maps

    def forward(self, images):
        """-> features (B, 4 width), logits (B, num_classes)."""
        features = self.maps(images)[-1].mean((2, 3))
        return features, self.head(features)


# ------------------------------------------------------------------------------------------------ Phi: DINOv3 (Simeoni et al. 2025)
def import_timm():
    """timm, even where torchvision's compiled part does not fit torch, as beside a CPU build.

    timm and open_clip take nothing but image transforms from torchvision, yet importing it fails when it describes operators
    (nms, qnms) that its missing part should have defined. A declaration in their place is enough: nobody here calls them.
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
    """The feature network Phi of Sec. 3.3: a vision transformer of timm, DINOv3 ViT-B/16 unless another is named, with random weights.

    blocks       whose outputs are the maps, 0 .. depth - 1, rising; the paper's are 2, 5, 8, 11
    image_size   pixels per side, a multiple of the patch: 256 gives DINOv3's own 16 x 16 map, other sizes work as well
    """
    def __init__(self, name="vit_base_patch16_dinov3.lvd1689m", blocks=(2, 5, 8, 11), image_size=256):
        super().__init__()
        try:
            self.net = import_timm().create_model(name, num_classes=0, dynamic_img_size=True)
            depth, patch = len(self.net.blocks), self.net.patch_embed.patch_size[0]
        except (RuntimeError, TypeError, AttributeError) as error:               # no such model; or not a vision transformer
            raise ValueError(f"{name!r} is not a vision transformer of timm ({error})") from error
        if list(blocks) != sorted(set(blocks)) or not all(0 <= block < depth for block in blocks):
            raise ValueError(f"{name} has blocks 0 to {depth - 1}; {tuple(blocks)} should be some of them, in rising order")
        if image_size % patch:
            raise ValueError(f"images of {image_size} pixels do not split into the {patch}-pixel patches of {name}")
        self.blocks = list(blocks)
        for what in ("mean", "std"):                                             # what the network was trained with; not in its file
            self.register_buffer(what, torch.tensor(self.net.pretrained_cfg[what]).view(1, 3, 1, 1), persistent=False)

    def maps(self, images):
        """Images (B, 3, H, W) in [-1, 1] -> one (B, D, H / patch, W / patch) per block: its raw output, without the final norm.

        Class and register tokens are left out. Gradients reach the images, and values beyond [-1, 1] are not clamped (Sec. 3.3).
        """
        x = ((images + 1) / 2 - self.mean) / self.std
        return self.net.forward_intermediates(x, indices=self.blocks, norm=False, stop_early=True, intermediates_only=True)


def find_backbone(name, given=None):
    """Path of the weights of a timm network: the user's own file, else weights/<name>.safetensors, else repository timm/<name> on the hub."""
    config = import_timm().get_pretrained_cfg(name)
    if config is None:
        raise ValueError(f"{name!r} is not a network with pretrained weights of timm")
    return find_weights("backbone", given, "model.safetensors", config.hf_hub_id or f"timm/{name}", save_as=f"{name}.safetensors")


def load_backbone(name="vit_base_patch16_dinov3.lvd1689m", weights=None, blocks=(2, 5, 8, 11), image_size=256):
    """Phi with its pretrained weights, frozen, in eval mode.

    weights   path or state dict with timm's keys, complete but for a classifier; None: `find_backbone` looks for it
    ValueError in one line when nothing is found, the file cannot be read or does not fit
    """
    model = Backbone(name, blocks, image_size)
    weights = find_backbone(name) if weights is None else weights
    what = f"the backbone {name}"
    # "head.": a classifier, which we do not build; "rope.": constants that timm computes itself
    load_strictly(model.net, read_weights(weights, what), source_name(weights, what), ignore_prefix=("head.", "rope."))
    return model.eval().requires_grad_(False)

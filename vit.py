"""The Vision Transformer of all scripts, and below the second ruler the training kit that they share.

Part 1 is the network: Dosovitskiy et al., arXiv 2010.11929, with the details of MAE (arXiv 2111.06377).

    x = [class token, W patch_1, ..., W patch_N] + positions
    x = x + Attention(LayerNorm(x));  x = x + MLP(LayerNorm(x))         `depth` times
    y = head(LayerNorm(x)[class token])   or   head(LayerNorm(mean of the patches of x))

Part 2 is what a training script needs around a method: processes, images, schedule, checkpoints, log.
It knows nothing of any method, and part 1 knows nothing of it: cut the file there and part 1 works alone.

Use    from vit import ViT, SIZES; model = ViT(**SIZES["tiny"], image_size=224, classes=1000)
Names of parameters are timm's, so files go both ways.
Letters in shape comments: B images, C channels, N patches, n kept patches, L = 1 + N tokens, D width, H heads,
       d = D / H, h and w height and width in pixels
"""
import math
from argparse import Namespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import stochastic_depth

# -------------------------------------------------------------------- part 1: the Vision Transformer

# Tiny and small have 12 heads as in MAE-Lite (arXiv 2205.14443) and MoCo v3; DeiT has 3 and 6. The number of heads
# changes neither parameters nor cost, so it cannot be read from a file of weights and must be given.
SIZES = {
    "demo": dict(width=64, depth=4, heads=4, mlp_ratio=2.0),  # for 32 x 32 images on a laptop
    "tiny": dict(width=192, depth=12, heads=12),
    "small": dict(width=384, depth=12, heads=12),
    "base": dict(width=768, depth=12, heads=12),
    "large": dict(width=1024, depth=24, heads=16),
    "huge": dict(width=1280, depth=32, heads=16, patch_size=14),
}
ACTIVATIONS = {"gelu": nn.GELU, "relu": nn.ReLU}
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class InputError(ValueError):
    """What the user gave cannot be used; the message says what was given, what is expected, what to change."""


def layer_norm(width: int) -> nn.LayerNorm:
    return nn.LayerNorm(width, eps=1e-6)  # not torch's 1e-5: all ViT files of the field were trained with 1e-6


class Attention(nn.Module):
    """Multi-head self-attention, B L D -> B L D."""

    def __init__(self, width: int, heads: int, qkv_bias: bool = True):
        super().__init__()
        if width % heads:
            raise InputError(f"width {width} cannot be divided among {heads} heads")
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.proj = nn.Linear(width, width)

    def split_heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """B L D -> queries, keys and values, each B H L d."""
        return self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)

    def forward(self, x: Tensor) -> Tensor:
        x = F.scaled_dot_product_attention(*self.split_heads(x))                        # B H L d
        return self.proj(x.transpose(1, 2).flatten(2))                                  # B L D


def relation(a: Tensor, b: Tensor) -> Tensor:
    """Raw scores a b^T / sqrt(d) of every head, before any softmax: B H L d twice -> B H L L, at least float32.

    `relation(q, k)` is what fused attention never shows; the distillation methods compare it. (TinyMIM's R is the
    softmax of these scores, taken in its `divergence`.)
    """
    with torch.autocast(a.device.type, enabled=False):  # v v^T leaves the range of half precision
        a, b = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (a, b))
        return a @ b.transpose(-2, -1) * a.shape[-1] ** -0.5


class MLP(nn.Module):
    def __init__(self, width: int, hidden: int, act: str = "gelu"):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = ACTIVATIONS[act]()
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block, B L D -> B L D."""

    def __init__(self, width: int, heads: int, mlp_ratio: float = 4.0, act: str = "gelu", qkv_bias: bool = True,
                 drop_path: float = 0.0):
        super().__init__()
        self.norm1 = layer_norm(width)
        self.attn = Attention(width, heads, qkv_bias)
        self.norm2 = layer_norm(width)
        self.mlp = MLP(width, int(width * mlp_ratio), act)
        self.drop_path = drop_path

    def qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values that this block forms from its input x, each B H L d."""
        return self.attn.split_heads(self.norm1(x))

    def forward(self, x: Tensor) -> Tensor:
        x = x + stochastic_depth(self.attn(self.norm1(x)), self.drop_path, "row", self.training)
        return x + stochastic_depth(self.mlp(self.norm2(x)), self.drop_path, "row", self.training)


class PatchEmbed(nn.Module):
    """The same linear layer for every patch, B C h w -> B N D, patches row by row."""

    def __init__(self, patch_size: int, channels: int, width: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)


class ViT(nn.Module):
    """Vision Transformer.

    image_size   pixels, one number or (height, width); each a multiple of patch_size
    last_heads   heads of the last block where they differ (TinyMIM); None: as the others
    positions    "sincos": fixed table (MAE); "learned": a trained one
    pool         "cls": class token after `norm`; "mean": `fc_norm` of the mean of the patches (MAE fine-tuning)
    classes      width of the linear head; 0: no head, `forward` gives features
    drop_path    rate of stochastic depth in the last block, growing linearly from 0; or one rate a block

    `config` holds what is needed to build the same network again, in plain types.
    Raises InputError where sizes do not fit each other.
    """

    def __init__(self, image_size: int | tuple[int, int] = 224, patch_size: int = 16, channels: int = 3,
                 width: int = 192, depth: int = 12, heads: int = 12, last_heads: int | None = None,
                 mlp_ratio: float = 4.0, act: str = "gelu", qkv_bias: bool = True, positions: str = "sincos",
                 pool: str = "cls", classes: int = 0, drop_path: float | list[float] = 0.0):
        super().__init__()
        if positions not in ("sincos", "learned") or pool not in ("cls", "mean") or act not in ACTIVATIONS:
            raise InputError(f"positions {positions!r} (sincos, learned), pool {pool!r} (cls, mean) or act {act!r} "
                             f"({', '.join(ACTIVATIONS)}) is unknown")
        height, wide = (image_size, image_size) if isinstance(image_size, int) else image_size
        if height % patch_size or wide % patch_size or min(height, wide) < patch_size:
            raise InputError(f"image size {height}x{wide} is not a multiple of the patch size {patch_size}: "
                             "some pixels would never be seen")
        self.config = dict(image_size=[height, wide], patch_size=patch_size, channels=channels, width=width,
                           depth=depth, heads=heads, last_heads=last_heads or heads, mlp_ratio=mlp_ratio, act=act,
                           qkv_bias=qkv_bias, positions=positions, pool=pool, classes=classes)
        self.image_size, self.patch_size, self.channels = (height, wide), patch_size, channels
        self.grid = (height // patch_size, wide // patch_size)                          # rows, columns
        self.patches = self.grid[0] * self.grid[1]
        self.width, self.depth, self.pool = width, depth, pool

        self.patch_embed = PatchEmbed(patch_size, channels, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(position_table(positions, width, self.grid), positions == "learned")
        if isinstance(drop_path, (int, float)):
            drop_path = [drop_path * i / max(depth - 1, 1) for i in range(depth)]
        self.blocks = nn.ModuleList(
            Block(width, (last_heads or heads) if i == depth - 1 else heads, mlp_ratio, act, qkv_bias, drop_path[i])
            for i in range(depth))
        self.norm = layer_norm(width) if pool == "cls" else nn.Identity()
        self.fc_norm = layer_norm(width) if pool == "mean" else nn.Identity()
        self.head = nn.Linear(width, classes) if classes else nn.Identity()

        self.apply(init_linear)
        # The patch projection is a linear layer in disguise; its bias keeps the default of a convolution, as in MAE.
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.data.flatten(1))
        nn.init.normal_(self.cls_token, std=0.02)

    def embed(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        """Tokens that enter the first block: images B C h w, keep B n -> B 1+n D; without `keep`, B 1+N D.

        keep   numbers of the patches that the network sees, for each image its own, in any order
        """
        if images.shape[1:] != (self.channels, *self.image_size):
            raise InputError(f"images are {tuple(images.shape[1:])}, the network takes "
                             f"{(self.channels, *self.image_size)} (channels, height, width)")
        x = self.patch_embed(images) + self.pos_embed[:, 1:]                            # B N D
        if keep is not None:
            x = take(x, keep)                                                           # B n D
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)           # B 1 D
        return torch.cat([cls, x], dim=1)

    def encode(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        """Tokens after the last block and `norm`, class token first: images B C h w, keep B n -> B 1+n D (or 1+N)."""
        x = self.embed(images, keep)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def features(self, images: Tensor) -> Tensor:
        """One vector an image: B C h w -> B D."""
        x = self.encode(images)
        return self.fc_norm(x[:, 0] if self.pool == "cls" else x[:, 1:].mean(1))

    def forward(self, images: Tensor) -> Tensor:
        """B C h w -> B classes; without a head, B D."""
        return self.head(self.features(images))


def take(x: Tensor, index: Tensor) -> Tensor:
    """x B N D, index B n -> B n D: row index[b, i] of x[b]."""
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def init_linear(module: nn.Module) -> None:
    """For `apply`: Xavier-uniform weights, zero biases. q, k and v count as one matrix (MAE's code, not MoCo v3's)."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def position_table(kind: str, width: int, grid: tuple[int, int]) -> Tensor:
    """Positions of a class token and rows x columns patches, 1 1+N D: fixed sin-cos, or N(0, 0.02) to be learned."""
    if kind == "learned":
        return torch.empty(1, 1 + grid[0] * grid[1], width).normal_(std=0.02)
    return torch.cat([torch.zeros(1, width), sincos_2d(width, grid)]).unsqueeze(0)


def sincos_2d(width: int, grid: tuple[int, int]) -> Tensor:
    """Fixed 2-D positions, rows x columns -> N D. The first half of the channels tells the column, the second the row;
    each half is [sin | cos] of position * 10000^(-k / (D/4)). This is MAE's order; MoCo v3 has the halves swapped.
    Raises InputError unless the width is a multiple of 4."""
    if width % 4:
        raise InputError(f"sin-cos positions need a width that is a multiple of 4, not {width}")
    omega = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    row, column = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    angles = [position.reshape(-1, 1) * omega for position in (column, row)]
    return torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=1).float()


def resize_positions(table: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Positions 1 1+N D of one grid stretched to another: bicubic, not antialiased; the class token's row is copied."""
    if tuple(old) == tuple(new):
        return table
    patches = table[:, 1:].unflatten(1, old).permute(0, 3, 1, 2)                        # 1 D rows columns
    patches = F.interpolate(patches, size=tuple(new), mode="bicubic", align_corners=False)
    return torch.cat([table[:, :1], patches.flatten(2).transpose(1, 2)], dim=1)


def param_groups(model: nn.Module, weight_decay: float, undecayed: tuple[str, ...] = (),
                 layer_decay: float = 1.0) -> list[dict]:
    """Groups for an optimizer, each with its `weight_decay` and the factor `lr_scale` of its learning rate.

    Vectors (biases, norm scales) and the parameters named in `undecayed` have no weight decay.
    With layer_decay d, block i of a ViT learns at d^(depth - i), the embeddings at d^(depth + 1), the head at 1.
    """
    depth = getattr(model, "depth", 0)
    groups: dict[tuple[float, float], dict] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decay = 0.0 if parameter.ndim == 1 or name in undecayed else weight_decay
            scale = layer_decay ** (depth + 1 - layer_of(name, depth))
            groups.setdefault((scale, decay), dict(params=[], lr_scale=scale, weight_decay=decay))
            groups[scale, decay]["params"].append(parameter)
    return list(groups.values())


def layer_of(name: str, depth: int) -> int:
    """Layer of a ViT's parameter: 0 for the embeddings, i + 1 for block i, depth + 1 for all that comes after."""
    if name in ("cls_token", "pos_embed") or name.startswith("patch_embed."):
        return 0
    return int(name.split(".")[1]) + 1 if name.startswith("blocks.") else depth + 1


# What published files hold besides the encoder: decoders, projectors, distillation heads.
NOT_ENCODER = ("mask_token", "decoder_", "head.", "decoderfeature_pred.", "encoderfeature_pred.", "dist_token",
               "head_dist.")
# Encoders in a file that are not the one to use: MoCo v3's momentum copy, the teacher in MAE-Lite's D-MAE files.
NOT_WANTED = ("momentum_encoder.", "tch_model.")


def load_file(path: str) -> dict:
    """A file of `torch.save` with nothing but tensors and plain types in it. Raises InputError if it is none."""
    try:
        with torch.serialization.safe_globals([Namespace]):  # official files carry their arguments as one
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except Exception as error:  # whatever a torn, foreign or malicious file can raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{path}: not a readable checkpoint ({reason[:120]})") from None


def weights_of(file: dict) -> dict:
    """The state dict in a file, wherever the field puts it."""
    return next((file[key] for key in ("model", "state_dict") if isinstance(file, dict) and key in file), file)


def read_encoder(path: str, heads: int | None = None, flag: str = "--heads") -> tuple[dict, dict]:
    """(state dict in the names of ViT, config) of the one encoder in a file: ours, MAE, MAE-Lite, DeiT, MoCo v3,
    TinyMIM, G2SD or timm. Prefixes such as `module.`, `encoder.` or `base_encoder.` are taken off.

    heads   for files without a config of ours: weights do not show how many heads they were trained with
    flag    the option that gives `heads`, for messages
    Raises InputError if there is no encoder, more than one, or if `heads` contradicts the file or is missing.
    """
    file = load_file(path)
    state = weights_of(file)
    names = [name for name in state if isinstance(name, str)] if isinstance(state, dict) else []
    prefixes = [name.removesuffix("cls_token") for name in names if name.endswith("cls_token")]
    prefixes = [prefix for prefix in prefixes if not any(word in prefix for word in NOT_WANTED)]
    if len(prefixes) != 1:
        raise InputError(f"{path}: expected one Vision Transformer, found {len(prefixes)} (looked for `cls_token`; "
                         f"the first names are {names[:3]})")
    state = {name.removeprefix(prefixes[0]): state[name] for name in names if name.startswith(prefixes[0])}
    config = file.get("config")
    if not isinstance(config, dict) or "heads" not in config:
        return state, guess_config(state, heads, path, flag)
    if heads not in (None, config["heads"]):
        raise InputError(f"{flag} {heads}: {path} was trained with {config['heads']} heads")
    return state, dict(config)


def guess_config(state: dict, heads: int | None, path: str, flag: str) -> dict:
    """The config of an encoder of which only the weights are known, its image taken to be square."""
    try:
        width, channels, patch_size = state["patch_embed.proj.weight"].shape[:3]
        side = math.isqrt(state["pos_embed"].shape[1] - 1)
        hidden = len(state["blocks.0.mlp.fc1.weight"])
    except (KeyError, AttributeError, IndexError, TypeError, ValueError) as error:
        raise InputError(f"{path}: not the weights of a plain Vision Transformer ({error})") from None
    if heads is None and width not in (768, 1024, 1280):
        raise InputError(f"{path} does not say how many heads its {width}-wide network has; give {flag} "
                         "(width 192: 12 in MAE-Lite and MoCo v3, 3 in DeiT; width 384: 12 there, 6 in DeiT and G2SD)")
    return dict(image_size=[side * patch_size] * 2, patch_size=patch_size, channels=channels, width=width,
                depth=1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks.")),
                heads=heads or {768: 12}.get(width, 16), last_heads=heads or {768: 12}.get(width, 16),
                mlp_ratio=hidden / width, act="gelu", qkv_bias="blocks.0.attn.qkv.bias" in state, positions="sincos",
                pool="mean" if "fc_norm.weight" in state else "cls",
                classes=len(state["head.weight"]) if "head.weight" in state else 0,
                mean=list(IMAGENET_MEAN), std=list(IMAGENET_STD))


def encoder_options(config: dict, **changes) -> dict:
    """Arguments of ViT for the `config` of a file: an encoder without head, but for `changes`."""
    kept = {name: value for name, value in config.items() if name not in ("mean", "std", "pool", "classes")}
    return {**kept, **changes}


def load_encoder(vit: ViT, state: dict, config: dict, fresh: tuple[str, ...] = ("head.",)) -> list[str]:
    """Loads what `read_encoder` gave; positions are stretched to the grid of `vit`. Returns the names that keep
    their initial values: those that begin with an entry of `fresh` and are not in the file, and a mean-pooling
    network's `fc_norm` if the file has none (MAE leaves the pre-trained `norm` unused there).

    Raises InputError, naming every key, if anything else is missing, is unknown, or has another shape.
    """
    if config["patch_size"] != vit.patch_size:
        raise InputError(f"the file has patches of {config['patch_size']} pixels, the network of {vit.patch_size}")
    state, own = dict(state), vit.state_dict()
    if "pos_embed" in state:
        grid = tuple(side // config["patch_size"] for side in config["image_size"])
        if state["pos_embed"].shape[1] != 1 + grid[0] * grid[1]:
            raise InputError(f"`pos_embed` has {state['pos_embed'].shape[1]} rows: not a class token and a "
                             f"{grid[0]} x {grid[1]} grid of patches")
        state["pos_embed"] = resize_positions(state["pos_embed"], grid, vit.grid)
    if vit.pool == "mean" and "fc_norm.weight" not in state:
        fresh = (*fresh, "fc_norm.")
    other_norm = "norm." if vit.pool == "mean" else "fc_norm."
    missing = [name for name in own if name not in state]
    kept = [name for name in missing if name.startswith(tuple(fresh))]
    unknown = [name for name in state if name not in own and not name.startswith((*NOT_ENCODER, other_norm))]
    shapes = [f"{name} {tuple(state[name].shape)} for {tuple(own[name].shape)}" for name in own
              if name in state and state[name].shape != own[name].shape]
    missing = [name for name in missing if name not in kept]
    for what, names in (("missing", missing), ("unknown", unknown), ("of another shape", shapes)):
        if names:
            raise InputError(f"the weights do not fit the network; {what}: {', '.join(names)}")
    vit.load_state_dict({name: state.get(name, own[name]) for name in own})
    return kept


# -------------------------------------------------------------------- part 2: the training kit
# Processes, images, schedule, checkpoints, log. All random numbers are a function of (seed, step) for the whole batch,
# of which every process takes its rows: a resumed run repeats an uninterrupted one, and 1 or 8 processes train alike.
#
# A script calls, in this order: parse_args, start_processes, open_images, apply_recipe, open_run, wrap,
# load_checkpoint, Batches, Log; then in every step set_lr, next(loader), autocast, log.step. To follow an image:
# open_images, requests, views_of. Only finetune.py and g2sd.py need the last section, on labels.
# Part 1 stands alone, so this part brings its own imports.
import argparse
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from glob import glob
from itertools import zip_longest
from pathlib import Path
from statistics import NormalDist

import numpy as np
import torch.distributed as dist
from PIL import Image, ImageEnhance, ImageOps
from torch.utils.data import ConcatDataset, DataLoader, Dataset
from torchvision import datasets
from torchvision.transforms import v2
from tqdm import tqdm

# ---- the command line

# {group: {option: (type, allowed, meaning)}}; allowed: smallest and largest value, or the words to choose from.
SHARE, COUNT, NOT_NEGATIVE = (0, 1), (1, 2**62), (0, 2**62)
COMMON_OPTIONS = {
    "model": {
        "model": (str, tuple(SIZES), "size of the network"),
        "width": (int, COUNT, "channels of a token, instead of the size's"),
        "depth": (int, COUNT, "blocks, instead of the size's"),
        "heads": (int, COUNT, "attention heads, instead of the size's"),
        "mlp_ratio": (float, (1e-6, 1e6), "hidden width of the MLPs / width, instead of the size's"),
        "image_size": (int, COUNT, "side of the square input in pixels"),
        "patch_size": (int, COUNT, "side of a patch in pixels"),
        "act": (str, tuple(ACTIVATIONS), "activation in the MLPs"),
        "qkv_bias": (bool, None, "biases in the projections to queries, keys and values"),
        "positions": (str, ("sincos", "learned"), "of the tokens: a fixed table, or learned"),
    },
    "optimisation": {
        "epochs": (float, NOT_NEGATIVE, "passes over the images"),
        "warmup_epochs": (float, NOT_NEGATIVE, "epochs over which the learning rate rises from 0"),
        "batch_size": (int, COUNT, "images per update, on all processes together"),
        "micro_batch": (int, COUNT, "most images that one process holds at once; a larger share is accumulated"),
        "blr": (float, (0, 1e38), "base learning rate: learning rate = blr x batch size / 256"),
        "min_lr": (float, NOT_NEGATIVE, "learning rate at the end of the cosine"),
        "weight_decay": (float, NOT_NEGATIVE, "weight decay"),
    },
}


def parse_args(argv: list[str] | None, about: str, recipes: dict[str, dict], options: dict[str, dict]) -> Namespace:
    """The command line of a script: its own `options`, in the form of COMMON_OPTIONS, the common ones, the run's.

    What a recipe decides is None until `apply_recipe`; `--help` shows the value of every recipe.
    Unknown and abbreviated flags end the program with status 2.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    limits = dict(seed=NOT_NEGATIVE, workers=NOT_NEGATIVE, save_minutes=NOT_NEGATIVE, log_every=COUNT)
    for title in dict.fromkeys([*options, *COMMON_OPTIONS]):
        group = parser.add_argument_group(title)
        for name, (kind, allowed, meaning) in {**COMMON_OPTIONS.get(title, {}), **options.get(title, {})}.items():
            by_value: dict[str, list[str]] = {}
            for recipe, values in recipes.items():
                if values.get(name) is not None:
                    by_value.setdefault(str(values[name]), []).append(recipe)
            shown = "; ".join(f"{value}: {', '.join(names)}" for value, names in by_value.items())
            how = dict(type=kind, metavar=kind.__name__)
            if kind is bool:
                how = dict(action=argparse.BooleanOptionalAction)
            elif kind is str and allowed:
                how = dict(choices=allowed)
            elif allowed:
                limits[name] = allowed
            group.add_argument("--" + name.replace("_", "-"), help=meaning + (f" [{shown}]" if shown else ""), **how)
    run = parser.add_argument_group("data and run")
    run.add_argument("--data", default="shapes", help="folder of images (train/ and val/ inside; class folders in "
                     "them where labels are needed), a name of torchvision ("
                     + ", ".join(TORCHVISION) + "), or shapes: generated images [%(default)s]")
    run.add_argument("--data-root", default="data", help="where torchvision keeps its data sets [%(default)s]")
    run.add_argument("--download", action="store_true", help="let torchvision download the data set")
    run.add_argument("--recipe", choices=recipes, help="table of defaults [cifar for CIFAR and images up to "
                     "64 pixels, demo for shapes, else imagenet]")
    run.add_argument("--out", help="folder for checkpoints and log [runs/<script>-<recipe>, numbered]")
    run.add_argument("--resume", nargs="?", const="", metavar="PATH", help="continue the run in --out, or that in PATH "
                     "(a folder or its last.pth)")
    run.add_argument("--seed", type=int, default=0, help="of all chance in the run [%(default)s]")
    run.add_argument("--workers", type=int, help="processes that decode images, for each training process "
                     "[its share of the cores]")
    run.add_argument("--device", default="auto", choices=["auto", "cuda", "cpu"],
                     help="[%(default)s: cuda if there is one]")
    run.add_argument("--precision", default="auto", choices=["auto", "bf16", "fp16", "fp32"],
                     help="of matrix products [%(default)s: on a GPU bf16 if it can, else fp16; on a CPU fp32]")
    run.add_argument("--compile", action="store_true", help="compile the model: a minute's wait, then faster steps")
    run.add_argument("--save-minutes", type=float, default=10, help="minutes between checkpoints [%(default)s]")
    run.add_argument("--log-every", type=int, default=50, help="steps between records in log.jsonl [%(default)s]")
    args = parser.parse_args(argv)
    for name, value in vars(args).items():
        low, high = limits.get(name, (-math.inf, math.inf))
        if isinstance(value, (int, float)) and not (low <= value <= high and math.isfinite(value)):
            expected = f"{low} or more" if high > 1e9 else f"from {low} to {high}"
            parser.error(f"--{name.replace('_', '-')} {value}: expected {expected}")
    return args


def recipe_for(args: Namespace, images: "Images") -> str:
    """--recipe, or what fits the data: demo for the shapes, cifar for images up to 64 pixels, else imagenet."""
    if args.recipe or args.data == "shapes":
        return args.recipe or "demo"
    return "cifar" if images.side is not None and images.side <= 64 else "imagenet"


def apply_recipe(args: Namespace, name: str, recipes: dict[str, dict]) -> None:
    """Gives every option that was not on the command line its value in the recipe; args.recipe becomes its name."""
    args.recipe = name
    for option, value in recipes[name].items():
        if getattr(args, option, None) is None:
            setattr(args, option, value)


def vit_options(args: Namespace) -> dict:
    """Arguments of ViT from --model and the flags that change a part of it."""
    given = {name: getattr(args, name) for name in COMMON_OPTIONS["model"] if name != "model"}
    return {**SIZES[args.model], **{name: value for name, value in given.items() if value is not None}}


def decoder_sizes(text: str) -> tuple[int, int, int]:
    """--decoder WIDTHxBLOCKSxHEADS as three numbers. Raises InputError if it is none."""
    numbers = text.split("x")
    if len(numbers) != 3 or not all(number.isdecimal() and int(number) for number in numbers):
        raise InputError(f"--decoder {text} is not WIDTHxBLOCKSxHEADS, three numbers from 1 on, as 96x1x3")
    return tuple(map(int, numbers))


# ---- processes

@dataclass(frozen=True)
class World:
    """This process among all: its number, how many there are, its device."""
    rank: int
    size: int
    device: torch.device

    @property
    def main(self) -> bool:
        return self.rank == 0

    def rows(self, total: int) -> slice:
        """The share of this process in a batch of `total`."""
        return slice(self.rank * total // self.size, (self.rank + 1) * total // self.size)

    def sum(self, values: Tensor) -> Tensor:
        """In place, the sum over all processes."""
        if dist.is_initialized():
            dist.all_reduce(values)
        return values


def start_processes(args: Namespace) -> World:
    """Joins the processes that torchrun started, or is alone; sets args.device, args.precision and args.workers.
    Raises InputError for a device that is not there or an environment that torchrun did not make."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    given = [name for name in names if name in os.environ]
    if given and len(given) < len(names):
        raise InputError(f"the environment has {', '.join(given)} but not all of {', '.join(names)}: start several "
                         "processes by torchrun, or unset these for a single one")
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    device, precision = torch.device("cpu"), "fp32"
    if args.device == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise InputError(f"--device cuda: process {local_rank} of this machine finds {torch.cuda.device_count()} "
                             "GPUs; start no more processes than there are, or choose --device cpu")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 for what is not in half precision
        torch.backends.cudnn.benchmark = True
        precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    elif args.precision == "fp16":
        raise InputError("--precision fp16 needs a GPU; on a CPU use fp32 or bf16")
    if args.precision == "auto":
        args.precision = precision
    if args.workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        args.workers = min(16, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    if given:
        dist.init_process_group("nccl" if args.device == "cuda" else "gloo", timeout=timedelta(minutes=20),
                                device_id=device if args.device == "cuda" else None)
        return World(dist.get_rank(), dist.get_world_size(), device)
    return World(0, 1, device)


def parts_of_batch(args: Namespace, world: World) -> int:
    """Into how many parts a process cuts its share of a batch. Raises InputError if that leaves a remainder."""
    share, rest = divmod(args.batch_size, world.size)
    parts = math.ceil(share / args.micro_batch)
    if rest or share == 0 or share % parts:
        raise InputError(f"--batch-size {args.batch_size} is not processes x parts x images: {world.size} processes "
                         f"x {parts} parts (--micro-batch {args.micro_batch}) x a whole number of images")
    return parts


def wrap(model: nn.Module, args: Namespace, world: World) -> nn.Module:
    """What to call in training: `model`, moved to the device, compiled if asked, its gradients shared by processes.
    Parameters and checkpoints are those of `model` itself."""
    model.to(world.device)
    wrapped = torch.compile(model) if args.compile else model
    if dist.is_initialized():
        devices = [world.device] if world.device.type == "cuda" else None
        wrapped = nn.parallel.DistributedDataParallel(wrapped, devices)
    return wrapped


def autocast(args: Namespace) -> torch.autocast:
    """Context of the forward pass: matrix products in the chosen precision, on the chosen device."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(args.precision)
    return torch.autocast(args.device, dtype, enabled=dtype is not None)


def gradients_shared(wrapped: nn.Module, now: bool):
    """Context of a backward pass: processes average their gradients only in the last part of a batch."""
    return nullcontext() if now or not dist.is_initialized() else wrapped.no_sync()


def say(text: str) -> None:
    """To stderr, if anyone still reads it: a closed pipe must not end a training."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        pass


def launch(main: Callable[[], None]) -> None:
    """Runs a script. An error that its user can fix is one line on stderr and exit status 2, not a traceback."""
    code = 0
    try:
        main()
    except InputError as error:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(3)  # an error of all processes is reported by the first; torchrun ends the others
        say(f"{Path(sys.argv[0]).name}: {error}")
        code = 2
    except KeyboardInterrupt:
        code = 130
    except SystemExit as end:
        code = end.code
    except Exception:
        traceback.print_exc()
        code = 1
    if dist.is_initialized():
        if code:  # the others may be inside a collective: leave without them, torchrun ends them
            sys.stdout.flush()
            os._exit(code)
        dist.destroy_process_group()
    sys.exit(code)


# ---- chance and schedule

# Independent random streams: drawing from one does not change the others.
ORDER, CROPS, MASKS, LAYERS, LABELS = range(5)


def chance(seed: int, stream: int, step: int) -> np.random.Generator:
    """The generator of one stream at one step (for ORDER: one epoch)."""
    return np.random.default_rng([seed, stream, step])


def uniform(shape: tuple[int, ...], seed: int, stream: int, step: int) -> np.ndarray:
    """Numbers in [0, 1) for a whole batch, the same on every process."""
    return chance(seed, stream, step).random(shape, dtype=np.float32)


def drawn(width: int, stream: int, step: int, args: Namespace, world: World) -> Tensor:
    """Numbers in [0, 1) for this process's images of one step, rows x width, on the device."""
    numbers = uniform((args.batch_size, width), args.seed, stream, step)[world.rows(args.batch_size)]
    return sent(numbers, world.device)


def sent(values: np.ndarray, device: torch.device) -> Tensor:
    """To the device, for a GPU by way of pinned memory: else the copy would wait for all that the GPU has to do yet."""
    values = torch.from_numpy(values)
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values


def cosine(epoch: float, peak: float, low: float, warmup: float, epochs: float) -> float:
    """Learning rate: 0 -> peak linearly over `warmup` epochs, then half a cosine down to `low` (MAE, lr_sched)."""
    if epoch < warmup:
        return peak * epoch / warmup
    return low + (peak - low) / 2 * (1 + math.cos(math.pi * (epoch - warmup) / (epochs - warmup)))


def reseed(seed: int, *place: int) -> None:
    """Seeds torch's own generators, which stochastic depth and mixing use, for one place in a run: step, rank, part."""
    torch.manual_seed(int(np.random.default_rng([seed, LAYERS, *place]).integers(2**63)))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


# ---- images in

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff")
UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)  # what Pillow raises on broken files
# name: (class in torchvision.datasets, options for training, for evaluation, and for pre-training if others)
TORCHVISION = {
    "cifar10": ("CIFAR10", [dict(train=True)], [dict(train=False)]),
    "cifar100": ("CIFAR100", [dict(train=True)], [dict(train=False)]),
    "stl10": ("STL10", [dict(split="train")], [dict(split="test")], [dict(split="train+unlabeled")]),
    "flowers102": ("Flowers102", [dict(split="train"), dict(split="val")], [dict(split="test")]),
    "pets": ("OxfordIIITPet", [dict(split="trainval")], [dict(split="test")]),
    "aircraft": ("FGVCAircraft", [dict(split="trainval")], [dict(split="test")]),
    "food101": ("Food101", [dict(split="train")], [dict(split="test")]),
    "dtd": ("DTD", [dict(split="train"), dict(split="val")], [dict(split="test")]),
    "imagenette": ("Imagenette", [dict(split="train")], [dict(split="val")]),
}


@dataclass(frozen=True)
class View:
    """How the images of a batch are cropped and augmented.

    size         (height, width) of what the network gets, in pixels
    scale        smallest and largest share of an image's area that a random crop takes; None: the centre
    centre       without `scale`: the share of the image's shorter side that is seen (timm's crop_pct)
    randaugment  magnitude of timm's RandAugment, 0..10; 0: none
    count        random views of every image (MoCo v3: 2); all first views come before all second ones
    """
    size: tuple[int, int]
    scale: tuple[float, float] | None = None
    centre: float = 1.0
    randaugment: float = 0.0
    count: int = 1

    NUMBERS = 23 + 8  # of chance for one image: 10 tries x (area, ratio), place, flip; RandAugment: 2 operations x 4

    def boxes(self, numbers: np.ndarray, height: int, width: int) -> np.ndarray:
        """Where to look: numbers B x NUMBERS -> B x (top, left, height, width) in pixels."""
        if self.scale is not None:
            return crop_boxes(numbers, height, width, self.scale)
        aspect = self.size[0] / self.size[1]
        h, w = (max(1.0, self.centre * side) for side in (min(height, width * aspect), min(width, height / aspect)))
        return np.tile([(height - h) / 2, (width - w) / 2, h, w], (len(numbers), 1))

    def flips(self, numbers: np.ndarray) -> np.ndarray:
        return (numbers[:, 22] < 0.5) & (self.scale is not None)


def crop_boxes(numbers: np.ndarray, height: int, width: int, scale: tuple[float, float]) -> np.ndarray:
    """Boxes as torchvision's RandomResizedCrop draws them (ratio 3/4 to 4/3): the first of ten tries that fits into
    the image, else its centre. numbers B x NUMBERS -> B x (top, left, height, width)."""
    area = height * width * (scale[0] + (scale[1] - scale[0]) * numbers[:, 0:10])
    ratio = np.exp(math.log(3 / 4) + math.log(16 / 9) * numbers[:, 10:20])
    tries = np.stack([np.sqrt(area / ratio), np.sqrt(area * ratio)]).round()            # 2 B 10: heights, widths
    fits = ((tries > 0) & (tries <= np.array([height, width])[:, None, None])).all(0)   # B 10
    h, w = np.take_along_axis(tries, fits.argmax(1)[None, :, None], 2)[:, :, 0]         # B each
    top, left = np.floor(numbers[:, 20] * (height - h + 1)), np.floor(numbers[:, 21] * (width - w + 1))
    none = ~fits.any(1)
    h[none], w[none] = min(height, round(width * 4 / 3)), min(width, round(height * 4 / 3))
    top[none], left[none] = (height - h[none]) // 2, (width - w[none]) // 2
    return np.stack([top, left, h, w], axis=1)


@dataclass
class Images:
    """Images: what is kept of each, M; labels M int64 and the names of their classes, or None for these."""
    items: Tensor | np.ndarray
    labels: np.ndarray | None
    classes: list[str] | None

    side = None  # longer side of an image in pixels, where all have the same size

    def __len__(self) -> int:
        return len(self.items)

    def subset(self, index: np.ndarray) -> "Images":
        return replace(self, items=self.items[index], labels=None if self.labels is None else self.labels[index])

    def cut(self, i: int, view: View, numbers: np.ndarray) -> Tensor:
        """The part of image i that `view` chooses by numbers 1 NUMBERS, uint8 C h w, not resized yet."""
        raise NotImplementedError


class Packed(Images):
    """Images of one size; items: uint8 M C h w, on the device where they are augmented in batches."""

    @property
    def side(self) -> int:
        return max(self.items.shape[2:])

    def cut(self, i, view, numbers):
        (top, left, h, w), = view.boxes(numbers, *self.items.shape[2:]).round().astype(int)
        return self.items[i, :, top:top + h, left:left + w]

    def look(self, index: np.ndarray, numbers: np.ndarray, view: View) -> Tensor:
        """A batch of views, float B C h w in 0..1: each image cropped, flipped and resized by two matrix products."""
        device = self.items.device
        boxes = np.column_stack([view.boxes(numbers, *self.items.shape[2:]).round(), view.flips(numbers)])
        top, left, h, w, flip = sent(boxes.astype(np.float32), device).T
        rows = resampling(top, h, torch.zeros_like(flip), self.items.shape[2], view.size[0])
        columns = resampling(left, w, flip, self.items.shape[3], view.size[1])
        pixels = self.items[sent(index, device)].float().div_(255)
        return (rows[:, None] @ pixels @ columns[:, None].mT).clamp_(0, 1)


def resampling(start: Tensor, length: Tensor, flip: Tensor, old: int, new: int) -> Tensor:
    """Weights of an image's `old` pixels in each of `new` along one axis, B new old: what lies from `start` over
    `length`, B each, is resized as Pillow resizes a crop (bicubic, antialiased), and mirrored where `flip` is 1."""
    pixel = torch.arange(old, device=start.device) + 0.5
    place = (torch.arange(new, device=start.device) + 0.5) / new                        # 0..1 in the crop
    start, length, flip = (x.view(-1, 1, 1) for x in (start, length, flip))
    centre = start + length * (flip + (1 - 2 * flip) * place[:, None])                  # B new 1
    x = ((pixel - centre) / (length / new).clamp(min=1)).abs()                          # B new old
    # Keys' cubic kernel with a = -1/2 is u^2 (u - 1) / 2 for 1 < x < 2; nearer than 1, v^2 (1 - 2 v) is added.
    u, v = (2 - x).clamp_(min=0), (1 - x).clamp_(min=0)
    weights = u * u * (u - 1) / 2 + v * v * (1 - 2 * v)
    weights = weights * ((pixel > start) & (pixel < start + length))
    return weights / weights.sum(2, keepdim=True)


@dataclass
class Files(Images):
    """Images in files; items: their names below `root`, one array of bytes, which worker processes share."""
    root: str

    def path(self, i: int) -> str:
        return os.path.join(self.root, os.fsdecode(bytes(self.items[i])))

    def open(self, i: int) -> Image.Image:
        """Image i, not yet decoded."""
        return Image.open(self.path(i))

    def cut(self, i, view, numbers):
        """Raises InputError, with its path, if the image cannot be read."""
        try:
            with self.open(i) as image:
                width, height = image.size
                (top, left, h, w), = view.boxes(numbers, height, width)
                # A large JPEG is decoded at 1/2, 1/4 or 1/8 where its crop keeps at least twice the size wanted.
                image.draft("RGB", (math.ceil(2 * width * view.size[1] / w), math.ceil(2 * height * view.size[0] / h)))
                x, y = image.size[0] / width, image.size[1] / height
                box = [round(left * x), round(top * y), round((left + w) * x), round((top + h) * y)]
                box[2:] = max(box[2], box[0] + 1), max(box[3], box[1] + 1)
                picture = eight_bits(image).crop(box).convert("RGB")
                return torch.from_numpy(np.array(picture)).permute(2, 0, 1)
        except UNREADABLE as error:
            raise InputError(f"{self.path(i)}: cannot be read ({error})") from None


class Named(Files):
    """Images of a data set of torchvision, in place of `root`; items: their numbers there."""

    def path(self, i: int) -> str:
        return f"image {self.items[i]} of {type(self.root).__name__}"

    def open(self, i: int) -> Image.Image:
        return self.root[int(self.items[i])][0]


def eight_bits(image: Image.Image) -> Image.Image:
    """16-bit and float grey is scaled to 0..255, by the range of the whole image; Pillow alone would clip it to
    white. All other kinds stay as they are."""
    if not image.mode.startswith("I") and image.mode != "F":
        return image
    grey = np.asarray(image, np.float32)
    top = 65535 if image.mode.startswith("I;16") or grey.max() > 255 else 1 if grey.max() <= 1 else 255
    return Image.fromarray((grey / top * 255).clip(0, 255).astype(np.uint8))


def resize(picture: Tensor, size: tuple[int, int]) -> Tensor:
    """uint8 C h w -> C and the new size, bicubic and antialiased."""
    return v2.functional.resize(picture, list(size), interpolation=v2.InterpolationMode.BICUBIC, antialias=True)


def open_images(args: Namespace, split: str = "train", labels: bool = False) -> Images:
    """The images that --data names. split: "train" or "val"; labels: whether classes are needed.
    Small images (all sides up to 64 pixels) are decoded once, here. Raises InputError if there are none."""
    if args.data == "shapes":
        images = shapes(20000, seed=0) if split == "train" else shapes(2000, seed=1)
    elif args.data in TORCHVISION:
        images = open_torchvision(args, split, labels)
    else:
        images = pack_if_small(open_folder(args.data, split, labels), strict=split == "val")
    if split == "train":
        args.pictures = len(images)  # noted, so that a run is not continued on others
    return images


def open_folder(data: str, split: str, labels: bool) -> Files:
    """Images below data/split (or, for unlabelled training, anywhere below data), in sorted order.
    Classes are the folders of data/train, whatever the split; hidden files and folders are passed over."""
    if not os.path.isdir(data):
        raise InputError(f"--data {data}: no such folder, and none of {', '.join(TORCHVISION)}, shapes")
    folder = os.path.join(data, split)
    if not os.path.isdir(folder):
        if labels or split != "train":
            raise InputError(f"--data {data}: no folder {folder}; expected {split}/<class>/<image>")
        folder = data
    names, ids, classes = list(find_images(os.fsencode(folder))), None, None
    if labels:
        classes = class_folders(os.path.join(data, "train"))
        if not classes:
            raise InputError(f"--data {data}: no class folders in {data}/train; expected train/<class>/<image>")
        extra = sorted(set(class_folders(folder)) - set(classes))
        if extra:
            raise InputError(f"--data {data}: classes {', '.join(extra[:5])} are in {split}/ but not in train/")
        number = {os.fsencode(name): i for i, name in enumerate(classes)}
        names = [name for name in names if os.path.dirname(name)]
        ids = np.array([number[name.split(os.fsencode(os.sep))[0]] for name in names], np.int64)
        for empty in np.setdiff1d(np.arange(len(classes)), ids):
            say(f"warning: class {classes[empty]} has no images in {folder}")
    if not names:
        raise InputError(f"--data {data}: no images in {folder} (looked for {' '.join(SUFFIXES)})")
    return Files(np.array(names), ids, classes, folder)


def class_folders(folder: str) -> list[str]:
    """Names of the folders in a folder, sorted; none if it is not there."""
    return sorted(name.rstrip(os.sep) for name in glob("*/", root_dir=folder))


def find_images(folder: bytes) -> Iterator[bytes]:
    """Names of the images below a folder, in sorted order."""
    suffixes = tuple(suffix.encode() for suffix in SUFFIXES)
    try:
        with os.scandir(folder) as entries:
            found = sorted((entry.name, entry.is_dir()) for entry in entries if not entry.name.startswith(b"."))
    except OSError as error:  # not allowed, or links that lead in a circle
        raise InputError(f"{os.fsdecode(folder)} cannot be listed ({error.strerror})") from None
    for name, is_folder in found:
        if is_folder:
            yield from (os.path.join(name, below) for below in find_images(os.path.join(folder, name)))
        elif name.lower().endswith(suffixes):
            yield name


def pack_if_small(files: Files, strict: bool, most_bytes: int = 2**31) -> Images:
    """Decodes a folder of small images into one array: their files would cost more than the training."""
    sizes = set()
    for i in np.linspace(0, len(files) - 1, min(len(files), 64)).astype(int):
        with suppress(*UNREADABLE), files.open(i) as image:
            sizes.add(image.size)
    width, height = next(iter(sizes), (65, 65))
    if len(sizes) != 1 or max(width, height) > 64 or len(files) * 3 * width * height > most_bytes:
        return files
    pixels, good = torch.empty(len(files), 3, height, width, dtype=torch.uint8), []
    whole, numbers = View((height, width)), np.zeros((1, View.NUMBERS), np.float32)
    for i in tqdm(range(len(files)), desc="decoding small images", disable=not sys.stderr.isatty(), leave=False):
        try:
            picture = files.cut(i, whole, numbers)
            if picture.shape[1:] != whole.size:
                say(f"warning: {files.path(i)} is brought to {height} x {width} pixels like the rest")
            pixels[len(good)] = resize(picture, whole.size)
            good.append(i)
        except InputError as error:
            if strict:
                raise
            say(f"warning: left out: {error}")
    return Packed(pixels[:len(good)], None if files.labels is None else files.labels[good], files.classes)


def open_torchvision(args: Namespace, split: str, labels: bool) -> Images:
    """A data set of torchvision, in its official splits."""
    kind, train, val, *unlabelled = TORCHVISION[args.data]
    chosen = val if split == "val" else train if labels or not unlabelled else unlabelled[0]
    if args.download and dist.is_initialized():
        raise InputError("--download is for a single process: run the command once without torchrun, and with "
                         "--epochs 0")
    download = dict(download=True) if args.download else {}
    try:
        parts = [getattr(datasets, kind)(args.data_root, **options, **download) for options in chosen]
    except (RuntimeError, OSError) as error:
        raise InputError(f"--data {args.data}: not in --data-root {args.data_root} ({error}); "
                         "--download fetches it") from None
    classes = list(parts[0].classes)
    if hasattr(parts[0], "data"):  # CIFAR, STL10: already an array, N H W C or N C H W
        pixels = np.concatenate([part.data for part in parts])
        pixels = pixels if pixels.shape[1] == 3 else pixels.transpose(0, 3, 1, 2)
        known = np.concatenate([part.targets if hasattr(part, "targets") else part.labels for part in parts])
        return Packed(torch.from_numpy(np.ascontiguousarray(pixels)), known.astype(np.int64), classes)
    # Labels are known without decoding, but not under a public name.
    known = np.concatenate([part._labels if hasattr(part, "_labels") else [label for _, label in part._samples]
                            for part in parts])
    return Named(np.arange(len(known)), known.astype(np.int64), classes, ConcatDataset(parts))


def shapes(count: int, seed: int, side: int = 32) -> Packed:
    """Ten classes, {disc, triangle, square, star, cross} x {filled, outlined}, of random colour, place, angle and size
    on a colour ramp with 1 % noise. The same images for the same seed."""
    rng = np.random.default_rng([2205, seed])
    labels = rng.integers(10, size=count)
    pixels = np.empty((count, 3, side, side), np.uint8)
    y, x = (np.mgrid[:side, :side].astype(np.float32) + 0.5) / side * 2 - 1             # -1..1
    for first in range(0, count, 1000):                                                 # bounded memory
        label = labels[first:first + 1000]
        n = len(label)
        turn, radius = rng.uniform(0, 2 * np.pi, (n, 1, 1)), 2 * rng.uniform(0.30, 0.46, (n, 1, 1))
        x0, y0 = rng.uniform(-0.3, 0.3, (2, n, 1, 1))
        u = ((x - x0) * np.cos(turn) + (y - y0) * np.sin(turn)) / radius                # n side side, the shape's axes
        v = ((y - y0) * np.cos(turn) - (x - x0) * np.sin(turn)) / radius

        def sides(k):  # how far a point lies in the direction of each of k sides
            return np.stack([u * np.cos(2 * np.pi * i / k) + v * np.sin(2 * np.pi * i / k) for i in range(k)])
        kinds = np.stack([                                                              # 1 on the edge of every shape
            np.hypot(u, v),
            sides(3).max(0) / math.cos(math.pi / 3),
            sides(4).max(0) / math.cos(math.pi / 4),
            np.partition(sides(5), 3, axis=0)[3] / math.cos(2 * math.pi / 5),           # beyond one side of the five
            np.minimum(np.maximum(abs(u), 3 * abs(v)), np.maximum(3 * abs(u), abs(v))),
        ])
        distance = kinds[label % 5, np.arange(n)]
        inside = (distance < 1) & ((label < 5)[:, None, None] | (distance > 0.65))
        ramp, ends = rng.uniform(0, 2 * np.pi, (n, 1, 1)), rng.random((2, n, 3, 1, 1))
        colour = rng.random((n, 3, 1, 1))
        slope = ((x * np.cos(ramp) + y * np.sin(ramp)) / 2.83 + 0.5)[:, None]
        ground = ends[0] * 0.6 * (1 - slope) + ends[1] * 0.6 * slope
        picture = np.where(inside[:, None], 0.35 + 0.65 * colour, ground) + rng.normal(0, 0.01, (n, 3, side, side))
        pixels[first:first + 1000] = (picture * 255).clip(0, 255)
    names = [f"{how} {kind}" for how in ("filled", "outlined") for kind in "disc triangle square star cross".split()]
    return Packed(torch.from_numpy(pixels), labels, names)


# ---- from images to batches

@dataclass
class Decoder(Dataset):
    """What worker processes do: a request (numbers of images B, numbers of chance B NUMBERS) -> their views as bytes
    B C h w, the images that are in them, complaints. An image that cannot be read is replaced by the next one."""
    images: Images
    view: View

    def __getitem__(self, request: tuple[np.ndarray, np.ndarray]) -> tuple[Tensor, np.ndarray, list[str]]:
        views, index, complaints = [], [], []
        for wanted, numbers in zip(*request, strict=True):
            for i in (wanted + np.arange(50)) % len(self.images):
                try:
                    views.append(self.look(i, numbers[None]))
                    index.append(i)
                    break
                except InputError as error:  # told by the training process: from here it would be a traceback
                    complaints.append(str(error))
            else:
                return torch.empty(0), np.empty(0), [f"50 pictures in a row; {complaints[-1]}"]
        return torch.stack(views), np.array(index), complaints

    def look(self, i: int, numbers: np.ndarray) -> Tensor:
        picture = resize(self.images.cut(i, self.view, numbers), self.view.size)
        if self.view.flips(numbers)[0]:
            picture = picture.flip(2)
        if self.view.randaugment:
            image = Image.fromarray(picture.permute(1, 2, 0).numpy())
            image = randaugment(image, numbers[0, 23:], self.view.randaugment)
            picture = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        return picture


def views_of(images: Images, view: View, requests: Iterator, args: Namespace, world: World,
             strict: bool = False) -> Iterator[tuple[Tensor, np.ndarray]]:
    """For every request (float B C h w in 0..1 on the device, numbers of the images). Images in one array are cut
    on the device; files, and whatever needs RandAugment, come as bytes from worker processes. Raises InputError if
    images cannot be read: with `strict` (evaluation) any, else more than 1 %, but at least 50."""
    if isinstance(images, Packed):
        images.items = images.items.to("cpu" if view.randaugment else world.device)
        if not view.randaugment:
            yield from ((images.look(index, numbers, view), index) for index, numbers in requests)
            return
    loader = DataLoader(Decoder(images, view), sampler=requests, batch_size=None, num_workers=args.workers,
                        pin_memory=world.device.type == "cuda", worker_init_fn=leave_signals_alone)
    bad, seen = set(), 0
    try:
        for pixels, index, complaints in loader:
            if complaints and (strict or not len(pixels)):
                raise InputError(complaints[0])
            for complaint in set(complaints) - bad:
                say(f"warning: {complaint}")
            bad, seen = bad | set(complaints), seen + len(index)
            if len(bad) > max(50, 0.01 * seen):
                raise InputError(f"{len(bad)} of {seen} images cannot be read")
            yield pixels.to(world.device, non_blocking=True).float().div_(255), np.asarray(index)
    except (RuntimeError, ConnectionError) as error:
        if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
            raise
        raise InputError("a process that decodes images was ended by the system, as when memory or shared memory is "
                         "short: try fewer --workers") from None


def leave_signals_alone(worker: int) -> None:
    """In a worker: Ctrl-C and torchrun's SIGTERM reach the whole group, but what follows is the training process's
    decision. A second SIGTERM ends a worker: that is how it is ended if it does not end by itself."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))


def requests(count: int, view: View, args: Namespace, world: World, first: int, last: int) -> Iterator[tuple]:
    """What this process looks at from step `first` to `last`, part by part: (numbers of images, numbers of chance).
    Order and chance are drawn for the whole batch from (seed, epoch) and (seed, step), and cut to this process's rows:
    neither resuming nor the number of processes or workers changes them."""
    parts, batch, steps = parts_of_batch(args, world), args.batch_size, count // args.batch_size
    rows = world.rows(batch)
    for step in range(first, last):
        epoch, place = divmod(step, steps)
        if place == 0 or step == first:
            order = chance(args.seed, ORDER, epoch).permutation(count)
        index = np.tile(order[place * batch:(place + 1) * batch][rows], (view.count, 1))
        numbers = uniform((view.count, batch, View.NUMBERS), args.seed, CROPS, step)[:, rows]
        for i, n in zip(np.split(index, parts, axis=1), np.split(numbers, parts, axis=1), strict=True):
            yield i.reshape(-1), n.reshape(-1, View.NUMBERS)


class Batches:
    """Iterator over the parts of all batches from step `first` to `last`: (float B C h w in 0..1, numbers of the
    images). `waited` is the time in seconds that training has spent on waiting for them."""

    def __init__(self, images: Images, view: View, args: Namespace, world: World, first: int, last: int):
        if len(images) < args.batch_size:
            raise InputError(f"--data {args.data} has {len(images)} images, less than one batch of {args.batch_size}: "
                             f"give --batch-size {len(images)} or less")
        if dist.is_initialized():
            seen = [None] * world.size
            dist.all_gather_object(seen, (first, len(images)))
            if len(set(seen)) > 1:
                raise InputError("the processes see different checkpoints or images: --out and --data must be the "
                                 "same on all machines")
        self.first, self.last, self.steps_per_epoch = first, last, len(images) // args.batch_size
        self.waited = 0.0
        self.views = views_of(images, view, requests(len(images), view, args, world, first, last), args, world)

    def __iter__(self):
        return self

    def __next__(self) -> tuple[Tensor, np.ndarray]:
        start = time.perf_counter()
        item = next(self.views)
        self.waited += time.perf_counter() - start
        return item


def in_order(images: Images, view: View, args: Namespace, world: World,
             strict: bool = True) -> Iterator[tuple[Tensor, np.ndarray]]:
    """Every image once, divided among the processes without padding: in parts as `Batches` gives them.
    strict: an image that cannot be read is an InputError, not replaced by the next."""
    mine = np.arange(world.rank, len(images), world.size)
    requests = ((index, np.zeros((len(index), View.NUMBERS), np.float32))
                for index in (mine[i:i + args.micro_batch] for i in range(0, len(mine), args.micro_batch)))
    return views_of(images, view, requests, args, world, strict)


def normalizer(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> Callable[[Tensor], Tensor]:
    """Function (x - mean) / std of images B C h w, channel by channel."""
    mean, std = (torch.tensor(value, device=device).view(-1, 1, 1) for value in (mean, std))
    return lambda images: (images - mean) / std


# ---- checkpoints out

# What may differ between a run and its continuation: nothing that changes what is learned. Another --data means the
# same images elsewhere; their number is compared.
FREE_ON_RESUME = ("data", "data_root", "download", "out", "resume", "workers", "device", "micro_batch", "compile",
                  "save_minutes", "log_every")


def open_run(args: Namespace, method: str) -> tuple[Path, dict | None]:
    """The folder of this run, which becomes args.out, and the checkpoint to continue from or None.

    Raises InputError if --out holds a run already, or if what --resume names is not there, not readable, of another
    method, or was made with other settings. Nothing is written yet.
    """
    checkpoint = None if args.resume is None else find_checkpoint(args)
    if checkpoint is not None:
        if checkpoint.get("method") != method:
            raise InputError(f"--resume: the file is of {checkpoint.get('method', 'something else')}, not of {method}")
        old = checkpoint["args"]
        changed = [f"{name} {old.get(name)} -> {value}" for name, value in vars(args).items()
                   if name not in FREE_ON_RESUME and old.get(name) != value]
        if changed:
            raise InputError(f"--resume: settings differ from the run's: {', '.join(changed)}")
    elif args.out is None:  # runs/mae-demo, runs/mae-demo-2, ...
        args.out, number = f"runs/{method}-{args.recipe}", 2
        while Path(args.out, "args.json").exists():
            args.out, number = f"runs/{method}-{args.recipe}-{number}", number + 1
    elif args.resume is None and Path(args.out, "args.json").exists():
        raise InputError(f"--out {args.out} holds a run already: continue it by --resume, or choose another folder")
    return Path(args.out), checkpoint


def find_checkpoint(args: Namespace) -> dict | None:
    """What --resume names: last.pth, or prev.pth if that is unreadable. Sets args.out where it was not given.
    A bare --resume on a folder without checkpoints starts afresh, and says so."""
    if not args.resume and args.out is None:
        raise InputError("--resume needs --out, or the path of the run")
    path = Path(args.resume or args.out)
    folder, names = (path.parent, [path.name]) if path.is_file() else (path, ["last.pth", "prev.pth"])
    args.out = args.out or str(folder)
    files = [folder / name for name in names if (folder / name).exists()]
    for file in files:
        try:
            content = load_file(str(file))
            return content if isinstance(content, dict) else {}
        except InputError as error:
            say(f"warning: {error}")
    if files or args.resume:
        raise InputError(f"--resume: no {'readable checkpoint in' if files else 'checkpoint there:'} {path}")
    say(f"no checkpoint in {path}: a new run starts")
    return None


def write_file(content: dict, path: Path, previous: Path | None = None) -> None:
    """Writes aside, flushes, renames: a file under its name is whole. What was there before becomes `previous`.
    Raises InputError, and leaves everything as it was, if the disk is full or the folder is gone."""
    aside = path.with_name(path.name + ".new")
    try:
        with open(aside, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        if previous is not None and path.exists():
            os.replace(path, previous)
        os.replace(aside, path)
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
        aside.unlink(missing_ok=True)
        raise InputError(f"{path} cannot be written: {error}") from None


def save_checkpoint(out: Path, method: str, step: int, model: nn.Module, config: dict, optimizer: torch.optim.Optimizer,
                    scaler: torch.amp.GradScaler, args: Namespace) -> None:
    """last.pth, with all that continuing needs; the one before stays as prev.pth. Weights that are not finite are
    never saved: raises InputError."""
    state = model.state_dict()
    broken = [name for name, value in state.items() if value.is_floating_point() and not value.isfinite().all()]
    if broken:
        raise InputError(f"step {step}: {broken[0]} and {len(broken) - 1} more are not finite; nothing was saved")
    write_file(dict(method=method, model=state, config=config, optimizer=optimizer.state_dict(),
                    scaler=scaler.state_dict(), step=step, args=vars(args)), out / "last.pth", out / "prev.pth")


def load_checkpoint(checkpoint: dict, model: nn.Module, optimizer: torch.optim.Optimizer,
                    scaler: torch.amp.GradScaler) -> int:
    """Puts a checkpoint's state into place; returns the number of steps done."""
    model.load_state_dict(checkpoint["model"])
    for group in checkpoint["optimizer"]["param_groups"]:  # of this device, not of the file's
        group["fused"] = optimizer.param_groups[0].get("fused")
    optimizer.load_state_dict(checkpoint["optimizer"])
    scaler.load_state_dict(checkpoint["scaler"])
    return checkpoint["step"]


# ---- the log

class Log:
    """One bar, log.jsonl, and the two reasons to leave a run early: a signal, and a loss that is not finite.

    The values of a step are summed over the processes on the device, and read one step later, when they have arrived
    by themselves: no step waits for the device, and all processes leave after the same one.
    """

    def __init__(self, args: Namespace, out: Path, world: World, loader: Batches):
        self.args, self.world, self.loader = args, world, loader
        self.pending, self.signal, self.leave = None, 0, False
        self.sums, self.count, self.waited = {}, 0, 0.0
        self.saved = self.told = time.time()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.on_signal)
        self.path = out / "log.jsonl"
        if world.main:
            try:  # only now: a run that could not start leaves nothing behind
                out.mkdir(parents=True, exist_ok=True)
                (out / "args.json").write_text(json.dumps(vars(args), indent=1) + "\n")
                kept = []
                if loader.first and self.path.exists():  # drop what an interrupted run wrote after its last checkpoint
                    kept = [line for line in self.path.read_text().splitlines(True)
                            if line.endswith("}\n") and json.loads(line)["step"] <= loader.first]
                self.path.write_text("".join(kept))
            except OSError as error:
                raise InputError(f"--out {out} cannot be written: {error}") from None
        self.bar = tqdm(total=loader.last, initial=loader.first, unit="step", dynamic_ncols=True,
                        disable=not world.main or not sys.stderr.isatty())

    def on_signal(self, number: int, frame) -> None:
        self.signal = number

    def step(self, step: int, lr: float, **losses: Tensor) -> bool:
        """After the update that makes `step` done. True if the run is to be left. Ends the program with status 1 if
        the loss of the step before was not finite."""
        self.flush()
        flag = torch.full((), float(self.signal > 0), device=self.world.device)
        values = self.world.sum(torch.stack([*(loss.detach().float() for loss in losses.values()), flag]))
        event = None
        if values.is_cuda:
            values, event = values.to("cpu", non_blocking=True), torch.cuda.Event()
            event.record()
        self.pending = (step, lr, time.time(), list(losses), values, event)
        return self.leave

    def flush(self) -> None:
        """Reads the values that are still on their way; before anything is saved."""
        if self.pending is None:
            return
        (step, lr, now, names, values, event), self.pending = self.pending, None
        if event is not None:
            event.synchronize()
        *values, flag = (values / self.world.size).tolist()
        losses = dict(zip(names, values, strict=True))
        if not all(map(math.isfinite, values)):
            self.bar.close()
            if self.world.main:
                told = ", ".join(f"{name} {value}" for name, value in losses.items())
                say(f"step {step}: {told} at learning rate {lr:.3g}; what is saved is from before. A lower --blr or "
                    "--precision fp32 may help")
            sys.exit(1)
        self.leave = flag > 0
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.count += 1
        self.bar.update()
        if step % self.args.log_every == 0 or step == self.loader.last:
            self.tell(step, lr, now)

    def tell(self, step: int, lr: float, now: float) -> None:
        """Writes the means since the last record; `now` is when the step was done."""
        seconds = max(now - self.told, 1e-9)
        record = dict(step=step, epoch=round(step / self.loader.steps_per_epoch, 4),
                      **{name: value / self.count for name, value in self.sums.items()}, lr=lr,
                      images_per_s=round(self.count * self.args.batch_size / seconds, 1),
                      waiting=round((self.loader.waited - self.waited) / seconds, 3),
                      eta_s=round((self.loader.last - step) * seconds / self.count))
        if self.world.device.type == "cuda":
            record["memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        self.sums, self.count, self.told, self.waited = {}, 0, now, self.loader.waited
        self.write(record)
        shown = {name: f"{record[name]:.4g}" for name in record if name not in ("step", "epoch", "eta_s", "waiting")}
        self.bar.set_postfix(shown, refresh=False)
        if self.bar.disable and self.world.main:
            say(f"step {step}/{self.loader.last}  " + "".join(f"{name} {value}  " for name, value in shown.items())
                + f"eta {record['eta_s']} s")

    def write(self, record: dict) -> None:
        """One more line in log.jsonl, in strict JSON: what is not finite is null there."""
        if self.world.main:
            finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
            try:
                with open(self.path, "a") as file:
                    file.write(json.dumps(finite) + "\n")
            except OSError as error:  # a lost line is no reason to lose the training
                say(f"warning: {self.path}: {error}")

    def save_due(self) -> bool:
        """Whether the main process is to save now: the time between checkpoints is over, and the loss is finite. (If
        it is not, all processes will leave together in their next step.)"""
        if not self.world.main or time.time() - self.saved < 60 * self.args.save_minutes:
            return False
        *_, values, event = self.pending
        if event is not None:
            event.synchronize()
        if not values.isfinite().all():
            return False
        self.saved = time.time()
        return True

    def finish(self, save: Callable[[int], None], step: int) -> None:
        """The last checkpoint. Ends the program with status 128 + signal if a signal ended the run."""
        self.flush()
        if self.world.main:
            save(step)
        self.bar.close()
        self.loader.views.close()  # ends the worker processes
        if self.leave:
            if dist.is_initialized():
                dist.barrier()  # torchrun ends the rest soon after the first process is gone
            number = self.signal or signal.SIGTERM
            if self.world.main:
                say(f"stopped by {signal.Signals(number).name} and saved; --resume continues")
            sys.exit(128 + number)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # nothing can be lost from here on
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


# ---- labels: augmentation and evaluation

def randaugment(image: Image.Image, numbers: np.ndarray, magnitude: float) -> Image.Image:
    """timm's `rand-m<magnitude>-mstd0.5-inc1`: two operations of fifteen, each done with probability one half at a
    level N(magnitude, 0.5) in 0..10. Not torchvision's RandAugment, whose magnitude 9 is a third of this one's.

    numbers   8 in [0, 1): operation, whether, level, sign; twice
    """
    grey = (124, 116, 104)  # ImageNet's mean colour fills what an operation uncovers
    for which, whether, level, sign in numbers.reshape(2, 4).tolist():
        if whether >= 0.5:
            continue
        m = min(max(NormalDist(magnitude, 0.5).inv_cdf(min(max(level, 1e-6), 1 - 1e-6)), 0.0), 10.0)
        s = m if sign < 0.5 else -m
        w, h = image.size

        def affine(*matrix):
            return image.transform((w, h), Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC, fillcolor=grey)
        image = (
            lambda: ImageOps.autocontrast(image),
            lambda: ImageOps.equalize(image),
            lambda: ImageOps.invert(image),
            lambda: image.rotate(3 * s, Image.Resampling.BICUBIC, fillcolor=grey),
            lambda: image.point([i & (256 - 2 ** (4 + int(0.4 * m))) for i in range(256)] * 3),  # keep 4..0 bits
            lambda: ImageOps.solarize(image, 256 - int(25.6 * m)),
            lambda: image.point([i + int(11 * m) if i < 128 else i for i in range(256)] * 3),
            lambda: ImageEnhance.Color(image).enhance(1 + 0.09 * s),
            lambda: ImageEnhance.Contrast(image).enhance(1 + 0.09 * s),
            lambda: ImageEnhance.Brightness(image).enhance(1 + 0.09 * s),
            lambda: ImageEnhance.Sharpness(image).enhance(1 + 0.09 * s),
            lambda: affine(1, 0.03 * s, 0, 0, 1, 0),
            lambda: affine(1, 0, 0, 0.03 * s, 1, 0),
            lambda: affine(1, 0, 0.045 * s * w, 0, 1, 0),
            lambda: affine(1, 0, 0, 0, 1, 0.045 * s * h),
        )[int(which * 15)]()
    return image


def random_erasing(images: Tensor, probability: float) -> Tensor:
    """In each image B C h w, with this probability, a box of noise N(0, 1): area 2 % to 33 %, aspect 0.3 to 3.3, as in
    timm's mode `pixel`. Images are normalised already."""
    b, _, h, w = images.shape
    chosen, area, aspect, y, x = torch.rand(5, b, 1, 1, 1, device=images.device)
    area = h * w * (0.02 + (1 / 3 - 0.02) * area)
    aspect = (0.3 * (1 / 0.3 / 0.3) ** aspect).sqrt()
    tall, wide = (area.sqrt() * aspect).round().clamp(max=h - 1), (area.sqrt() / aspect).round().clamp(max=w - 1)
    top, left = (y * (h - tall + 1)).floor(), (x * (w - wide + 1)).floor()
    row, column = torch.arange(h, device=images.device).view(-1, 1), torch.arange(w, device=images.device)
    inside = (row >= top) & (row < top + tall) & (column >= left) & (column < left + wide) & (chosen < probability)
    return torch.where(inside, torch.randn_like(images), images)                        # B C h w


def mixing(mixup: float, cutmix: float, classes: int) -> v2.Transform | None:
    """MixUp and CutMix of a batch by these alphas, one of the two by chance if both are on; None if neither is."""
    kinds = [kind(alpha=alpha, num_classes=classes)
             for kind, alpha in ((v2.MixUp, mixup), (v2.CutMix, cutmix)) if alpha > 0]
    return v2.RandomChoice(kinds) if kinds else None


def balanced(images: Images, count: int, seed: int) -> Images:
    """`count` images drawn by chance, as many of each class as there can be. Raises InputError if there are fewer."""
    if count > len(images):
        raise InputError(f"--labels {count}: there are {len(images)} labelled images")
    order = chance(seed, LABELS, 0).permutation(len(images))
    by_class = [order[images.labels[order] == label] for label in range(len(images.classes))]
    in_turn = [i for one_of_each in zip_longest(*by_class) for i in one_of_each if i is not None]
    return images.subset(np.array(in_turn[:count]))


@torch.no_grad()
def evaluate(model: nn.Module, images: Images, view: View, normalize: Callable, args: Namespace,
             world: World) -> dict[str, float]:
    """Top-1 and top-5 accuracy in % and mean cross-entropy; each image counts once on any number of processes."""
    model.eval()
    if dist.is_initialized():  # BatchNorm's statistics are those of each process's share: judge the ones that are saved
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
    totals = torch.zeros(4, dtype=torch.float64, device=world.device)
    for pixels, index in in_order(images, view, args, world):
        labels = sent(images.labels[index], world.device)
        with autocast(args):
            logits = model(normalize(pixels))
        logits = logits.float()
        hits = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        totals += torch.stack([hits[:, 0].sum(), hits.sum(), F.cross_entropy(logits, labels, reduction="sum"),
                               torch.tensor(len(labels), device=world.device)])
    model.train()
    top1, top5, loss, count = world.sum(totals).tolist()
    return dict(top1=100 * top1 / count, top5=100 * top5 / count, val_loss=loss / count, val_images=int(count))


def print_result(result: dict[str, float], world: World) -> None:
    """The one line on stdout: what `evaluate` found."""
    if world.main:
        try:
            print("  ".join(f"{name} {value:.2f} %" if name.startswith("top") else f"{name} {value:.4g}"
                            for name, value in result.items()), flush=True)
        except BrokenPipeError:  # it went to a program that has ended, such as head
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

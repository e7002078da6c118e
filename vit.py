"""The Vision Transformer of all scripts, and below a ruler the training kit that they share.

Part 1 is the network: Dosovitskiy et al., arXiv 2010.11929, with the details of MAE (arXiv 2111.06377).

    x = [class token, W patch_1, ..., W patch_N] + positions
    x = x + Attention(LayerNorm(x));  x = x + MLP(LayerNorm(x))         `depth` times
    y = head(LayerNorm(x)[class token])   or   head(LayerNorm(mean of the patches of x))

Part 2 is what a training script needs around a method: processes, images, schedule, checkpoints, log.
It knows nothing of any method, and part 1 knows nothing of it: cut the file there and part 1 works alone.

Use    from vit import ViT, SIZES; model = ViT(**SIZES["tiny"], image_size=224, classes=1000)
       vit = ViT.from_file("encoder.pth"); features = vit.features(vit.normalize(images))       images B 3 h w in 0..1
Names of parameters are timm's, so files go both ways.
Letters in shape comments: B images, C channels, N patches, n kept patches, L tokens (1 + N, or 1 + n), D width,
       H heads, d = D / H, h and w height and width in pixels
"""
import math
import warnings
from argparse import Namespace

import torch
import torch.nn.functional as F
from torch import Tensor, distributed as dist, nn
from torchvision.ops import stochastic_depth

# -------------------------------------------------------------------- part 1: the Vision Transformer

# Tiny and small have 12 heads as in MAE-Lite (arXiv 2205.14443; small also in MoCo v3); DeiT has 3 and 6. The number of
# heads changes neither parameters nor cost, so it cannot be read from a file of weights and must be given.
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
    return nn.LayerNorm(width, eps=1e-6)  # not torch's 1e-5: MAE, MoCo v3, TinyMIM, G2SD and DeiT have 1e-6


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
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).unbind(2)               # B L H d, then B H L d
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.scaled_dot_product_attention(*self.split_heads(x))                        # B H L d
        return self.proj(x.transpose(1, 2).flatten(2))                                  # B L D


def relation(a: Tensor, b: Tensor) -> Tensor:
    """Raw scores a b^T / sqrt(d) of every head, before any softmax: B H L d twice -> B H L L, at least float32 (whose
    products a GPU may round to TF32).
    `relation(q, k)` is what fused attention never shows; the distillation methods compare it."""
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


class BatchNorm(nn.BatchNorm1d):
    """nn.BatchNorm1d over the rows of all processes, of which each has equally many, B D -> B D: one process and many
    normalise alike, on GPUs and CPUs. (nn.SyncBatchNorm is for GPUs alone, and makes the host wait for them.)"""

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and dist.is_initialized()):
            return super().forward(x)
        rows = len(x) * dist.get_world_size()
        with torch.autocast(x.device.type, enabled=False):
            y = x.to(torch.promote_types(x.dtype, torch.float32))
            mean = MeanOfAll.apply(y.mean(0))
            y = y - mean
            variance = MeanOfAll.apply(y.square().mean(0))
            with torch.no_grad():
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(variance * (rows / (rows - 1)), self.momentum)
                self.num_batches_tracked.add_(1)
            y = y * (variance + self.eps).rsqrt()
            return (y * self.weight + self.bias if self.affine else y).to(x.dtype)


class MeanOfAll(torch.autograd.Function):
    """The mean of a tensor over all processes. Backward is the same mean, as the gradients of each process's own loss
    are averaged, too."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        x = x / dist.get_world_size()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return MeanOfAll.forward(ctx, gradient)


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
    """Vision Transformer. `ViT(**vit.config)` is the same network again; all in it are plain types.

    image_size   pixels, one number or (height, width); each a multiple of patch_size
    last_heads   heads of the last block where they differ (TinyMIM); None: as the others
    positions    "sincos": fixed table (MAE); "learned": a trained one
    pool         "cls": class token after `norm`; "mean": `fc_norm` of the mean of the patches (MAE fine-tuning)
    classes      width of the linear head; 0: no head, `forward` gives features
    drop_path    rate of stochastic depth in the last block, growing linearly from 0; or one rate a block
    mean, std    of the pixels, channel by channel: what `normalize` takes away and divides by
    Raises InputError where sizes do not fit each other.
    """

    def __init__(self, image_size: int | tuple[int, int] = 224, patch_size: int = 16, channels: int = 3,
                 width: int = 192, depth: int = 12, heads: int = 12, last_heads: int | None = None,
                 mlp_ratio: float = 4.0, act: str = "gelu", qkv_bias: bool = True, positions: str = "sincos",
                 pool: str = "cls", classes: int = 0, drop_path: float | list[float] = 0.0,
                 mean: tuple[float, ...] = IMAGENET_MEAN, std: tuple[float, ...] = IMAGENET_STD):
        super().__init__()
        if positions not in ("sincos", "learned") or pool not in ("cls", "mean") or act not in ACTIVATIONS:
            raise InputError(f"positions {positions!r} (sincos, learned), pool {pool!r} (cls, mean) or act {act!r} "
                             f"({', '.join(ACTIVATIONS)}) is unknown")
        h, w = (image_size, image_size) if isinstance(image_size, int) else image_size
        if h % patch_size or w % patch_size or min(h, w) < patch_size:
            raise InputError(f"image size {h}x{w} is no multiple of the patch size {patch_size}: pixels would be lost")
        self.config = dict(image_size=[h, w], patch_size=patch_size, channels=channels, width=width,
                           depth=depth, heads=heads, last_heads=last_heads or heads, mlp_ratio=mlp_ratio, act=act,
                           qkv_bias=qkv_bias, positions=positions, pool=pool, classes=classes, mean=list(mean),
                           std=list(std))
        for name, values in (("mean", mean), ("std", std)):  # on the device of the weights, but in no file
            self.register_buffer(name, torch.tensor(values).view(-1, 1, 1), persistent=False)
        self.image_size, self.patch_size, self.channels = (h, w), patch_size, channels
        self.grid = (h // patch_size, w // patch_size)                                  # rows, columns
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

    @classmethod
    def from_file(cls, path: str, heads: int | None = None, **changes) -> "ViT":
        """The network of a file with its weights, in evaluation mode: an encoder, or with its head a classifier.

        heads     where the file does not say, as official ones
        changes   other values of the arguments, as image_size: positions are stretched
        Raises InputError as `read_encoder` and `load_encoder`."""
        state, config = read_encoder(path, heads, "heads=")
        if "dist_token" in state or "head.1.weight" in state:
            raise InputError(f"{path}: a student of G2SD or a linear probe: only the script that wrote it builds it")
        fresh = ("head.",) if "classes" in changes else ()
        state = {name: value for name, value in state.items() if not name.startswith(fresh)}
        vit = cls(**{**config, **changes})
        load_encoder(vit, state, config, fresh)
        return vit.eval()

    def normalize(self, images: Tensor) -> Tensor:
        """Pixels as the network expects them, channel by channel: images B C h w in 0..1 -> the same shape."""
        return torch.addcmul(-self.mean / self.std, images, 1 / self.std)  # one pass over the pixels

    def embed(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        """Tokens that enter the first block: images B C h w -> B 1+N D; of the patches that `keep` B n numbers for each
        image, in any order, B 1+n D."""
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
        return self.norm(self.through(self.embed(images, keep)))

    def through(self, x: Tensor, first: int = 1, last: int | None = None) -> Tensor:
        """Tokens B L D that enter block `first`, counted from 1 -> those that leave block `last`, or the last of all.
        With last = first - 1 they come back as they are."""
        for block in self.blocks[first - 1:last]:
            x = block(x)
        return x

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


def position_table(positions: str, width: int, grid: tuple[int, int]) -> Tensor:
    """Positions of a class token and rows x columns patches, 1 1+N D: fixed sin-cos, or N(0, 0.02) to be learned."""
    if positions == "learned":
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
    With layer_decay d, block i of a ViT learns at d^(depth - i), the embeddings at d^(depth + 1), the head at 1."""
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


# What files hold besides the encoder: decoders, projectors, distillation heads; in ours, where the last block has heads
# of its own, their number: a strict load by code that knows nothing of them fails by this name.
NOT_ENCODER = ("mask_token", "decoder", "encoderfeature_pred.", "head.", "dist_token", "head_dist.", "last_heads")
# Encoders in a file that are not the one to use: MoCo v3's momentum copy, the teacher in MAE-Lite's D-MAE files.
OTHER_ENCODERS = ("momentum_encoder.", "tch_model.")


def load_file(path: str) -> dict:
    """A file of `torch.save` of tensors and plain types. Raises InputError if it is none, or not finite."""
    try:
        with torch.serialization.safe_globals([Namespace]):  # official files carry their arguments as one
            file = torch.load(path, map_location="cpu", weights_only=True)
        broken = first_not_finite(file)
    except FileNotFoundError:
        raise InputError(f"{path or 'an empty path'}: no such file") from None
    except Exception as error:  # whatever a torn, foreign or malicious file can raise
        kind = "it holds objects that are not loaded" if "GLOBAL" in str(error) else "it is damaged, or of another kind"
        raise InputError(f"{path}: not a readable checkpoint: {kind} ({type(error).__name__})") from None
    if broken:
        raise InputError(f"{path}: {broken} is not finite")
    return file


def first_not_finite(content, name: str = "") -> str | None:
    """Name of a tensor, in nested dictionaries and lists, that has a number which is not finite."""
    if isinstance(content, (dict, list)):
        items = content.items() if isinstance(content, dict) else enumerate(content)
        return next(filter(None, (first_not_finite(value, f"{name}.{key}".strip(".")) for key, value in items)), None)
    return (name or "it") if isinstance(content, Tensor) and not content.isfinite().all() else None


def weights_of(file: dict) -> dict:
    """The state dict in a file, wherever the field puts it."""
    return next((file[key] for key in ("model", "state_dict") if isinstance(file, dict) and key in file), file)


def read_encoder(path: str, heads: int | None = None, flag: str = "--heads",
                 other_heads: bool = False) -> tuple[dict, dict]:
    """(state dict in the names of ViT, config) of the one encoder in a file: ours, MAE, MAE-Lite, DeiT, MoCo v3,
    TinyMIM, G2SD or timm. Prefixes such as `module.`, `encoder.` or `base_encoder.` are taken off.

    heads         for files without a config of ours, as weights do not show it; messages call it by the option `flag`
    other_heads   whether `heads` may be others than a config says; the config is as the file has it
    Raises InputError if there is no encoder, more than one, one of another architecture, or if `heads` contradicts the
    file or is missing. Warns where the heads are those that networks of this width usually have."""
    file = load_file(path)
    state = weights_of(file)
    names = [name for name in state if isinstance(name, str)] if isinstance(state, dict) else []
    prefixes = [name.removesuffix("cls_token") for name in names if name.endswith("cls_token")]
    prefixes = [prefix for prefix in prefixes if not any(word in prefix for word in OTHER_ENCODERS)]
    if len(prefixes) != 1:
        raise InputError(f"{path}: expected one `cls_token`, as of a ViT, found {len(prefixes)}; names: {names[:3]}")
    state = {name.removeprefix(prefixes[0]): state[name] for name in names if name.startswith(prefixes[0])}
    if wrong := [name for name, value in state.items() if not isinstance(value, Tensor)]:
        raise InputError(f"{path}: {wrong[0]} is no tensor")
    config = file.get("config")
    if config is None:
        return state, guess_config(state, heads, path, flag)
    check_config(config, state, path)
    if heads not in (None, config["heads"]) and not other_heads:
        raise InputError(f"{flag} {heads}: {path} was trained with {config['heads']} heads")
    return state, dict(config)


def check_config(config: dict, state: dict, path: str) -> None:
    """Raises InputError unless this is the config of a network with these weights: nothing larger is ever built."""
    try:
        if config["depth"] != sum(name.endswith(".mlp.fc1.weight") for name in state if name.startswith("blocks.")):
            raise InputError(f"{config['depth']} blocks")
        with torch.device("meta"):  # shapes without memory
            vit = ViT(**config)
        own = vit.state_dict()
        odd = [f"{name} {tuple(x.shape)}" for name, x in state.items() if name in own and x.shape != own[name].shape]
        kinds = {"qkv_bias": (bool,), "mlp_ratio": (int, float)}
        odd += [name for name, value in vit.config.items()
                if value != config[name] or type(value) not in kinds.get(name, (int, str, list))]
        probe = state.get("head.1.weight", ()) if config["classes"] else ()  # else it is of MoCo v3's projector
        right = (config["classes"] == len(state.get("head.weight", probe)), min(config["std"]) > 0,
                 min(config["heads"], config["last_heads"]) > 0,
                 len(config["mean"]) == len(config["std"]) == config["channels"])
        if odd or not all(right):
            raise InputError(", ".join(odd[:5]) or "classes, heads, mean or std")
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        told = (str(error) or type(error).__name__).splitlines()[0][:120]
        raise InputError(f"{path}: its config does not fit its weights, or is of a newer version: {told}") from None


def guess_config(state: dict, heads: int | None, path: str, flag: str) -> dict:
    """The config of an encoder of which only the weights are known, its image taken to be square. Raises InputError, by
    name, for relatives of ViT that are none."""
    if relative := [name for name in state if "relative_position" in name]:
        raise InputError(f"{path}: a network with relative positions ({relative[0]}), which are not known here")
    try:
        width, channels, patch_size = state["patch_embed.proj.weight"].shape[:3]
        rows, ratio = state["pos_embed"].shape[1], len(state["blocks.0.mlp.fc1.weight"]) / width
        side, last_heads = math.isqrt(rows - 1), int(state.get("last_heads", 0))
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"{path}: not the weights of a plain Vision Transformer ({error})") from None
    if side ** 2 != rows - 1 or rows == 1:
        raise InputError(f"{path}: a distilled DeiT or an oblong image: {rows} positions are not 1 + a square")
    if heads is None:
        heads = {768: 12, 1024: 16, 1280: 16}.get(width)
        if heads is None:
            raise InputError(f"{path} does not say how many heads its {width}-wide network has; give {flag} (192 wide: "
                             "12 in MAE-Lite, 6 in TinyMIM, 3 in G2SD and DeiT; 384: 12 in MAE-Lite's MAE and MoCo v3, "
                             "6 in the others)")
        warnings.warn(f"{path} does not say how many heads its network has: {heads} are taken, as networks {width} "
                      f"wide usually have; {flag} changes it", stacklevel=3)
    return dict(image_size=[side * patch_size] * 2, patch_size=patch_size, channels=channels, width=width,
                depth=sum(name.startswith("blocks.") and name.endswith(".mlp.fc1.weight") for name in state),
                heads=heads, last_heads=last_heads or heads,
                mlp_ratio=ratio, act="gelu", qkv_bias="blocks.0.attn.qkv.bias" in state, positions="sincos",
                pool="mean" if "fc_norm.weight" in state else "cls", mean=list(IMAGENET_MEAN), std=list(IMAGENET_STD),
                classes=next((len(state[name]) for name in ("head.weight", "head.1.weight") if name in state), 0))


def load_encoder(vit: ViT, state: dict, config: dict, fresh: tuple[str, ...] = ("head.",)) -> list[str]:
    """Loads what `read_encoder` gave; positions are stretched to the grid of `vit`. Returns the names that keep
    their initial values: those that begin with an entry of `fresh` and are not in the file, and a mean-pooling
    network's `fc_norm` if the file has none (MAE leaves the pre-trained `norm` unused there).
    Raises InputError, naming every key, if anything else is missing, is unknown, or has another shape."""
    if config["patch_size"] != vit.patch_size:
        raise InputError(f"the file has patches of {config['patch_size']} pixels, the network of {vit.patch_size}")
    state, own = dict(state), vit.state_dict()
    if "pos_embed" in state:
        grid = tuple(side // config["patch_size"] for side in config["image_size"])
        state["pos_embed"] = resize_positions(state["pos_embed"], grid, vit.grid)
    if vit.pool == "mean" and "fc_norm.weight" not in state:
        fresh = (*fresh, "fc_norm.")
    # Not ours to run: the norm of the other pooling, and the queries and keys that D2-MAE forms after the last block.
    unused = ("norm." if vit.pool == "mean" else "fc_norm.",
              f"blocks.{vit.depth}.norm1.", f"blocks.{vit.depth}.attn.qkv.")
    kept = [name for name in own if name not in state]
    missing = [name for name in kept if not name.startswith(fresh)]
    unknown = [name for name in state if name not in own and not name.startswith(NOT_ENCODER + unused)]
    shapes = [f"{name} {tuple(state[name].shape)} for {tuple(own[name].shape)}" for name in own
              if name in state and state[name].shape != own[name].shape]
    for what, names in (("missing", missing), ("unknown", unknown), ("of another shape", shapes)):
        if names:
            raise InputError(f"the weights do not fit the network; {what}: {', '.join(names)}")
    vit.load_state_dict({name: state.get(name, own[name]) for name in own})
    return kept


# -------------------------------------------------------------------- part 2: the training kit
# The way of an image: open_images -> Images.open -> a transform of torchvision -> Views (in a worker process, as bytes)
# -> Batches (on the device, as floats) -> the loop. All that is random about it follows from (seed, epoch, image), the
# order from (seed, epoch): neither interruptions nor the number of processes and workers change what is learned.
import argparse
import fcntl
import hashlib
import io
import json
import mmap
import multiprocessing
import os
import platform
import secrets
import select
import shlex
import signal
import sys
import time
import traceback
import weakref
import zipfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cache, partial
from itertools import tee, zip_longest
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageOps
from torch.distributed.elastic.multiprocessing.errors import record
from torch.utils.data import DataLoader, Dataset
from torchvision import datasets
from torchvision.transforms import v2
from tqdm import tqdm

# ---- options

def within(low: float, high: float = math.inf, kind: type = float) -> Callable[[str], float]:
    """A `type` for argparse: finite numbers from `low` to `high`."""
    def number(text: str) -> float:
        value = kind(text)
        if not low <= value <= high or value == math.inf:
            limits = f"at least {low:g}" if high == math.inf else f"{low:g} to {high:g}"
            raise argparse.ArgumentTypeError(f"{text}: expected a {number.__name__}, {limits}")
        return value
    number.__name__ = "whole number" if kind is int else "number"  # argparse tells "invalid number value"
    return number


share, amount, count = within(0, 1), within(0), within(1, 10**9, int)


class Help(argparse.RawDescriptionHelpFormatter):
    """The docstring of a script as it stands, and behind each option its value in the recipe."""

    def _get_help_string(self, action: argparse.Action) -> str:
        value = " ".join(map(str, action.default)) if isinstance(action.default, (list, tuple)) else action.default
        return action.help if value in (None, argparse.SUPPRESS) else f"{action.help} [{value}]"


def common_options(about: str, recipes: dict[str, dict]) -> argparse.ArgumentParser:
    """A parser with the options that all scripts share."""
    parser = argparse.ArgumentParser(usage="%(prog)s [--option value] ...   (--help explains all)", description=about,
                                     formatter_class=Help, allow_abbrev=False)
    add = parser.add_argument_group("data and run").add_argument
    add("--data", default="shapes", help="folder of images (train/<class>/, val/<class>/; any tree where no labels are "
        f"needed), a name of torchvision ({', '.join(TORCHVISION)}), or shapes: generated")
    add("--data-root", default="data", help="where torchvision keeps its data sets")
    add("--download", action="store_true", help="let torchvision download the data set")
    add("--val-share", type=share, default=0.0, help="for a folder without val/: this share of each class is for "
        "evaluation, by the names of the files; give it to every command")
    add("--recipe", choices=recipes, help="defaults; else demo for shapes, cifar for CIFAR, imagenet for the rest")
    add("--out", help="folder for checkpoints and log; else runs/<script>-<recipe>")
    add("--resume", nargs="?", const=True, metavar="PATH", help="continue the run in --out, or in a folder or file")
    add("--crop-min", type=share, help="smallest share of an image's area in a random crop")
    add("--seed", type=within(0, 2**32 - 1, int), default=0, help="of all chance in the run")
    add("--workers", type=within(0, kind=int), help="processes that decode images; else by the cores")
    add("--device", default="auto", choices=["auto", "cuda", "cpu"], help="auto: cuda if there is one")
    add("--precision", default="auto", choices=["auto", "bf16", "fp16", "fp32"], help="auto: fp32 on CPUs")
    add("--compile", action="store_true", help="compile the model: a minute's wait, then faster steps")
    add("--save-minutes", type=amount, default=10, help="minutes between checkpoints")
    add("--log-every", type=count, default=50, help="steps between records in log.jsonl")
    add = parser.add_argument_group("model").add_argument
    add("--init", help="weights to start from, with their network: encoder.pth of any script, or an official file")
    add("--model", choices=SIZES, help="size of the network")
    add("--width", type=count, help="channels of a token, instead of the size's")
    add("--depth", type=within(1, 1000, int), help="blocks, instead of the size's")
    add("--heads", type=count, help="attention heads, instead of the size's")
    add("--mlp-ratio", type=within(1e-6, 1e6), help="hidden width of the MLPs / width, instead of the size's")
    add("--image-size", type=count, nargs="+", metavar="PIXELS", help="of the input: one number, or height and width")
    add("--patch-size", type=count, help="side of a patch in pixels")
    add("--act", choices=ACTIVATIONS, help="activation in the MLPs")
    add("--qkv-bias", action=argparse.BooleanOptionalAction, help="biases in front of queries, keys and values")
    add("--positions", choices=["sincos", "learned"], help="of the tokens: a fixed table, or learned")
    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=within(0, 1e6), help="passes over the images")
    add("--warmup-epochs", type=amount, help="epochs over which the learning rate rises from 0")
    add("--batch-size", type=count, help="images per update, on all processes together")
    add("--micro-batch", type=count, help="most images that one process holds at once, a larger share is accumulated; "
        "else by the size of the network")
    add("--blr", type=amount, help="base learning rate: learning rate = blr x batch size / 256")
    add("--min-lr", type=amount, help="learning rate at the end of the cosine")
    add("--weight-decay", type=amount, help="weight decay")
    return parser


def default_recipe(given: Namespace) -> str:
    return given.recipe or {"shapes": "demo", "cifar10": "cifar", "cifar100": "cifar"}.get(given.data, "imagenet")


def on_command_line(parser: argparse.ArgumentParser, argv: list[str] | None) -> Namespace:
    """What is given there alone, without a recipe. Unknown and abbreviated flags end the program with status 2."""
    argv = sys.argv[1:] if argv is None else argv
    given = parser.parse_args([word for word in argv if word not in ("-h", "--help")])
    for path in (given.init, getattr(given, "teacher", None)):
        if path and os.path.exists(path) and not os.path.isfile(path):  # to open a pipe would wait
            raise InputError(f"{path}: no such file, but a folder or a pipe")
    return given


def parse(parser: argparse.ArgumentParser, argv: list[str] | None, recipes: dict[str, dict],
          choose: Callable[[Namespace], str] = default_recipe) -> Namespace:
    """The command line; what is not on it has its value in the recipe, which `choose` names by what is on it."""
    given = on_command_line(parser, argv)
    recipe = choose(given)
    parser.set_defaults(**recipes[recipe])
    if given.init is not None:
        take_over(parser, given, read_encoder(given.init, given.heads)[1])
    return complete(parser, argv, recipe)


# What a file of weights fixes; and what its network was trained to see, which may change.
NETWORK = ("width", "depth", "heads", "mlp_ratio", "patch_size", "act", "qkv_bias", "positions")
INPUT = ("image_size", "mean", "std")


def take_over(parser: argparse.ArgumentParser, given: Namespace, config: dict) -> None:
    """Makes the network of --init, and what it saw in training, the defaults. Raises InputError if a flag differs."""
    if given.model is not None and SIZES[given.model]["width"] != config["width"]:
        raise InputError(f"--model {given.model}: the network in --init is {config['width']} wide")
    for name in NETWORK:
        if getattr(given, name) not in (None, config[name]):
            flag = name.replace("_", "-")
            raise InputError(f"--{flag} {getattr(given, name)}: the network in --init has {config[name]}")
    parser.set_defaults(**{name: config[name] for name in NETWORK + INPUT})
    parser.set_defaults(**{"model": name for name, size in SIZES.items() if size["width"] == config["width"]})


# Images of 224 pixels at a time that keep a GPU busy, and by what was counted fit into 80 GB (RESULTS.md).
MICRO_BATCH = {"demo": 1024, "tiny": 1024, "small": 512, "base": 256, "large": 128, "huge": 64}


def complete(parser: argparse.ArgumentParser, argv: list[str] | None, recipe: str) -> Namespace:
    """The command line with the parser's defaults, which are those of this recipe."""
    args = parser.parse_args(argv)
    sides = np.ravel(args.image_size).tolist()  # of a number, a list or None
    if len(sides) > 2:
        parser.error(f"--image-size {' '.join(map(str, sides))}: expected one number, or height and width")
    if empty := [name for name, value in vars(args).items() if value == ""]:
        parser.error(f"--{empty[0].replace('_', '-')} is empty")
    args.recipe, args.image_size = recipe, [sides[0], sides[-1]]
    args.micro_batch = args.micro_batch or MICRO_BATCH.get(args.model, 1024)
    return args


def vit_options(args: Namespace) -> dict:
    """Arguments of ViT: those of --model, but for the flags and the recipe that change a part of it."""
    changes = {name: getattr(args, name) for name in NETWORK + INPUT if getattr(args, name) is not None}
    return {**SIZES[args.model], **changes}


def load_init(encoder: ViT, args: Namespace) -> ViT:
    """The encoder itself, with the weights of --init where it is given."""
    if args.init is not None:
        state, config = read_encoder(args.init, args.heads)
        load_encoder(encoder, state, config, fresh=("norm.",))  # a classifier that pools patches has none
    return encoder


def say_next(args: Namespace, encoder: str) -> None:
    """The command that comes after pre-training, quoted for a shell; what else to do where there are no labels."""
    words = ["python", "finetune.py", "--init", encoder, "--data", args.data]
    usual = dict(data_root="data", val_share=0.0, recipe=default_recipe(Namespace(recipe=None, data=args.data)))
    for name, value in usual.items():
        words += [f"--{name.replace('_', '-')}", str(getattr(args, name))] * (getattr(args, name) != value)
    with suppress(InputError):  # the folder may have gone since
        if has_evaluation(args):
            return say(f"next:  {shlex.join(words)}")
    say(f"next:  ViT.from_file({encoder!r}).features(images), as in README.md; or finetune.py, with labelled images")


# ---- processes

@dataclass(frozen=True)
class World:
    """This process among all: its number, how many there are, its device, and the precision of matrix products."""
    rank: int
    size: int
    device: torch.device
    precision: str

    def sum(self, values: Tensor) -> Tensor:
        """In place, the sum over all processes."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def say(self, text: str) -> None:
        """From the first process only."""
        if self.rank == 0:
            say(text)

    def send(self, values: Tensor) -> Tensor:
        """To the device. To a GPU by way of pinned memory: else the copy would wait until it has done all its work."""
        values = values.pin_memory() if self.device.type == "cuda" else values  # as it is, where it is pinned already
        return values.to(self.device, non_blocking=True)

    def autocast(self) -> torch.autocast:
        """Context of a forward pass: matrix products in the chosen precision."""
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.precision)
        return torch.autocast(self.device.type, dtype, enabled=dtype is not None)

    def wrap(self, model: nn.Module, compiled: bool) -> nn.Module:
        """What to call in training. Parameters and checkpoints are those of `model` itself."""
        model = torch.compile(model) if compiled else model
        if self.size == 1:
            return model
        # Buffers are equal everywhere, see BatchNorm; gradients stay in the buckets in which they are sent.
        return nn.parallel.DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)

    def share_gradients(self, wrapped: nn.Module, now: bool):
        """Context of forward and backward pass: processes average their gradients only in the last part of a batch."""
        return wrapped.no_sync() if self.size > 1 and not now else nullcontext()


MEETING = 120  # seconds in which the processes have to find one another


def start(args: Namespace) -> World:
    """Joins the processes that torchrun started, or is alone; settles args.device, args.precision and args.workers.
    Raises InputError for a device that is not there or an environment that torchrun did not make."""
    names = ("MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK", "WORLD_SIZE")
    given = ", ".join(f"{name}={os.environ[name]}" for name in (*names, "LOCAL_WORLD_SIZE") if name in os.environ)
    numbers = [os.environ.get(name, "") for name in names[1:]] + [os.environ.get("LOCAL_WORLD_SIZE", "1")]
    if given and not (os.environ.get("MASTER_ADDR") and all(map(str.isdecimal, numbers))):
        raise InputError(f"{given} in the environment: expected {', '.join(names)}, whole numbers but for the first: "
                         "start several processes by torchrun, or unset these for a single one")
    device, best = torch.device("cpu"), "fp32"
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.device == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if device.index >= torch.cuda.device_count():
            raise InputError(f"--device cuda: process {device.index} of this machine finds {torch.cuda.device_count()} "
                             "GPUs. Start no more processes than there are; without one choose --device cpu")
        torch.cuda.set_device(device)
        best = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    elif args.precision == "fp16":
        raise InputError("--precision fp16 needs a GPU; on a CPU use fp32 or bf16")
    args.precision = best if args.precision == "auto" else args.precision
    # Where speed was chosen, products outside of autocast are TF32. --precision fp32 means float32.
    torch.set_float32_matmul_precision("highest" if args.precision == "fp32" else "high")
    torch.backends.cudnn.allow_tf32 = args.precision != "fp32"
    if args.workers is None:
        cores = len(os.sched_getaffinity(0))
        cores = cores if args.device == "cuda" else cores // 4  # the others have to train
        args.workers = cores // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    if not given:
        return World(0, 1, device, args.precision)
    backend, bound_to = ("nccl", device) if args.device == "cuda" else ("gloo", None)
    try:  # later, one may be busy while the others wait
        store, rank, size = next(dist.rendezvous("env://", timeout=timedelta(seconds=MEETING)))
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timedelta(minutes=20),
                                device_id=bound_to)
    except (ValueError, RuntimeError) as error:
        raise InputError(f"the processes do not find one another ({given}): {str(error).splitlines()[0]}") from None
    return World(rank, size, device, args.precision)


def say(text: str) -> None:
    """To stderr, above a progress bar."""
    tqdm.write(text, file=sys.stderr)


class Enduring(io.FileIO):
    """An open file to which writing never fails: nobody who stops reading, and no full disk, may end a training. What
    was lost is noted."""
    lost = ""
    wait: float | None = None  # seconds for a full pipe to be read; None: as long as it takes

    def write(self, data: bytes) -> int:
        if self.wait is not None:  # 0: nobody reads, and until somebody does, what comes is dropped
            self.wait = 5.0 if select.select([], [self], [], self.wait)[1] else 0.0
        try:
            return len(data) if self.wait == 0 else super().write(data) or len(data)
        except OSError as error:
            self.lost = str(error)
            return len(data)


def launch(main: Callable[[], None]) -> None:
    """Runs a script. An error that its user can fix is one line on stderr and status 2; no worker process is left."""
    while (number := os.open(os.devnull, os.O_RDWR)) < 3:  # no file of ours takes the place of a stream that was closed
        pass
    os.close(number)
    results, messages = (Enduring(number, "w", closefd=False) for number in (1, 2))
    messages.wait = 5.0
    sys.stdout, sys.stderr = (
        io.TextIOWrapper(io.BufferedWriter(file), errors=how, line_buffering=True)
        for file, how in ((results, "surrogateescape"), (messages, "backslashreplace")))  # names of files as they are
    for number in heeded((signal.SIGTERM, signal.SIGHUP)):
        signal.signal(number, leave)
    try:
        status = run_main(main)
        end_processes(multiprocessing.active_children())
        if results.lost:
            say(f"{Path(sys.argv[0]).name}: results were lost on their way to stdout: {results.lost}")
            status = status or 1
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    if status:  # leave at once: other processes may be inside a collective, from which only torchrun can end them
        os._exit(status)
    if dist.is_initialized():
        dist.destroy_process_group()


def leave(number: int, frame) -> None:
    """What a signal does where no training has to be saved: the first one ends the program, more change nothing."""
    for each in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, lambda *values: os._exit(128 + number))  # where the error below does not get through
    signal.alarm(9)
    raise SystemExit(128 + number)


def run_main(main: Callable[[], None]) -> int:
    """The status of the program: 0, 2 after an error that its user can fix, 1 after any other, or as `main` says."""
    try:
        record(main)()  # an error stands in torchrun's report, too
        return 0
    except SystemExit as end:
        return end.code or 0
    except Exception as error:
        told = str(error)
        if isinstance(error, MemoryError) or "out of memory" in told or "t allocate memory" in told:
            told = f"out of memory: try a smaller --micro-batch or --model ({told.strip().splitlines()[0][:120]})"
        elif not isinstance(error, InputError):
            traceback.print_exc()
            return 1
        if os.environ.get("RANK", "0") != "0":
            time.sleep(3)  # an error of all processes is reported by the first; torchrun ends the others
        say(f"{Path(sys.argv[0]).name}: {told}")
        return 2


def end_processes(processes: list[multiprocessing.Process]) -> None:
    """Kills worker processes and waits until they are gone."""
    for process in processes:
        process.kill()
    for process in processes:
        process.join(5)


SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # from a user, a scheduler, a terminal that was closed


def heeded(numbers: tuple[int, ...]) -> list[int]:
    """Those that the program was not started to ignore, as SIGHUP by nohup."""
    return [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]


# ---- chance and images

# All that is random follows from a place alone, as (ORDER, seed, epoch). What it is for stands first, as numpy pads
# seeds with zeros: (0, 3) would be (0, 3, 0).
IMAGE, ORDER, STEP, LABELS, SHAPES = range(1, 6)


def torch_seed(*place: int) -> int:
    """Seed for torch at a place, as (IMAGE, seed, epoch, image) or (STEP, seed, step, process, part)."""
    return int(np.random.SeedSequence(place).generate_state(1, np.uint64)[0])


SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff")
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "PPM", "TIFF")  # what such a file may be, whatever its name says
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


@dataclass
class Images:
    """M images: their pixels, uint8 M h w 3, or the names of their files below `root` in one array of bytes, which
    worker processes share; labels M int64 and the names of their classes, or None for these. With `places` M 3, `root`
    is a file of pack.py, in which image i begins at byte places[i, 0] and has places[i, 1] x places[i, 2] pixels."""
    items: np.ndarray
    labels: np.ndarray | None = None
    classes: list[str] | None = None
    root: str = ""
    places: np.ndarray | None = None
    enough: int = 0  # pixels of the shorter side that views need: a larger JPEG is decoded at 1/2, 1/4, 1/8; 0: never

    def __len__(self) -> int:
        return len(self.items)

    def subset(self, index: np.ndarray) -> "Images":
        labels, places = (None if x is None else x[index] for x in (self.labels, self.places))
        return replace(self, items=self.items[index], labels=labels, places=places)

    def content(self) -> str:
        """How many they are, and by what they are known again: names, labels and classes; in memory shape, labels and
        every hundredth image."""
        digest = hashlib.sha1(repr((self.items.shape, self.classes)).encode())
        for values in (self.items if self.items.ndim == 1 else self.items[::100], self.labels, self.places):
            digest.update(b"" if values is None else np.ascontiguousarray(values))
        return f"{len(self)} images {digest.hexdigest()[:12]}"

    def open(self, i: int) -> Tensor:
        """Image i, uint8 3 h w; in memory the colours of a pixel stay together, so torch resizes it twice as fast.
        Raises InputError, with its path, if it cannot be read."""
        if self.items.ndim > 1:
            return torch.from_numpy(self.items[i]).permute(2, 0, 1)
        path = self.root if self.places is not None else os.path.join(self.root, os.fsdecode(bytes(self.items[i])))
        try:
            if self.places is not None:
                (start, h, w), file = self.places[i].tolist(), mapped(path)
                before = start % mmap.PAGESIZE  # all that is needed is asked of the disk at once
                file.madvise(mmap.MADV_WILLNEED, start - before, before + 3 * h * w)
                pixels = torch.frombuffer(file, dtype=torch.uint8, count=3 * h * w, offset=start)
                return pixels.view(h, w, 3).permute(2, 0, 1)
            with Image.open(path, formats=FORMATS) as image:
                if self.enough:
                    image.draft("RGB", (self.enough, self.enough))
                ImageOps.exif_transpose(image, in_place=True)
                return v2.functional.pil_to_tensor(to_rgb(image))
        except Exception as error:  # decoders raise errors of every kind
            raise InputError(f"{path}: cannot be read ({error or type(error).__name__})") from None


@cache
def mapped(path: str) -> mmap.mmap:
    """The bytes of a file, mapped once in a process. To be read only: of a mapping that could be written to, the system
    wants to have all memory."""
    warnings.filterwarnings("ignore", "The given buffer is not writable")  # nothing changes an image in place
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any image as RGB: what is transparent becomes white; 16-bit and float grey is scaled to 0..255, as Pillow would
    clip it to white."""
    if image.mode.startswith("I") or image.mode == "F":
        grey = np.asarray(image, np.float32)
        top = 65535 if image.mode != "F" or grey.max() > 255 else 1 if grey.max() <= 1 else 255
        image = Image.fromarray((grey / top * 255).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")  # convert() would copy it


def open_images(args: Namespace, split: str = "train", labels: bool = False) -> Images:
    """The images that --data names. labels: whether classes are needed. Raises InputError if there are none."""
    if args.data == "shapes":
        return shapes(20000, seed=0) if split == "train" else shapes(2000, seed=1)
    known = args.data in TORCHVISION
    if known and args.val_share:
        raise InputError(f"--val-share is for folders: {args.data} has images for evaluation")
    images = open_torchvision(args, split, labels) if known else open_folder(args.data, split, labels, args.val_share)
    # A crop of 1/16 of the area, about the smallest of all recipes, still has the pixels of the input.
    return replace(images, enough=4 * int(np.max(args.image_size)))


def has_evaluation(args: Namespace) -> bool:
    """Whether some of the images that --data names are for evaluation."""
    known = args.data == "shapes" or args.data in TORCHVISION
    return known or args.val_share > 0 or "val" in folder_at(args.data).folders()


def open_folder(data: str, split: str, labels: bool, val_share: float = 0.0) -> Images:
    """Images below data/split, in sorted order; for unlabelled training, or with val_share, anywhere below data if it
    has no train/. Classes are the folders of train/, whatever the split; hidden files and folders are passed over."""
    folder, held_back = folder_at(data), val_share > 0
    if held_back and "val" in folder.folders():
        raise InputError(f"--val-share: {data} has val/, images for evaluation, already")
    train = "train" if labels and not held_back or "train" in folder.folders() else ""
    inside = train if held_back or split == "train" else split
    images, classes, ids, root = folder.images(inside), None, None, Path(data, inside)
    names = [os.fsdecode(name) for name in images.items.tolist()]
    chosen = for_evaluation(names, val_share) if held_back else ()
    kept = [i for i, name in enumerate(names)
            if ("/" in name or not labels) and (not held_back or (name in chosen) == (split == "val"))]
    if labels:
        folders, classes = [names[i].split("/")[0] for i in kept], folder.folders(train)
        if unknown := sorted(set(folders) - set(classes)):
            raise InputError(f"--data {data}: classes {', '.join(unknown[:5])} are in {split}/ but not in train/")
        for empty in sorted(set(classes) - set(folders)):
            say(f"warning: class {empty} has no images in {root}")
        number = {name: i for i, name in enumerate(classes)}
        ids = np.array([number[name] for name in folders], np.int64)
    if not kept:
        raise InputError(f"--data {data}: no images in {root}{'/<class>' * labels} (looked for {' '.join(SUFFIXES)})")
    if labels and len(classes) < 2:
        raise InputError(f"--data {data}: two classes or more are needed; {data}/{train} has the folders "
                         f"{', '.join(classes)}")
    return replace(images.subset(np.array(kept)), labels=ids, classes=classes)


def folder_at(data: str) -> "Folder":
    return PackedFolder(data) if os.path.isfile(data) else Folder(data)


@dataclass
class Folder:
    """A folder of images. `inside` is a folder in it, as "train"; without, it is all of it."""
    path: str

    def folders(self, inside: str = "") -> list[str]:
        found = next(os.walk(Path(self.path, inside), onerror=refuse_folder))[1]
        return sorted(name for name in found if name[0] != ".")

    def images(self, inside: str = "") -> Images:
        root = str(Path(self.path, inside))
        return Images(np.array(sorted(map(os.fsencode, find_images(root))), bytes), root=root)


# What numpy raises for a file that is no whole archive of arrays.
TORN = (OSError, ValueError, LookupError, EOFError, TypeError, AttributeError, zipfile.BadZipFile)


class PackedFolder(Folder):
    """What pack.py has made of one. Raises InputError unless it is a whole file with its index."""

    def __init__(self, path: str):
        super().__init__(path)
        try:
            with np.load(f"{path}.npz") as index:
                self.all, readable = index["names"], index["sizes"][:, 0] > 0
                self.names, (height, width) = self.all[readable], index["sizes"][readable].T.astype(np.int64)
            ends = np.cumsum(3 * height * width)
            self.places = np.stack([ends - 3 * height * width, height, width], axis=1)
            if os.path.getsize(path) != ends[-1]:
                raise ValueError(f"it has {os.path.getsize(path)} bytes, its index says {ends[-1]}")
        except TORN as error:
            raise InputError(f"{path}: no folder, and no file of pack.py with its index: {error}") from None

    def folders(self, inside: str = "") -> list[str]:
        above, names = os.path.join(inside, ""), map(os.fsdecode, self.all.tolist())
        below = [name.removeprefix(above) for name in names if name.startswith(above)]
        return sorted({name.split("/")[0] for name in below if "/" in name})

    def images(self, inside: str = "") -> Images:
        above = os.fsencode(os.path.join(inside, ""))
        chosen = np.char.startswith(self.names, above)
        names = [name[len(above):] for name in self.names[chosen].tolist()]
        return Images(np.array(names, bytes), root=self.path, places=self.places[chosen])


def for_evaluation(names: list[str], share: float) -> set[str]:
    """This share of the images of every class, at least one of two or more: which, follows from their names alone."""
    classes: dict[str, list[str]] = {}
    for name in sorted(names, key=lambda name: hashlib.sha1(os.fsencode(name)).digest()):
        classes.setdefault(os.path.dirname(name).split("/")[0], []).append(name)
    return {name for some in classes.values() for name in some[:min(max(1, round(share * len(some))), len(some) - 1)]}


def find_images(root: str, inside: str = "") -> Iterator[str]:
    """Names of the images below a folder, relative to it. Pipes and the like are no images: to open one would wait; nor
    are pictures of a run."""
    try:
        entries = list(os.scandir(os.path.join(root, inside) if inside else root))
        if inside and {"args.json", "log.jsonl"} <= {entry.name for entry in entries}:
            return
        for entry in entries:
            name = inside + entry.name
            if entry.name[0] == ".":
                continue
            if entry.is_dir():
                yield from find_images(root, name + "/")
            elif name.lower().endswith(SUFFIXES) and (entry.is_file() or not os.path.exists(entry)):
                yield name  # also a dead link, which will be told of
    except OSError as error:
        refuse_folder(error)


def refuse_folder(error: OSError) -> None:  # one that is not there, not allowed, or links that lead in a circle
    raise InputError(f"--data: {error.filename}: {error.strerror}; expected a folder with train/<class>/<image> and "
                     "val/, or with <class>/<image> and --val-share 0.1 (without labels any folder of images), or one "
                     f"of {', '.join(TORCHVISION)}, shapes")


def open_torchvision(args: Namespace, split: str, labels: bool) -> Images:
    """A data set of torchvision, in its official splits."""
    name, train, val, *unlabelled = TORCHVISION[args.data]
    chosen = val if split == "val" else train if labels or not unlabelled else unlabelled[0]
    if args.download and dist.is_initialized():
        raise InputError("--download is for one process: run the command once without torchrun, and with --epochs 0")
    try:
        parts = [getattr(datasets, name)(args.data_root, download=args.download, **options) for options in chosen]
    except (RuntimeError, OSError) as error:
        what = "the download failed" if args.download else f"not in {args.data_root}; --download fetches it"
        raise InputError(f"--data {args.data}: {what} ({error})") from None
    if hasattr(parts[0], "data"):  # CIFAR, STL10: one part, already an array, M h w 3 or M 3 h w
        items, ids = parts[0].data, parts[0].targets if hasattr(parts[0], "targets") else parts[0].labels
        items = items.transpose(0, 2, 3, 1) if items.shape[1] == 3 else items
    else:  # the others know files and labels without decoding, but under no public name
        pairs = [pair for part in parts for pair in (part._samples if hasattr(part, "_samples") else
                 zip(part._images if hasattr(part, "_images") else part._image_files, part._labels, strict=True))]
        names = [os.fsencode(os.path.relpath(path, args.data_root)) for path, _ in pairs]
        items, ids = np.array(names), [label for _, label in pairs]
    return Images(items, np.array(ids, np.int64), list(parts[0].classes), args.data_root)


def shapes(total: int, seed: int, side: int = 32) -> Images:
    """{disc, triangle, square, star, cross} x {filled, outlined}; `seed` gives colours, places, angles and sizes."""
    rng, pixels = np.random.default_rng((SHAPES, seed)), np.empty((total, side, side, 3), np.uint8)
    labels = rng.integers(10, size=total)
    corners = [(30, 1), (3, 0.5), (4, 0.71), (5, 0.45), (4, 0.3)]  # how many; how far in the edge comes between two
    for label, picture in zip(labels, pixels, strict=True):
        ground, colour = (tuple(rng.integers(low, high, 3).tolist()) for low, high in ((0, 150), (100, 256)))
        points, inner = corners[label % 5]
        angle = rng.uniform(0, 2 * np.pi) + np.pi * np.arange(2 * points) / points
        radius = side * rng.uniform(1.2, 1.9) * np.where(np.arange(2 * points) % 2, inner, 1)
        edge = 4 * side * rng.uniform(0.35, 0.65, 2) + (radius * [np.cos(angle), np.sin(angle)]).T
        image = Image.new("RGB", (4 * side, 4 * side), ground)  # drawn four times as large, for soft edges
        ImageDraw.Draw(image).polygon(edge.ravel().tolist(), colour if label < 5 else None, colour, width=side // 2)
        picture[:] = image.resize((side, side), Image.Resampling.BOX)
    names = [f"{how} {name}" for how in ("filled", "outlined") for name in "disc triangle square star cross".split()]
    return Images(pixels, labels, names)


# ---- from images to batches

class RandomCrop(v2.RandomResizedCrop):
    """torchvision's, to the last bit; but the crop is copied first: torch resizes pixels that lie together in half the
    time."""

    def transform(self, image: Tensor, where: dict[str, int]) -> Tensor:
        image = v2.functional.crop(image, **where).permute(1, 2, 0).contiguous().permute(2, 0, 1)
        return v2.functional.resize(image, self.size, self.interpolation)


def random_crop(size: tuple[int, int], smallest: float, randaugment: float = 0.0,
                kind: type[v2.RandomResizedCrop] = RandomCrop) -> v2.Transform:
    """What a network sees in training: a crop of at least `smallest` of the image's area, as wide as high to 4:3 or 3:4
    (times the aspect of `size`), mirrored or not, then RandAugment; uint8 3 h w -> 3 and `size`."""
    aspect, bicubic = size[1] / size[0], v2.InterpolationMode.BICUBIC
    crop = kind(size, (smallest, 1.0), (3 / 4 * aspect, 4 / 3 * aspect), bicubic)
    return v2.Compose([crop, v2.RandomHorizontalFlip()] + [RandAugment(randaugment)] * (randaugment > 0))


@dataclass
class CentreCrop:
    """What it sees in evaluation: the image resized until `size` is `part` of its tighter side (timm's crop_pct), and
    of that the centre; uint8 3 h w -> 3 and `size`."""
    size: tuple[int, int]
    part: float = 1.0

    def __call__(self, image: Tensor) -> Tensor:
        # Of a thin strip no more than could be seen: resized as a whole, a line of 65,000 pixels would take gigabytes.
        image = v2.functional.center_crop(image, [min(side, 200 * min(image.shape[1:])) for side in image.shape[1:]])
        scale = max(int(new / self.part) / old for new, old in zip(self.size, image.shape[1:], strict=True))
        resized = [max(1, int(old * scale + 1e-6)) for old in image.shape[1:]]
        return v2.functional.center_crop(v2.functional.resize(image, resized, v2.InterpolationMode.BICUBIC), self.size)


@dataclass
class Views(Dataset):
    """What worker processes do: (epoch, number of an image) -> its view, uint8 h w 3; random numbers for the method,
    `numbers` in 0..1; the number of the image that is seen; and a complaint, where that is not the one asked for, as in
    training the next one takes the place of an image that cannot be read."""
    images: Images
    view: Callable[[Tensor], Tensor]
    seed: int | None = None  # of all chance. None is evaluation: nothing is random, such an image is an InputError
    numbers: int = 0

    def __getitem__(self, place: tuple[int, int]) -> tuple[Tensor, Tensor, int, str]:
        epoch, wanted = place
        if self.seed is not None:
            torch.default_generator.manual_seed(torch_seed(IMAGE, self.seed, epoch, wanted))
        complaint = ""
        for i in range(wanted, wanted + 50):
            i %= len(self.images)
            try:
                return self.view(self.images.open(i)).movedim(-3, -1), torch.rand(self.numbers), i, complaint
            except InputError as error:
                if self.seed is None:
                    raise
                complaint = complaint or str(error)
        raise InputError(f"50 images in a row cannot be read; {complaint}")


# What the loader says when a worker is lost, and what a user can do.
SHARED = ("a process that decodes images was ended by the system, for want of memory, or of shared memory? Try fewer "
          "--workers, in a container --shm-size=16g")
LOST_IMAGES = {
    "DataLoader worker (pid": SHARED,
    "DataLoader timed out": "no image for ten minutes: does the file system of --data answer?",
    "shared memory": SHARED, "unable to resize file": SHARED,
    "Too many open files": "too many open files: raise `ulimit -n`, or try fewer --workers",
    "Connection": "a process that decodes images was ended by the system",
}


class Batches(Iterator, AbstractContextManager):
    """Iterator over parts of batches: views B 3 h w in 0..1 on the device (of MoCo B 2 3 h w); on the host, random
    numbers B n and, as an array, the numbers of the images B.

    waited           seconds that were spent on waiting for them
    asked, replaced  images so far, and those among them that could not be read
    """
    request = 128   # images that a worker is asked for at once: its answer must fit into shared memory
    patience = 600  # seconds until a worker that does not answer is given up

    def __init__(self, views: Views, parts: Iterator[list[tuple[int, int]]], args: Namespace, world: World):
        self.world, self.waited, self.asked, self.replaced, self.complaints = world, 0.0, 0, 0, set()
        others, (self.parts, asked) = multiprocessing.active_children(), tee(parts)
        requests = (part[i:i + Batches.request] for part in asked for i in range(0, len(part), Batches.request))
        loader = DataLoader(views, batch_sampler=requests, num_workers=args.workers, pin_memory=args.device == "cuda",
                            generator=torch.Generator(), timeout=5 * (args.workers > 0),  # as `answer` looks after them
                            multiprocessing_context="fork" if args.workers else None)
        # Signals reach the whole group, but the training process decides what follows: workers inherit this mask.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        at_a_death = signal.getsignal(signal.SIGCHLD)  # torch's handler would raise an error wherever the program is
        try:
            self.items = iter(loader)
        except OSError as error:
            raise InputError(f"--workers {args.workers} cannot be started: {error}") from None
        finally:
            signal.signal(signal.SIGCHLD, at_a_death)
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        workers = [process for process in multiprocessing.active_children() if process not in others]
        self.end_workers = weakref.finalize(self, end_processes, workers)  # the end of the program calls it, too

    def close(self, *error) -> None:
        self.end_workers()
        self.items = iter(())  # no queue of the loader is left for a later worker to inherit

    __exit__ = close

    def __next__(self) -> tuple[Tensor, Tensor, np.ndarray]:
        begin, part = time.monotonic(), next(self.parts)
        pixels, numbers, index = zip(*[self.answer() for _ in range(0, len(part), Batches.request)], strict=True)
        self.waited += time.monotonic() - begin
        pixels, index = torch.cat([self.world.send(some) for some in pixels]), torch.cat(index).numpy()
        self.asked, self.replaced = self.asked + len(part), self.replaced + sum(index != [i for _, i in part])
        pixels = pixels.movedim(-1, -3).to(torch.float32, memory_format=torch.contiguous_format)
        return pixels.div_(255), torch.cat(numbers), index

    def answer(self) -> tuple[Tensor, Tensor, Tensor]:
        """What a worker has made of one request."""
        waits = Batches.patience // 5  # counted, not timed: a program may be suspended
        while True:
            try:
                pixels, numbers, index, complaints = next(self.items)
                break
            except (InputError, RuntimeError, OSError, EOFError) as error:
                text = str(error)  # from a worker, its error stands at the end of a traceback
                if "DataLoader timed out" in text and (waits := waits - 1) > 0:
                    continue
                told = text.rpartition("InputError: ")[2].strip() if isinstance(error, InputError) else next(
                    (reason for sign, reason in LOST_IMAGES.items() if sign in text), None)
                if told is None:
                    raise
                error.__traceback__ = None  # it would keep the loader alive, in a circle
                raise InputError(told) from None
        for complaint in set(complaints) - self.complaints - {""}:
            say(f"warning: {complaint}; the next image takes its place")
            self.complaints.add(complaint)
        return pixels, numbers, index


def in_order(views: Views, args: Namespace, world: World) -> Batches:
    """Every image once, divided among the processes without padding."""
    mine = [(0, i) for i in range(world.rank, len(views.images), world.size)]
    return Batches(views, (mine[i:i + args.micro_batch] for i in range(0, len(mine), args.micro_batch)), args, world)


def in_random_order(total: int, args: Namespace, world: World, first: int, last: int) -> Iterator[list]:
    """Lists of (epoch, image) for this process, part by part, from the step after `first` to step `last`."""
    batch, parts = args.batch_size, parts_of_batch(args, world)
    for step in range(first, last):
        epoch, place = divmod(step, total // batch)
        if place == 0 or step == first:
            order = np.random.default_rng((ORDER, args.seed, epoch)).permutation(total)
        mine = order[place * batch:(place + 1) * batch].reshape(world.size, parts, -1)[world.rank]
        yield from ([(epoch, i) for i in part] for part in mine.tolist())


def parts_of_batch(args: Namespace, world: World) -> int:
    """Into how many parts a process cuts its rows of a batch. Raises InputError if that leaves a remainder."""
    rows, rest = divmod(args.batch_size, world.size)
    parts = math.ceil(rows / args.micro_batch)
    if rest or rows == 0 or rows % parts:
        raise InputError(f"--batch-size {args.batch_size} is not processes x parts x images: {world.size} processes "
                         f"x {parts} parts (--micro-batch {args.micro_batch}) x a whole number of images")
    return parts


# ---- a run: schedule, checkpoints, log

# What may differ between a run and its continuation: nothing that changes what is learned, beyond rounding and what is
# drawn for a part of a batch. Images and files may lie elsewhere: their content is compared.
FREE_ON_RESUME = ("data data_root download init teacher out resume workers device compile micro_batch save_minutes "
                  "log_every").split()


def cosine(epoch: float, peak: float, low: float, warmup: float, epochs: float) -> float:
    """Learning rate: 0 -> peak linearly over `warmup` epochs, then half a cosine down to `low` (MAE, lr_sched)."""
    if epoch < warmup:
        return peak * epoch / warmup
    return low + (peak - low) / 2 * (1 + math.cos(math.pi * (epoch - warmup) / (epochs - warmup)))


def write_file(write: Callable, path: Path) -> None:
    """Has `write` fill a file aside, flushes, renames: under its name a file is whole, or still the one before, if
    that fails. The folder is made again if it has gone."""
    aside = path.with_name(f"{path.name}.{secrets.token_hex(4)}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(aside, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
        with suppress(OSError):
            aside.unlink()
        raise InputError(f"{path} cannot be written: {error}") from None


def content(path: str) -> str:
    """By which a file is known again, wherever it lies."""
    return hashlib.sha1(np.memmap(path, np.uint8, "r")).hexdigest()[:12]


class Run:
    """A training: its folder, schedule, checkpoint and log, and the reasons to leave it early.

    `for step in run.steps(batches)` sets the learning rate; after the step it looks, logs and saves.

    network   the part of the model that is handed on: written as encoder.pth or, with classes, as model.pth
    first, last, per_epoch   steps that are done already, that there will be in all, and in an epoch
    parts     into which a process cuts its rows of a batch
    """

    def __init__(self, method: str, args: Namespace, world: World, images: Images, model: nn.Module, network: ViT,
                 optimizer: torch.optim.Optimizer):
        if len(images) < args.batch_size:
            raise InputError(f"--data {args.data} has {len(images)} images, less than one batch of {args.batch_size}: "
                             f"give --batch-size {len(images)} or less")
        self.method, self.args, self.world, self.main = method, args, world, world.rank == 0
        self.model, self.network, self.optimizer = model, network, optimizer
        self.scaler = torch.amp.GradScaler(args.device, enabled=world.precision == "fp16")
        self.parts, self.per_epoch = parts_of_batch(args, world), len(images) // args.batch_size
        self.first, self.last, self.lr = 0, round(args.epochs * self.per_epoch), args.blr * args.batch_size / 256
        self.sums, self.signal, self.evaluating, self.classes = {}, 0, False, images.classes
        # Noted, so that a run is continued on the same images and files, wherever they lie by then.
        seen = vars(args)["content of --data"] = images.content()
        for name in ("init", "teacher"):
            if getattr(args, name, None):
                vars(args)[f"content of --{name}"] = content(getattr(args, name))
        self.resume()
        self.done = self.saved = self.first
        if self.main:
            self.introduce(len(images))
        mine = torch.tensor([self.first, int(seen[-12:], 16)], device=world.device)
        if world.size > 1 and not torch.equal(world.sum(mine.clone()), world.size * mine):
            raise InputError("processes see different checkpoints or images: --out and --data must be the same for all")

    def resume(self) -> None:
        """Takes the run's folder and, with --resume, puts its checkpoint into place. Raises InputError if the folder is
        in use or holds another run, or if the checkpoint is damaged or of a run with other settings."""
        args = self.args
        path = Path(args.resume if isinstance(args.resume, str) else args.out or f"runs/{self.method}-{args.recipe}")
        path = path if path.is_file() else path / "last.pth"
        self.out = out = Path(args.out) if args.out else path.parent
        self.handed_on = out / ("model.pth" if self.network.config["classes"] else "encoder.pth")
        self.records, self.lock = [], None
        if os.path.realpath(args.data) == os.path.realpath(out):
            raise InputError(f"--out {out} is --data: a run needs a folder of its own")
        if self.main:
            self.take_folder()
        held = any((out / file).exists() for file in ("last.pth", "encoder.pth", "model.pth"))
        if held and (args.resume is None or out.resolve() != path.parent.resolve()):
            raise InputError(f"{out} holds a run already: continue it by --out {out} --resume, or choose another --out")
        if args.resume is None:
            return
        if args.resume is True and not path.exists():
            return self.world.say(f"no checkpoint in {out}: a new run starts")
        file = load_file(str(path))
        if not isinstance(file, dict) or file.get("method") != self.method:
            raise InputError(f"--resume: {path} is no checkpoint of {self.method}.py")
        try:
            before, self.first = file["args"], file["step"]
            if changed := [f"{name} {before.get(name)} -> {value}" for name, value in vars(args).items()
                           if name not in FREE_ON_RESUME and json.dumps(before.get(name)) != json.dumps(value)]:
                raise InputError(f"--resume: settings differ from the run's: {', '.join(changed)}. For others start "
                                 f"another run from what it learned, by --init {self.handed_on} and another --out")
            if type(self.first) is not int or not 0 <= self.first <= self.last:
                raise ValueError(f"step {self.first}")
            for group in file["optimizer"]["param_groups"]:  # older files have it otherwise
                group["fused"] = self.optimizer.param_groups[0].get("fused")
            for name in ("model", "optimizer", "scaler"):
                getattr(self, name).load_state_dict(file[name])
        except (LookupError, AttributeError, TypeError, RuntimeError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"--resume: {path} is damaged ({type(error).__name__}: {str(error)[:80]})") from None
        self.read_log(path.with_name("log.jsonl"))

    def read_log(self, path: Path) -> None:
        """The records of the steps that are done. Lines that are none, as after a crash, are told and left out."""
        damaged = []
        for number, line in enumerate(path.read_bytes().splitlines() if path.is_file() else [], 1):
            try:
                record = json.loads(line)
                self.records += [record] * (record["step"] <= self.first)
            except (ValueError, TypeError, KeyError, RecursionError):
                damaged.append(number)
        if damaged:
            self.world.say(f"warning: {path}: damaged lines {damaged[:10]} are left out")

    def take_folder(self) -> None:
        """Nobody else may write there until this process ends, however it does: workers do not inherit the lock. It is
        taken again where the folder was moved or deleted."""
        with suppress(OSError):
            if self.lock and os.path.samestat(os.fstat(self.lock.fileno()), os.stat(self.out / "lock")):
                return
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            number = os.open(self.out / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            self.lock = open(number, "r+")
        except OSError as error:
            raise InputError(f"--out {self.out} cannot be written: {error}") from None
        try:
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            self.lock.seek(0)
            raise InputError(f"{self.out} is in use by {self.lock.read().strip()}") from None
        except OSError as error:  # a file system without locks
            say(f"warning: {self.out} cannot be locked against a second run: {error}")
        self.lock.truncate(0)
        self.lock.write(f"process {os.getpid()} on {platform.node()}\n")
        self.lock.flush()

    def introduce(self, images: int) -> None:
        """The first line of a run; and a warning, where its learning rate never gets to its peak."""
        args, c = self.args, self.network.config
        size, (h, w) = sum(x.numel() for x in self.weights().values()) / 1e6, c["image_size"]
        say(f"{self.method}, recipe {args.recipe}: ViT {c['width']} wide, {c['depth']} blocks, {c['heads']} heads, "
            f"{size:.3g} M parameters, {h} x {w} pixels, patches of {c['patch_size']}; {images} images, "
            f"{args.epochs:g} epochs ({args.warmup_epochs:g} of warm-up), {self.last} steps of {args.batch_size}, "
            f"learning rate {self.lr:.3g}, {self.world.precision} on {self.world.size} x {args.device} -> {self.out}"
            + f", resumed at step {self.first}" * (self.first > 0))
        if self.first < self.last and args.epochs <= args.warmup_epochs:
            say("warning: the run ends while the learning rate still rises: give --warmup-epochs "
                f"{args.epochs / 10:g}, or more --epochs than {args.warmup_epochs:g}")

    def open_log(self) -> None:
        """args.json, and log.jsonl without what an interrupted run wrote after its checkpoint."""
        settings, records = json.dumps(vars(self.args), indent=1), "\n".join([*map(json.dumps, self.records), ""])
        for left in self.out.glob("*.new"):  # of a process that was killed while it wrote
            left.unlink()
        write_file(lambda file: file.write(settings.encode()), self.out / "args.json")
        write_file(lambda file: file.write(records.encode()), self.out / "log.jsonl")

    @contextmanager
    def batches(self, views: Views) -> Iterator[Batches]:
        """What is trained on. If no more images come, one process saves what it has learned; several keep the last."""
        order = in_random_order(len(views.images), self.args, self.world, self.first, self.last)
        with Batches(views, order, self.args, self.world) as batches:
            try:
                yield batches
            except InputError:
                if self.world.size == 1 and self.done > self.saved:
                    self.sums = self.whole  # without parts of the step that was not done
                    if self.done > self.told:
                        self.look(self.done, save=True)
                    else:  # its record is written
                        self.save(self.done)
                raise

    def steps(self, batches: Batches) -> Iterator[int]:
        """Numbers of the steps to do, from 1. Leaves with status 128 + signal, or 1 if a loss is not finite."""
        args = self.args
        if self.main:
            self.open_log()
        handlers = {number: signal.signal(number, self.on_signal) for number in heeded(SIGNALS)}
        self.bar = tqdm(range(self.first + 1, self.last + 1), total=self.last, initial=self.first, dynamic_ncols=True,
                        disable=not self.main or not sys.stderr.isatty(),
                        bar_format="{percentage:3.0f}%|{bar}| {n}/{total} [{remaining} left{postfix}]")
        self.source, self.told, self.look_at = batches, self.first, self.first + 1
        self.told_when = self.saved_when = time.monotonic()
        try:
            for step in self.bar:
                self.rate = cosine((step - 1) / self.per_epoch, self.lr, args.min_lr, args.warmup_epochs, args.epochs)
                for group in self.optimizer.param_groups:
                    group["lr"] = self.rate * group["lr_scale"]
                yield step
                self.done, self.whole = step, dict(self.sums)
                if step == self.look_at:
                    self.look(step)
            self.save(self.last)
            if self.signal:
                raise SystemExit(128 + self.signal)
        finally:
            self.bar.close()
            for number, handler in handlers.items():  # one that comes while a program leaves, changes nothing
                signal.signal(number, signal.SIG_IGN if self.signal and handler is leave else handler)

    def on_signal(self, number: int, frame) -> None:
        if number == self.signal == signal.SIGINT:
            raise KeyboardInterrupt  # the second one does not wait
        if self.main and not self.signal:
            told = b"\nstopping: all is saved\n" if self.evaluating else b"\nstopping at the next look\n"
            with suppress(OSError):  # print() may be what was interrupted, or be waiting for a reader
                os.write(2, told if select.select([], [2], [], 0)[1] else b"")
        self.signal = number
        if self.evaluating:
            raise SystemExit(128 + number)

    def add(self, **losses: Tensor) -> None:
        """The losses of one more part of a batch; they stay on the device until the next look."""
        for name, loss in losses.items():
            self.sums[name] = self.sums.get(name, 0) + loss.detach().double() / self.parts

    def look(self, step: int, save: bool = False) -> None:
        """What all processes do together after `step`: they add up the losses, and learn whether one of them got a
        signal and when to look next. No other step waits for the device. On a CPU they look at every step, else some 5
        seconds and at most 10 steps apart, as the main process decides. What is saved is logged before."""
        args, now, every, batches = self.args, time.monotonic(), self.args.log_every, self.source
        steps, seconds = step - self.told, now - self.told_when
        ahead = 1 if args.device == "cpu" else max(1, min(10, int(5 * steps / seconds)))
        due = self.main and now - self.saved_when > 60 * args.save_minutes
        flags = [self.signal > 0, save or due, ahead * self.main, batches.replaced, batches.asked]
        flags = torch.tensor(flags, device=self.world.device).double()
        *sums, stop, save, ahead, replaced, asked = self.world.sum(torch.stack([*self.sums.values(), *flags])).tolist()
        losses = {name: value / (self.world.size * steps) for name, value in zip(self.sums, sums, strict=True)}
        self.look_at = min(step + int(ahead), step + every - step % every, self.last)
        if not all(map(math.isfinite, sums)):
            told = ", ".join(f"{name} {value:g}" for name, value in losses.items())
            self.world.say(f"step {step}: {told} at learning rate {self.rate:.3g}; what is saved is from before. A "
                           "lower --blr or --precision fp32 may help")
            raise SystemExit(1)
        broken = replaced > max(2, asked / 100)
        save = save or broken
        if self.sums and (stop or save or step % every == 0 or step == self.last):
            speed = dict(images_per_s=round(steps * args.batch_size / seconds, 1),
                         waiting=round(batches.waited / seconds, 3), eta_s=round((self.last - step) * seconds / steps))
            if args.device == "cuda":
                speed["memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
            if self.scaler.is_enabled():  # it is halved where a step was skipped, as a gradient was out of range
                speed["loss_scale"] = self.scaler.get_scale()
            told = f"loss {losses['loss']:.4g}, {speed['images_per_s']:.0f} images/s"
            if speed["waiting"] > 0.2:
                told = f"waiting for images {speed['waiting']:.0%}: more --workers"
                told += ", or pack.py" * os.path.isdir(args.data)
            self.bar.set_postfix_str(told, refresh=False)
            self.write(step, on_bar=True, epoch=round(step / self.per_epoch, 4), **losses, lr=self.rate, **speed)
            self.sums, self.told, self.told_when, batches.waited = {}, step, now, 0.0
        if stop or save:
            self.save(step)
        if broken:
            raise InputError(f"{replaced:.0f} of {asked:.0f} images that were asked for cannot be read")
        if stop:
            if self.world.size > 1:
                dist.barrier()  # torchrun ends the rest soon after the first process is gone
            self.world.say("stopped by a signal and saved; --resume continues")
            raise SystemExit(128 + (self.signal or signal.SIGTERM))

    def write(self, step: int, on_bar: bool = False, **values: float) -> None:
        """One more line in log.jsonl, in strict JSON (null: not finite), and on the screen, unless a bar shows it."""
        if self.main:
            self.take_folder()
            record = dict(step=step) | {name: x if math.isfinite(x) else None for name, x in values.items()}
            try:
                if not any(record.keys() == known.keys() and step == known["step"] for known in self.records):
                    with open(self.out / "log.jsonl", "a") as file:
                        file.write(json.dumps(record) + "\n")
            except OSError as error:  # a lost line is no reason to lose the training
                say(f"warning: {self.out}/log.jsonl: {error}")
            if self.bar.disable or not on_bar:
                told = [f"{name} {x:.4g}" if name != "eta_s" else f"eta {x // 3600} h {x % 3600 // 60:02} min"
                        for name, x in values.items()]
                say(f"step {step}/{self.last}  {'  '.join(told)}")

    def save(self, step: int) -> None:
        """last.pth and the network that is handed on. Raises InputError in all processes if weights are not finite."""
        state, args, config = self.model.state_dict(), self.args, self.network.config
        if broken := first_not_finite(dict(state, optimizer=self.optimizer.state_dict())):
            raise InputError(f"step {step}: {broken} is not finite; nothing was saved")
        self.saved, self.saved_when = step, time.monotonic()
        if self.main:
            self.take_folder()
            last = dict(method=self.method, step=step, args=vars(args), config=config, model=state,
                        optimizer=self.optimizer.state_dict(), scaler=self.scaler.state_dict())
            handed = dict(model=self.weights(), config=config, classes=self.classes if config["classes"] else None)
            for file, path in ((last, self.out / "last.pth"), (handed, self.handed_on)):
                write_file(partial(torch.save, file), path)

    def evaluate(self, step: int, images: Images, view: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """What `evaluate` finds after `step`, once in the log. All is saved before, as it may take long or meet a
        broken image, and a signal ends it at once. A run that is continued makes up for one that was cut off."""
        if step < self.last:
            if any(record["step"] == step and "top1" in record for record in self.records):
                return {}
            self.look(step, save=True)
        self.evaluating = True
        result = evaluate(self.network, images, view, self.args, self.world)
        self.evaluating = False
        self.write(step, **result)
        return result

    def weights(self) -> dict:
        """Those that are handed on; with the number of heads of the last block, where it has others."""
        config, marks = self.network.config, {}
        if config["last_heads"] != config["heads"]:
            marks["last_heads"] = torch.tensor(config["last_heads"])
        return {name: x for name, x in self.network.state_dict().items()
                if config["classes"] or not name.startswith("head.")} | marks  # in training a projector may stand there


# ---- labels: augmentation and evaluation

@dataclass
class RandAugment:
    """timm's `rand-m<magnitude>-mstd0.5-inc1` of an image, uint8 3 h w: two operations of fifteen, each done with
    probability one half. In torchvision's RandAugment magnitude 9 is a third of this one's."""
    magnitude: float

    def __call__(self, image: Tensor) -> Tensor:
        for _ in range(2):
            whether, number, sign = torch.rand(3).tolist()
            level = min(max(self.magnitude + 0.5 * torch.randn(()).item(), 0.0), 10.0)
            if whether < 0.5:
                picture = v2.functional.to_pil_image(image)
                image = v2.functional.pil_to_tensor(operation(int(number * 15), picture, level, sign < 0.5))
        return image


def operation(number: int, image: Image.Image, m: float, up: bool) -> Image.Image:
    """One of the fifteen, at level m in 0..10; those with two directions go up or down."""
    grey = (124, 116, 104)  # ImageNet's mean colour fills what an operation uncovers
    (w, h), s = image.size, m if up else -m

    def affine(*matrix):
        return image.transform((w, h), Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC, fillcolor=grey)
    return (
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
    )[number]()


def random_erasing(images: Tensor, probability: float) -> Tensor:
    """In each image B C h w, with this probability, a box of noise N(0, 1): area 2 % to 33 %, aspect 0.3 to 3.3, as in
    timm's mode `pixel`, but cut to the image where timm draws again. Images are normalised already."""
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
    """MixUp and CutMix of a batch by these alphas, one of the two by chance if both are on; None if neither is. An
    alpha up to 0.001 counts as 0: hardly anything would be mixed, and torch cannot draw from such a distribution."""
    both = [how(alpha=alpha, num_classes=classes)
            for how, alpha in ((v2.MixUp, mixup), (v2.CutMix, cutmix)) if alpha > 1e-3]
    return v2.RandomChoice(both) if both else None


def balanced(images: Images, total: int, seed: int) -> Images:
    """`total` images drawn by chance, as many of each class as there can be. Raises InputError if there are fewer."""
    if total > len(images):
        raise InputError(f"--labels {total}: there are {len(images)} labelled images")
    order = np.random.default_rng((LABELS, seed)).permutation(len(images))
    by_class = [order[images.labels[order] == label] for label in range(len(images.classes))]
    in_turn = [i for one_of_each in zip_longest(*by_class) for i in one_of_each if i is not None]
    return images.subset(np.array(in_turn[:total]))


def classes_of(path: str, config: dict, wanted: list[str] | None = None) -> list[str]:
    """Names of the classes that the classifier in a file knows; numbers, if it has no names. Raises InputError if it is
    an encoder, or if others are wanted."""
    if not config["classes"]:
        raise InputError(f"{path} is no classifier but an encoder")
    names = load_file(path).get("classes")
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)
                                  and len(set(names)) == len(names) == config["classes"]):
        raise InputError(f"{path}: its classes are not {config['classes']} different names")
    known = names or list(map(str, range(config["classes"])))
    if wanted is not None and (len(known) != len(wanted) or names not in (None, wanted)):
        raise InputError(f"{path} knows {len(known)} classes ({', '.join(known[:3])}, ...), --data has {len(wanted)} "
                         f"({', '.join(wanted[:3])}, ...)")
    return known


@torch.no_grad()
def evaluate(model: ViT, images: Images, view: Callable[[Tensor], Tensor], args: Namespace, world: World,
             by_class: bool = False) -> dict[str, float]:
    """Top-1 and top-5 accuracy in % and mean cross-entropy; each image counts once on any number of processes.
    by_class: also the top-1 accuracy of every class that has images, under its name.
    The model is back in training mode after it."""
    model.eval()
    totals, total = torch.zeros(3 + len(images.classes), dtype=torch.float64, device=world.device), len(images)
    with in_order(Views(images, view), args, world) as batches:
        for pixels, _, index in batches:
            labels = world.send(torch.from_numpy(images.labels[index]))
            with world.autocast():
                logits = model(model.normalize(pixels)).float()
            hits = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
            totals[:3] += torch.stack([hits[:, 0].sum(), hits.sum(), F.cross_entropy(logits, labels, reduction="sum")])
            totals[3:].index_add_(0, labels, hits[:, 0].double())
    model.train()
    top1, top5, loss, *right = world.sum(totals).tolist()
    result = dict(top1=100 * top1 / total, top5=100 * top5 / total, val_loss=loss / total, val_images=total)
    if by_class:
        of_class = np.bincount(images.labels, minlength=len(right)).tolist()
        result |= {f"top1 of {name} ({n} images)": 100 * hits / n
                   for name, hits, n in zip(images.classes, right, of_class, strict=True) if n}
    return result


def print_result(result: dict[str, float], world: World) -> None:
    """What `evaluate` found, on stdout: one line for all images, and one for each class."""
    told = [f"{name} {x:.2f} %" if name.startswith("top") else f"{name} {x:.4g}" for name, x in result.items()]
    if world.rank == 0:
        print("  ".join(told[:4]), *told[4:], sep="\n")

"""MoCo v3: two views of an image should get the same features, views of different images different ones.

Chen, Xie, He, arXiv 2104.02057; for ViT-Tiny with the recipe of MAE-Lite, Wang et al., arXiv 2205.14443.

    q1, q2 = predictor(projector(ViT(view1))), likewise for view2      with gradient
    slow   = m slow + (1 - m) fast                                     momentum encoder: weights of ViT and projector
    k1, k2 = slow projector(slow ViT(view1)), likewise for view2       without gradient
    loss   = ctr(q1, k2) + ctr(q2, k1)
    ctr(q, k) = 2 tau mean_i -log( exp(q_i k_i / tau) / sum_j exp(q_i k_j / tau) )       q, k L2-normalised

tau = 0.2; m rises from 0.99 to 1. The keys k_j are those of the whole batch, on all processes. A uniform guess has the
loss 4 tau ln(batch size).

Run    python moco_v3.py                                          generated shapes, minutes on a laptop
       python moco_v3.py --data /imagenet                         one GPU
       torchrun --standalone --nproc_per_node=8 moco_v3.py --data /imagenet    eight GPUs
Writes encoder.pth (the ViT of the queries, without projector) and last.pth (all that --resume needs) every ten minutes
       and at the end, log.jsonl, args.json, views.png (32 pairs of views)
Use    from moco_v3 import MoCo, TwoViews, recolour_views          copy this file and vit.py
Letters in shape comments: B images of this process, M images of all processes, C channels, h and w height and width
       in pixels, D encoder width, E projected width
"""
import copy
import math
from argparse import BooleanOptionalAction, Namespace
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.utils import save_image

from vit import IMAGENET_MEAN, IMAGENET_STD, BatchNorm, InputError, ViT

# -------------------------------------------------------------------- the method


class MoCo(nn.Module):
    """A ViT with a projector as its head, a momentum (slow) copy of both, and a predictor on the query side only.
    Names of parameters are the official ones, so files go both ways.

    hidden, width   of projector and predictor: D -> hidden -> hidden -> width, and width -> hidden -> width
    temperature     tau of the loss
    freeze_patch    leave the patch projection as it was drawn, as the official recipes do and MAE-Lite's does not
    """

    def __init__(self, encoder: ViT, hidden: int = 4096, width: int = 256, temperature: float = 0.2,
                 freeze_patch: bool = False):
        super().__init__()
        self.base_encoder, self.temperature = encoder, temperature
        encoder.head = mlp(encoder.width, hidden, hidden, width)  # the projector; `forward` applies it view by view
        encoder.patch_embed.requires_grad_(not freeze_patch)
        self.momentum_encoder = copy.deepcopy(encoder).requires_grad_(False)
        self.predictor = mlp(width, hidden, width)

    def forward(self, view1: Tensor, view2: Tensor, momentum: Tensor) -> dict[str, Tensor]:
        """view1, view2 B C h w, normalised; momentum m of this step, a tensor of one number -> the loss, and two
        diagnostics: % of the queries that are nearest to their own key (`top1`), spread of the features."""
        z1, z2 = features(self.base_encoder, view1, view2)                              # B D each
        q1, q2 = (self.predictor(self.base_encoder.head(z)) for z in (z1, z2))          # B E each
        with torch.no_grad():
            self.follow(momentum)  # after the queries, before the keys: the official order
            k1, k2 = (self.momentum_encoder.head(z) for z in features(self.momentum_encoder, view1, view2))
        (loss1, top1), (loss2, top2) = (info_nce(q, k, self.temperature) for q, k in ((q1, k2), (q2, k1)))
        return dict(loss=loss1 + loss2, top1=(top1 + top2) / 2, feature_std=spread(z1.detach()))

    @torch.no_grad()
    def follow(self, momentum: Tensor) -> None:
        """EMA update of the momentum encoder: slow = m slow + (1 - m) fast. Weights only: its BatchNorms keep running
        statistics of their own."""
        slow, fast = (list(encoder.parameters()) for encoder in (self.momentum_encoder, self.base_encoder))
        change = torch._foreach_sub(fast, slow)  # for all tensors at once: on a GPU a few launches, not two for each
        torch._foreach_mul_(change, (1 - momentum).to(slow[0].dtype))
        torch._foreach_add_(slow, change)


def features(vit: ViT, view1: Tensor, view2: Tensor) -> tuple[Tensor, ...]:
    """Class tokens of both views, B D each. The ViT may take them in one batch; the heads must not, as their
    BatchNorm would mix the statistics of the two views."""
    return vit.features(torch.cat([view1, view2])).chunk(2)


def info_nce(q: Tensor, k: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Queries and keys B E -> ctr(q, k) of this process's queries among the keys of all, and % of them nearest
    to their own key. The factor tau in 2 tau cancels the 1 / tau that the logits bring into the gradient."""
    with torch.autocast(q.device.type, enabled=False):
        q, k = (F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=1) for x in (q, k))
        keys, first = gather(k)                                                         # M E
        logits = q @ keys.T / temperature                                               # B M
        own = first + torch.arange(len(q), device=q.device)
        return 2 * temperature * F.cross_entropy(logits, own), 100 * (logits.argmax(1) == own).float().mean()


@torch.no_grad()
def gather(x: Tensor) -> tuple[Tensor, int]:
    """B E of every process -> M E, in the order of the processes, without gradient; and the first of our own rows."""
    if not dist.is_initialized():
        return x, 0
    every = x.new_empty(dist.get_world_size() * len(x), x.shape[1])
    dist.all_gather_into_tensor(every, x.contiguous())
    return every, dist.get_rank() * len(x)


def spread(z: Tensor) -> Tensor:
    """Standard deviation over the batch of the L2-normalised features, times sqrt(D): 0 where all images get the same
    feature (collapse), 1 where the features point equally in all directions."""
    return F.normalize(z.float(), dim=1).std(0).mean() * z.shape[1] ** 0.5


def mlp(*widths: int) -> nn.Sequential:
    """Bias-free linear layers, each followed by BatchNorm and ReLU; the last without ReLU, its BatchNorm not affine."""
    layers = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after, bias=False), BatchNorm(after), nn.ReLU()]
    return nn.Sequential(*layers[:-2], BatchNorm(widths[-1], affine=False))


def start_weights(vit: ViT) -> ViT:
    """The official code's start, where it differs from MAE's: q, k and v drawn as three matrices, a class token and a
    patch bias of (almost) zero, and the sin-cos table with the row before the column. Projector and predictor keep
    torch's start, as there."""
    for weight in (weight for name, weight in vit.named_parameters() if name.endswith("attn.qkv.weight")):
        for part in weight.data.chunk(3):
            nn.init.xavier_uniform_(part)
    nn.init.zeros_(vit.patch_embed.proj.bias)
    nn.init.normal_(vit.cls_token, std=1e-6)
    if vit.config["positions"] == "sincos":
        vit.pos_embed.data = vit.pos_embed.data.roll(vit.width // 2, dims=2)
    return vit


def momentum_at(epoch: float, start: float, epochs: float) -> float:
    """m: from `start` to 1 along half a cosine, without warmup."""
    return 1 - (1 - start) / 2 * (1 + math.cos(math.pi * epoch / epochs))


# ---- the two views: crops one by one, then colours on the device, for a whole batch, each image with its own

NUMBERS = 13  # random numbers for a view: jitter, 4 strengths, 4 for their order, grey, blur, its sigma, solarize
STRENGTH = np.array([0.4, 0.4, 0.2, 0.1], np.float32)  # brightness, contrast, saturation times 1 +- this; hue +- this
BLUR, SOLARIZE = (1.0, 0.1), (0.0, 0.2)  # probabilities in view 1 and view 2: all that differs (main_moco.py)


@dataclass
class TwoViews:
    """Two crops of an image, uint8 C height width -> 2 C h w."""
    crop: Callable[[Tensor], Tensor]

    def __call__(self, image: Tensor) -> Tensor:
        pair = [self.crop(image).movedim(0, -1) for _ in range(2)]  # as they lie in memory, h w C
        return torch.stack(pair).movedim(-1, 1)


def recolour_views(pixels: Tensor, numbers: Tensor, blur: float) -> list[Tensor]:
    """Crops B 2 C h w in 0..1, which are overwritten; random numbers B 2*NUMBERS on the host -> both views, B C h w."""
    numbers = numbers.view(-1, 2, NUMBERS).numpy()
    return [recolour(pixels[:, view], draw_colours(numbers[:, view], view, blur)) for view in (0, 1)]


@dataclass
class Colours:
    """What is done to each of B images: adjustments, then grey, blur, solarize. On the host, so that to find the rows
    nobody waits for the device."""
    order: np.ndarray     # B 4: adjustments (0 brightness, 1 contrast, 2 saturation, 3 hue) in their order; -1: none
    factor: np.ndarray    # B 4, float32: factors of the first three, shift of the hue (1: the full circle)
    grey: np.ndarray      # B: true or false
    sigma: np.ndarray     # B, float32: deviation of the Gaussian blur in pixels; 0: none
    solarize: np.ndarray  # B: true or false


def draw_colours(numbers: np.ndarray, view: int, blur: float) -> Colours:
    """numbers B NUMBERS in [0, 1); view 0 or 1; blur: largest deviation in pixels, 0: none."""
    jitter, strength, order, (grey, blurred, sigma, solarize) = np.split(numbers.T, [1, 5, 9])
    return Colours(
        order=np.where(jitter[0] < 0.8, order.argsort(0), -1).T,
        factor=((2 * strength.T - 1) * STRENGTH + np.array([1, 1, 1, 0], np.float32)),
        grey=grey < 0.2,
        sigma=np.where(blurred < BLUR[view], 0.1 + (blur - 0.1) * sigma, 0) * (blur > 0),
        solarize=solarize < SOLARIZE[view])


def recolour(images: Tensor, colours: Colours) -> Tensor:
    """B 3 h w in 0..1, changed in place. As torchvision's ColorJitter, RandomGrayscale and solarize, and as a Gaussian
    blur, image by image; but no rounding to 256 levels in between."""
    def send(values: np.ndarray) -> Tensor:  # by way of pinned memory: else it would wait for all that a GPU has to do
        values = torch.from_numpy(values)
        return values.pin_memory().to(images.device, non_blocking=True) if images.is_cuda else values

    def change(rows: np.ndarray, how: Callable[..., Tensor], *values: Tensor) -> None:
        if rows.any():
            for index in send(rows.nonzero()[0]).split(at_once):
                images.index_copy_(0, index, how(*(x.index_select(0, index) for x in (images, *values))))

    at_once = len(images) if images.is_cuda else 32  # as many as the cache of a CPU holds
    factors = send(colours.factor).view(-1, 4, 1, 1, 1).unbind(1)                       # B 1 1 1, four times
    adjustments = (lambda x, factor: (x * factor).clamp_(0, 1),                                       # brightness
                   lambda x, factor: torch.lerp(luma(x).mean((2, 3), True), x, factor).clamp_(0, 1),  # contrast
                   lambda x, factor: torch.lerp(luma(x), x, factor).clamp_(0, 1),                     # saturation
                   hue)
    for place in range(4):  # every image has its own order: at each place, every adjustment takes its images
        for number, adjust in enumerate(adjustments):
            change(colours.order[:, place] == number, adjust, factors[number])
    change(colours.grey, lambda x: luma(x).expand_as(x))
    change(colours.sigma > 0, gaussian_blur, send(colours.sigma).view(-1, 1, 1, 1))
    change(colours.solarize, lambda x: torch.minimum(x, 1 - x))  # inverts the levels 128 to 255
    return images


def luma(x: Tensor) -> Tensor:
    """B 3 h w -> B 1 h w, the weights of ITU-R 601."""
    return 0.299 * x[:, 0:1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:3]


def hue(x: Tensor, shift: Tensor) -> Tensor:
    """Turns the hue of HSV by `shift` turns; its value (the largest channel) and chroma (largest - smallest) stay."""
    r, g, b = x.split(1, dim=1)
    # The angle is |turns + (middle - low) / (6 chroma)|, with turns 0 for r >= g >= b, -1 for r >= b > g, -1/3 where g
    # is the largest and 2/3 where b is. By arithmetic, as where() would cost more than all the rest.
    high, low = torch.maximum(g, b), torch.minimum(g, b)
    top, middle = torch.maximum(r, high), torch.minimum(r, high)
    chroma = top - torch.minimum(middle, low)
    b_over_g, red_below = (b > g).to(x.dtype), (high > r).to(x.dtype)                         # B 1 h w, 0 or 1
    turns = red_below * (2 * b_over_g - 1 / 3) - b_over_g
    angle = (turns + (middle - low) / (6 * chroma).clamp_(min=1e-8)).abs_() + shift
    k = angle + 1 + (5 - 2 * torch.arange(3, device=x.device)).view(3, 1, 1) / 6              # B 3 h w
    k = k.frac_().mul_(6)  # a channel is lowest for a third of the circle, k from 1 to 3, and highest at 4 to 6
    return top - chroma * torch.minimum(k, 4 - k).clamp_(0, 1)


def gaussian_blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Blur with a deviation of its own for each image, sigma B 1 1 1 in pixels, the border repeated: one convolution
    along the columns and one along the rows, in which every channel of every image is a group."""
    reach = torch.arange(-8, 9, device=x.device)  # four deviations of 2
    kernels = (-0.5 * (reach / sigma.flatten(1)) ** 2).softmax(1).repeat_interleave(3, dim=0)  # 3B 17
    y = F.pad(x, (8, 8, 8, 8), mode="replicate").flatten(0, 1)                                # 3B h+16 w+16
    for kernel in (kernels.view(-1, 1, 17, 1), kernels.view(-1, 1, 1, 17)):
        y = F.conv2d(y, kernel, groups=len(kernels))
    return y.view(x.shape)


# -------------------------------------------------------------------- the recipe
from vit import (Run, Views, World, common_options, count, launch, load_init, open_images, parse, parts_of_batch,
                 random_crop, say, say_next, share, start, vit_options, within, write_file)

ALL = 10**6  # images that a process holds at once: its whole share, as every query meets the keys of the whole batch
RECIPES = {
    # MAE-Lite's ViT-Tiny (projects/mocov3/mocov3_exp.py); there warm-up starts at 1e-6, here at 0; crops are bilinear,
    # here bicubic; blur comes before grey. The official ViT-S and ViT-B (CONFIG.md of the official code) differ in
    # --model small or base, --epochs 300, --batch-size 4096 and --freeze-patch.
    "imagenet": dict(
        model="tiny", image_size=224, hidden=4096, projection=256, temperature=0.2, momentum=0.99, freeze_patch=False,
        crop_min=0.08, blur=2.0, mean=IMAGENET_MEAN, std=IMAGENET_STD,
        epochs=400, warmup_epochs=40, batch_size=1024, micro_batch=ALL, blr=1.5e-4, min_lr=0.0, weight_decay=0.1),
    # Ours: the network of this recipe of mae.py, so that the two can be compared; views, temperature and momentum are
    # as for ImageNet, but without blur, which at 32 pixels takes away what is to be recognised.
    "cifar": dict(
        model="tiny", image_size=36, patch_size=3, mlp_ratio=2.0, act="relu", qkv_bias=False, positions="learned",
        hidden=4096, projection=256, temperature=0.2, momentum=0.99, freeze_patch=False,
        crop_min=0.08, blur=0.0, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5),
        epochs=1000, warmup_epochs=40, batch_size=512, micro_batch=ALL, blr=3e-4, min_lr=0.0, weight_decay=0.1),
    # Ours: some three minutes on one CPU core.
    "demo": dict(
        model="demo", image_size=32, patch_size=8, hidden=256, projection=64, temperature=0.2, momentum=0.9,
        freeze_patch=False, crop_min=0.2, blur=0.0, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5),
        epochs=5.8, warmup_epochs=0.5, batch_size=128, micro_batch=ALL, blr=4e-3, min_lr=0.0, weight_decay=0.1),
}


def parse_args(argv: list[str] | None) -> Namespace:
    parser = common_options(__doc__, RECIPES)
    add = parser.add_argument_group("method").add_argument
    add("--temperature", type=within(1e-6, 1e6), help="tau: the smaller, the more the nearest keys dominate the loss")
    add("--momentum", type=share, help="m at the start, for the slow weights; it rises to 1 along half a cosine")
    add("--hidden", type=count, help="hidden width of projector and predictor")
    add("--projection", type=count, help="width of queries and keys")
    add("--freeze-patch", action=BooleanOptionalAction, help="leave the patch projection as it was drawn")
    add("--blur", type=within(0, 2), help="largest deviation of the Gaussian blur in pixels, up to 2; 0: no blur")
    return parse(parser, argv, RECIPES)


def build(args: Namespace) -> MoCo:
    """The model that the arguments describe, with weights drawn from --seed."""
    torch.manual_seed(args.seed)
    encoder = load_init(start_weights(ViT(**vit_options(args))), args)
    return MoCo(encoder, args.hidden, args.projection, args.temperature, args.freeze_patch)


def check_batch(args: Namespace, world: World) -> None:
    """Raises InputError unless each process can hold its share of a batch at once, and the batch has a statistic."""
    if parts_of_batch(args, world) > 1:
        raise InputError(f"--batch-size {args.batch_size}: every query meets the keys of the whole batch, so a process "
                         f"must hold its share at once: raise --micro-batch to {args.batch_size // world.size}, take "
                         "more processes, or lower --batch-size")
    if args.batch_size < 2:
        raise InputError(f"--batch-size {args.batch_size}: BatchNorm needs two images")


# -------------------------------------------------------------------- the run


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    world = start(args)
    images = open_images(args)
    check_batch(args, world)
    model = build(args).to(world.device)
    encoder = model.base_encoder
    # As in the official code, biases, norms and the class token decay, too; what gets no gradient stays as it is.
    groups = [dict(params=model.parameters(), lr_scale=1.0, weight_decay=args.weight_decay)]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), fused=True)
    run = Run("moco_v3", args, world, images, model, encoder, optimizer)
    wrapped, scaler = world.wrap(model, args.compile), run.scaler
    uniform_loss = torch.tensor(4 * args.temperature * math.log(args.batch_size), device=world.device)

    # In worker processes: two crops, mirrored or not, and 2 x 13 numbers in 0..1, all from (seed, epoch, image).
    views = Views(images, TwoViews(random_crop(encoder.image_size, args.crop_min)), args.seed, numbers=2 * NUMBERS)
    with run.batches(views) as batches:
        for step in run.steps(batches):
            pixels, numbers, _ = next(batches)                          # B 2 C h w in 0..1; on the host B 2*NUMBERS
            pair = recolour_views(pixels, numbers, args.blur)                           # B C h w each
            if world.rank == 0 and step == 1:
                save_pairs(pair, run.out / "views.png")
            # A tensor: --compile would make a plain number a part of the program, and compile it anew at every step.
            momentum = torch.full((), momentum_at((step - 1) / run.per_epoch, args.momentum, args.epochs),
                                  dtype=torch.float64, device=world.device)
            with world.autocast():
                losses = wrapped(*map(encoder.normalize, pair), momentum)
            scaler.scale(losses["loss"]).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            run.add(**losses, uniform_loss=uniform_loss, momentum=momentum)
    if world.rank == 0:
        say(f"{run.out}/views.png: pairs of views")
        say_next(args, f"{run.out}/encoder.pth")


def save_pairs(pair: list[Tensor], path: Path) -> None:
    """Writes 32 pairs of views: what the network is told to be the same."""
    try:
        picture = torch.stack([view[:32] for view in pair], dim=1).flatten(0, 1)
        write_file(partial(save_image, picture, format="png", pad_value=1.0), path)
    except InputError as error:  # no reason to end a training
        say(f"warning: {error}")


if __name__ == "__main__":
    launch(main)

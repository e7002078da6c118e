"""Classification with a Vision Transformer: fine-tuning, linear probe, k-NN, training from scratch, evaluation.

    fine-tune   all weights are trained; block i, from 0, at lr * decay^(depth - i): low layers change the least
    linear      frozen encoder, y = W BatchNorm(features); W by LARS (MAE's main_linprobe.py)
    knn         no training: the 20 nearest training images vote, each with weight exp(cosine / 0.07)

Fine-tuning recipes: MAE-Lite's for tiny and small (arXiv 2205.14443: the less regularisation, the better for a small
network), MAE's for base, large and huge (arXiv 2111.06377, FINETUNE.md), transfer to small data sets (MAE-Lite),
small images, and the demo. The accuracy after the last epoch is the result; log.jsonl has the others.

Run    python finetune.py --init runs/mae-demo/encoder.pth                  after python mae.py
       python finetune.py                                                   the same from scratch
       torchrun --standalone --nproc_per_node=8 finetune.py --data /imagenet --init runs/mae-imagenet/encoder.pth
       python finetune.py --data /imagenet --init encoder.pth --protocol linear --batch-size 2048    or: knn
       python finetune.py --data /imagenet --init runs/finetune-imagenet/model.pth --eval
Use    from finetune import LARS, knn_hits                              copy this file and vit.py
Letters in shape comments: B images, C channels, D width, K classes, M training images
"""
from argparse import Namespace
from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from vit import (COMMON_OPTIONS, COUNT, IMAGENET_MEAN, IMAGENET_STD, NOT_NEGATIVE, SHARE, SIZES, Batches, Images,
                 InputError, Log, View, ViT, World, apply_recipe, autocast, balanced, cosine, encoder_options,
                 evaluate, gradients_shared, in_order, launch, load_checkpoint, load_encoder, mixing, normalizer,
                 open_images, open_run, param_groups, parse_args, parts_of_batch, print_result, random_erasing,
                 read_encoder, recipe_for, reseed, save_checkpoint, say, sent, set_lr, start_processes,
                 vit_options, wrap, write_file)

# -------------------------------------------------------------------- the method


def probe_head(width: int, classes: int) -> nn.Sequential:
    """What the linear probe trains: BatchNorm without scale and shift, then a linear layer."""
    linear = nn.Linear(width, classes)
    nn.init.normal_(linear.weight, std=0.01)
    nn.init.zeros_(linear.bias)
    return nn.Sequential(nn.BatchNorm1d(width, affine=False, eps=1e-6), linear)


class LARS(torch.optim.Optimizer):
    """Momentum SGD with layer-wise trust ratios (You et al., arXiv 1708.03888), for the linear probe.

    For matrices g <- g + weight_decay * p, then g <- g * trust * |p| / |g|; vectors get neither.
    Then m <- momentum * m + g, p <- p - lr * m.
    """

    def __init__(self, parameters, lr: float = 0.0, momentum: float = 0.9, trust: float = 0.001):
        super().__init__(parameters, dict(lr=lr, momentum=momentum, trust=trust, weight_decay=0.0))

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                g = p.grad
                if p.ndim > 1:
                    g = g + group["weight_decay"] * p
                    ratio = group["trust"] * p.norm() / g.norm()
                    g = g * torch.where((p.norm() > 0) & (g.norm() > 0), ratio, torch.ones_like(ratio))
                m = self.state[p].setdefault("momentum", torch.zeros_like(p))
                p.add_(m.mul_(group["momentum"]).add_(g), alpha=-group["lr"])


def knn_hits(features: Tensor, labels: Tensor, bank: Tensor, bank_labels: Tensor, classes: int, k: int = 20,
                 temperature: float = 0.07) -> Tensor:
    """Number of queries whose class the k nearest entries of the bank vote for, each with weight exp(cosine / T).

    features B D, labels B, bank M D, bank_labels M; the weights are those of Wu et al., arXiv 1805.01978.
    """
    similarity = F.normalize(features, dim=1) @ F.normalize(bank, dim=1).T              # B M
    weight, nearest = similarity.topk(min(k, len(bank)), dim=1)                         # B k
    votes = torch.zeros(len(features), classes, device=features.device)
    votes.scatter_add_(1, bank_labels[nearest], (weight / temperature).exp())           # B K
    return (votes.argmax(1) == labels).sum()


# -------------------------------------------------------------------- the recipe

# MAE-Lite's improved recipe (projects/eval_tools/finetuning_exp.py); layer decay 0.75 for small (SMALL.md).
LIGHT = dict(
    model="tiny", image_size=224, mean=IMAGENET_MEAN, std=IMAGENET_STD, optimizer="adamw", pool="mean",
    epochs=300, warmup_epochs=5, batch_size=1024, micro_batch=256, blr=1e-3, min_lr=1e-6, weight_decay=0.05,
    layer_decay=0.85, drop_path=0.0, clip_grad=0.0, smoothing=0.0, mixup=0.2, cutmix=0.0, erasing=0.0, randaugment=10.0,
    crop_min=0.08, centre=0.875, eval_every=1)
# MAE's (FINETUNE.md and the arguments of main_finetune.py).
FULL = dict(LIGHT, model="base", epochs=100, blr=5e-4, layer_decay=0.65, drop_path=0.1, smoothing=0.1, mixup=0.8,
            cutmix=1.0, erasing=0.25, randaugment=9.0)
# MAE's linear probe (main_linprobe.py). 16,384 images a batch need eight processes: on one give --batch-size 2048.
PROBE = dict(LIGHT, optimizer="lars", pool="cls", epochs=90, warmup_epochs=10, batch_size=16384, micro_batch=2048,
             blr=0.1, min_lr=0.0, weight_decay=0.0, layer_decay=1.0, mixup=0.0, randaugment=0.0)
# For arXiv 2402.03752's small images. The paper's fine-tuning is not known to us: these are our choices.
CIFAR = dict(
    model="tiny", image_size=36, patch_size=3, mlp_ratio=2.0, act="relu", qkv_bias=False, positions="learned",
    mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), optimizer="adamw", pool="mean",
    epochs=200, warmup_epochs=10, batch_size=512, micro_batch=512, blr=1e-3, min_lr=1e-6, weight_decay=0.05,
    layer_decay=0.75, drop_path=0.1, clip_grad=0.0, smoothing=0.1, mixup=0.8, cutmix=1.0, erasing=0.0, randaugment=9.0,
    crop_min=0.8, centre=1.0, eval_every=10)
# Ours: few labels, seconds on two CPU cores.
DEMO = dict(
    model="demo", image_size=32, patch_size=4, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), optimizer="adamw",
    pool="mean", labels=500, epochs=30, warmup_epochs=2, batch_size=32, micro_batch=256, blr=8e-3, min_lr=1e-6,
    weight_decay=0.05,
    layer_decay=0.75, drop_path=0.0, clip_grad=0.0, smoothing=0.1, mixup=0.0, cutmix=0.0, erasing=0.0, randaugment=0.0,
    crop_min=0.6, centre=1.0, eval_every=10)
RECIPES = {
    "imagenet": LIGHT,
    "imagenet-small": dict(LIGHT, model="small", layer_decay=0.75),
    "imagenet-base": FULL,
    "imagenet-large": dict(FULL, model="large", epochs=50, blr=1e-3, layer_decay=0.75, drop_path=0.2),
    "imagenet-huge": dict(FULL, model="huge", epochs=50, blr=1e-3, layer_decay=0.75, drop_path=0.3),
    # MAE-Lite's CIFAR-100 transfer (scripts/transfer.sh): SGD, learning rate 0.1 at 512, no regularisation at all.
    "transfer": dict(LIGHT, optimizer="sgd", epochs=50, warmup_epochs=10, batch_size=512, blr=0.05, weight_decay=0.0,
                     layer_decay=0.75, clip_grad=1.0, mixup=0.0, randaugment=0.0),
    "cifar": CIFAR,
    "demo": DEMO,
    "imagenet-linear": PROBE,
    # Ours, after MAE's.
    "cifar-linear": dict(CIFAR, **{name: PROBE[name] for name in ("optimizer", "pool", "blr", "min_lr", "weight_decay",
                         "layer_decay", "mixup", "cutmix", "randaugment")}, epochs=50, drop_path=0.0, smoothing=0.0),
    "demo-linear": dict(DEMO, **{name: PROBE[name] for name in ("optimizer", "pool", "min_lr", "weight_decay",
                        "layer_decay")}, blr=2.0, smoothing=0.0, batch_size=100),
}
OPTIONS = {
    "method": {
        "protocol": (str, ("finetune", "linear", "knn"), "finetune, linear or knn [finetune]"),
        "init": (str, None, "weights: encoder.pth of any of the scripts, or an official file; without: from scratch"),
        "eval": (bool, None, "evaluate the classifier in --init, and nothing else"),
        "labels": (int, COUNT, "labelled training images in total, balanced over the classes; else all"),
        "reuse": (int, NOT_NEGATIVE, "use only so many pre-trained blocks, from the first; the rest start afresh"),
        "pool": (str, ("cls", "mean"), "features: cls (class token) or mean (of the patches)"),
        "eval_every": (int, COUNT, "epochs between evaluations"),
    },
    "optimisation": {
        "optimizer": (str, ("adamw", "sgd", "lars"), "adamw, sgd (Nesterov momentum 0.9) or lars"),
        "layer_decay": (float, SHARE, "factor of the learning rate from block to block downwards; from scratch 1"),
        "clip_grad": (float, NOT_NEGATIVE, "maximum gradient norm; 0: no clipping"),
    },
    "regularisation": {
        "drop_path": (float, SHARE, "rate of stochastic depth in the last block, growing from 0"),
        "smoothing": (float, SHARE, "of the labels"),
        "mixup": (float, NOT_NEGATIVE, "alpha of MixUp; 0: none"),
        "cutmix": (float, NOT_NEGATIVE, "alpha of CutMix; 0: none"),
        "erasing": (float, SHARE, "probability of random erasing"),
        "randaugment": (float, (0, 10), "magnitude of timm's RandAugment, 0 to 10; 0: none"),
        "crop_min": (float, SHARE, "smallest share of an image's area in a random crop"),
        "centre": (float, (0.01, 1), "share of the shorter side that is seen in evaluation"),
    },
}


def choose_recipe(args: Namespace, images: Images, weights: tuple[dict, dict] | None) -> str:
    """The recipe for the data, the protocol and, where the image is large, the size of the network."""
    name = recipe_for(args, images)
    if args.protocol == "linear":
        return name if name.endswith("-linear") else f"{name.split('-')[0].replace('transfer', 'imagenet')}-linear"
    if args.recipe is None and name == "imagenet":
        width = weights[1]["width"] if weights else SIZES[args.model or "tiny"]["width"]
        sizes = {SIZES[size]["width"]: f"imagenet-{size}" for size in ("small", "base", "large", "huge")}
        return sizes.get(width, name)
    return name


def build(args: Namespace, weights: tuple[dict, dict] | None, classes: int) -> tuple[ViT, list[str]]:
    """The classifier, and the names of its parameters that start afresh. weights: from `read_encoder`, or None."""
    torch.manual_seed(args.seed)
    model, fresh = from_scratch(args, classes) if weights is None else pretrained(args, *weights, classes)
    model.pos_embed.requires_grad_(True)  # here sin-cos positions are only the initial values (MAE, timm)
    if args.protocol == "linear":
        model.requires_grad_(False)
        model.head = probe_head(model.width, classes)
    elif weights is not None:
        nn.init.normal_(model.head.weight, std=2e-5)  # MAE: the new head hardly disturbs the encoder at first
    return model, fresh


def from_scratch(args: Namespace, classes: int) -> tuple[ViT, list[str]]:
    """A new network, its weights N(0, 0.02) as in DeiT and timm."""
    model = ViT(**vit_options(args), pool=args.pool, classes=classes, drop_path=args.drop_path)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
    return model, ["everything"]


def pretrained(args: Namespace, state: dict, config: dict, classes: int) -> tuple[ViT, list[str]]:
    """The network of a file with its weights, but for the head and the blocks from --reuse on."""
    frozen = args.protocol != "finetune"
    state = {name: value for name, value in state.items() if not name.startswith("head.") and reused(name, args.reuse)}
    if frozen and args.pool == "mean" and "norm.weight" in state:  # nothing could train a fresh fc_norm
        state.update({f"fc_norm.{name}": state[f"norm.{name}"] for name in ("weight", "bias")})
    # TinyMIM gives the last block the teacher's heads in pre-training only (its models_vit.py).
    size = encoder_options(config, image_size=args.image_size, last_heads=config["last_heads"] if frozen else None)
    model = ViT(**size, pool=args.pool, classes=classes, drop_path=args.drop_path)
    blocks = [f"blocks.{i}." for i in range(model.depth) if not reused(f"blocks.{i}.", args.reuse)]
    return model, load_encoder(model, state, config, fresh=("head.", *blocks))


def reused(name: str, blocks: int | None) -> bool:
    """Whether a pre-trained weight is taken, where only the first `blocks` blocks are (MAE-Lite's study of layers)."""
    return blocks is None or not name.startswith("blocks.") or int(name.split(".")[1]) < blocks


def make_optimizer(model: ViT, args: Namespace, lr: float) -> torch.optim.Optimizer:
    groups = param_groups(model, args.weight_decay, ("cls_token", "pos_embed"), args.layer_decay)
    if args.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr, betas=(0.9, 0.999), fused=args.device == "cuda")
    if args.optimizer == "sgd":
        return torch.optim.SGD(groups, lr, momentum=0.9, nesterov=True)
    return LARS(groups, lr)


# -------------------------------------------------------------------- the run


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv, __doc__, RECIPES, OPTIONS)
    args.protocol = args.protocol or "finetune"
    check(args)
    world = start_processes(args)
    weights = read_encoder(args.init, args.heads) if args.init else None
    if weights:
        if "dist_token" in weights[0]:
            raise InputError(f"--init {args.init} has a distillation token: g2sd.py --stage specific --eval takes it")
        agree(args, weights[1])
        args.image_size = args.image_size or weights[1]["image_size"]
        args.mean, args.std = weights[1]["mean"], weights[1]["std"]
        if args.centre is None and max(np.atleast_1d(args.image_size)) > 224:
            args.centre = 1.0  # as timm sees larger images whole
    val = open_images(args, "val", labels=True)
    if args.eval:
        apply_recipe(args, choose_recipe(args, val, weights), RECIPES)
        model = load_classifier(args, *weights, val).to(world.device)
        normalize = normalizer(args.mean, args.std, world.device)
        print_result(evaluate(model, val, View(model.image_size, centre=args.centre), normalize, args, world), world)
        return
    images = open_images(args, "train", labels=True)
    recipe = choose_recipe(args, images, weights)
    if weights is None and args.layer_decay is None:
        args.layer_decay = 1.0  # there is nothing to protect in the lower layers
    apply_recipe(args, recipe, RECIPES)
    if args.labels:
        images = balanced(images, args.labels, args.seed)
    model, fresh = build(args, weights, len(images.classes))
    config = dict(model.config, mean=list(args.mean), std=list(args.std))
    normalize = normalizer(args.mean, args.std, world.device)
    view = View(model.image_size, (args.crop_min, 1.0), randaugment=args.randaugment)
    centre = View(model.image_size, centre=args.centre)
    if args.protocol == "knn":
        print_result(knn(model, images, val, centre, normalize, args, world), world)
        return

    out, checkpoint = open_run(args, "finetune")
    wrapped = wrap(model, args, world)
    parts, steps = parts_of_batch(args, world), len(images) // args.batch_size
    if args.protocol == "linear" and parts > 1:
        raise InputError(f"--batch-size {args.batch_size}: BatchNorm needs the whole share of a process at once; "
                         f"give {args.micro_batch * world.size} or less, or raise --micro-batch to "
                         f"{args.batch_size // world.size}")
    last, lr = round(args.epochs * steps), args.blr * args.batch_size / 256
    optimizer = make_optimizer(model, args, lr)
    scaler = torch.amp.GradScaler(args.device, enabled=args.precision == "fp16")
    first = load_checkpoint(checkpoint, model, optimizer, scaler) if checkpoint else 0
    mix = mixing(args.mixup, args.cutmix, len(images.classes))
    loader = Batches(images, view, args, world, first, last)
    log = Log(args, out, world, loader)
    if world.main:
        say(f"{args.protocol}, recipe {recipe}: {len(images)} images of {len(images.classes)} classes, {last} steps of"
              f" {args.batch_size}, learning rate {lr:.3g}, {args.precision} on {world.size} x {args.device} -> {out}\n"
              f"not pre-trained: {', '.join(fresh)}")

    def save(step: int) -> None:
        save_checkpoint(out, "finetune", step, model, config, optimizer, scaler, args)
        write_file(dict(model=model.state_dict(), config=config), out / "model.pth")

    step = first
    for step in range(first + 1, last + 1):
        set_lr(optimizer, rate := cosine((step - 1) / steps, lr, args.min_lr, args.warmup_epochs, args.epochs))
        total = 0.0
        for part in range(1, parts + 1):
            pixels, index = next(loader)
            labels = sent(images.labels[index], world.device)
            reseed(args.seed, step, world.rank, part)  # for mixing, erasing and stochastic depth
            pixels = normalize(pixels)                                                  # B C h w
            if args.erasing:
                pixels = random_erasing(pixels, args.erasing)
            if mix:
                pixels, labels = mix(pixels, labels)                                    # labels become B K
            with gradients_shared(wrapped, now=part == parts):
                with autocast(args):
                    logits = wrapped(pixels)                                            # B K
                loss = F.cross_entropy(logits.float(), labels, label_smoothing=args.smoothing) / parts
                scaler.scale(loss).backward()
            total = total + loss.detach()
        if args.clip_grad:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

        if log.step(step, rate, loss=total):
            break
        if log.save_due():
            save(step)
        if step % (steps * args.eval_every) == 0 and step < last:
            log.flush()
            if world.main:
                save(step)  # an evaluation may take long, or meet an image that cannot be read
            log.write(dict(step=step, **evaluate(model, val, centre, normalize, args, world)))
    log.finish(save, step)  # a run stopped by a signal ends here
    result = evaluate(model, val, centre, normalize, args, world)
    log.write(dict(step=step, **result))
    print_result(result, world)


def check(args: Namespace) -> None:
    """Raises InputError for options that need another one."""
    if args.init is None and (args.eval or args.reuse is not None or args.protocol != "finetune"):
        raise InputError("--eval, --reuse, --protocol linear and knn need --init, the file with the weights")


def agree(args: Namespace, config: dict) -> None:
    """Raises InputError if a flag asks for another network than the one in the file."""
    if args.model is not None and SIZES[args.model]["width"] != config["width"]:
        raise InputError(f"--model {args.model}: the network in --init is {config['width']} wide")
    for name in COMMON_OPTIONS["model"]:
        if name not in ("model", "image_size") and getattr(args, name) not in (None, config[name]):
            flag = f"--{name.replace('_', '-')} {getattr(args, name)}"
            raise InputError(f"{flag}: the network in --init has {config[name]}")


def load_classifier(args: Namespace, state: dict, config: dict, images: Images) -> ViT:
    """A classifier that this script wrote, or an official one. Raises InputError if its classes are not the data's."""
    if config["classes"] != len(images.classes):
        raise InputError(f"--init {args.init} knows {config['classes']} classes, --data {args.data} has "
                         f"{len(images.classes)}")
    size = encoder_options(config, image_size=args.image_size, pool=config["pool"], classes=config["classes"])
    model = ViT(**size)
    if "head.1.weight" in state:
        model.head = probe_head(model.width, config["classes"])
    load_encoder(model, state, config, fresh=())
    return model


@torch.no_grad()
def features_of(model: ViT, images: Images, view: View, normalize: Callable, args: Namespace,
                world: World) -> tuple[Tensor, Tensor]:
    """Features M D and labels M of this process's share of the images."""
    features = [torch.empty(0, model.width, device=world.device)]
    labels = [torch.empty(0, dtype=torch.int64, device=world.device)]  # a share may be empty
    for pixels, index in in_order(images, view, args, world):
        with autocast(args):
            features.append(model.features(normalize(pixels)).float())
        labels.append(sent(images.labels[index], world.device))
    return torch.cat(features), torch.cat(labels)


def knn(model: ViT, images: Images, val: Images, view: View, normalize: Callable, args: Namespace,
        world: World) -> dict[str, float]:
    """Accuracy in % on `val`, each image counted once on any number of processes, with `images` as the bank."""
    model.to(world.device).eval()
    shares = features_of(model, images, view, normalize, args, world)
    bank, bank_labels = (gathered(share, len(images), world) for share in shares)
    features, labels = features_of(model, val, view, normalize, args, world)
    hits = sum(knn_hits(f, l, bank, bank_labels, len(images.classes))
               for f, l in zip(features.split(256), labels.split(256), strict=True))
    return dict(top1=100 * world.sum(hits.double()).item() / len(val), val_images=len(val))


def gathered(share: Tensor, total: int, world: World) -> Tensor:
    """The rows of all processes, in the order of the images. Shares differ by at most one row; shorter ones are
    padded for the exchange."""
    if world.size == 1:
        return share
    most = -(-total // world.size)
    padded = torch.cat([share, share.new_zeros(most - len(share), *share.shape[1:])])
    every = padded.new_empty(world.size * most, *padded.shape[1:])
    dist.all_gather_into_tensor(every, padded)
    return every.unflatten(0, (world.size, most)).transpose(0, 1).flatten(0, 1)[:total]  # in the order of the images


if __name__ == "__main__":
    launch(main)

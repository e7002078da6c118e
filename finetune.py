"""Classification with a Vision Transformer: fine-tuning, linear probe, k-NN, training from scratch, evaluation.

    fine-tune   all weights are trained by cross-entropy; block i, from 0, at lr * decay^(depth - i), the embeddings at
                lr * decay^(depth + 1), head and last norm at lr: low layers change the least
    linear      frozen encoder, y = W BatchNorm(features) + b; W and b by LARS (MAE's main_linprobe.py)
    knn         no training: the 20 nearest training images vote, each with weight exp(cosine / 0.07)

Fine-tuning recipes: MAE-Lite's for tiny and small (arXiv 2205.14443: less mixing, smoothing and erasing, and no drop
path, for a small network), MAE's for base, large and huge (arXiv 2111.06377, FINETUNE.md), transfer to small data sets
(MAE-Lite), small images, and the demo. The accuracy after the last epoch is the result; log.jsonl has the others.

Run    python finetune.py --init runs/mae-demo/encoder.pth                  after python mae.py
       python finetune.py --out runs/scratch                                the same from scratch
       torchrun --standalone --nproc_per_node=8 finetune.py --data /imagenet --init runs/mae-imagenet/encoder.pth
       python finetune.py --data /imagenet --init encoder.pth --protocol linear --batch-size 2048    or: knn
       python finetune.py --data /imagenet --init runs/finetune-imagenet/model.pth --eval
       python finetune.py --init runs/finetune-imagenet/model.pth --predict photos > table.tsv
Writes model.pth (the classifier, its config, the names of its classes) and last.pth (all that --resume needs),
       log.jsonl, args.json. The result is on stdout; --eval, --predict and knn write nothing else.
Use    from finetune import LARS, knn_hits                              copy this file and vit.py
Letters in shape comments: B images, C channels, D width, K classes, M training images
"""
import math
import os
from argparse import Namespace
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import v2

from vit import IMAGENET_MEAN, IMAGENET_STD, SIZES, BatchNorm, InputError, ViT, load_encoder, param_groups, read_encoder

# -------------------------------------------------------------------- the method


def probe_head(width: int, classes: int) -> nn.Sequential:
    """What the linear probe trains: BatchNorm without scale and shift, then a linear layer."""
    linear = nn.Linear(width, classes)
    nn.init.normal_(linear.weight, std=0.01)
    nn.init.zeros_(linear.bias)
    return nn.Sequential(BatchNorm(width, affine=False, eps=1e-6), linear)


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


class ProbeCrop(v2.RandomResizedCrop):
    """The crop of MAE's linear probe (util/crop.py): area and aspect are drawn once, and cut to the image. torchvision
    draws again until they fit into it, which gives smaller crops: 0.43 of a 4:3 image instead of 0.52."""

    def make_params(self, flat_inputs: list) -> dict[str, int]:
        height, width = v2.functional.get_size(flat_inputs[0])
        area = height * width * torch.empty(()).uniform_(*self.scale).item()
        aspect = math.exp(torch.empty(()).uniform_(*map(math.log, self.ratio)).item())
        h, w = min(round((area / aspect) ** 0.5), height), min(round((area * aspect) ** 0.5), width)
        top, left = (torch.randint(room + 1, ()).item() for room in (height - h, width - w))
        return dict(top=top, left=left, height=h, width=w)


def start_afresh(module: nn.Module) -> None:
    """For `apply`: the start of a network without pre-training, as in DeiT and timm. Linear weights are N(0, 0.02), the
    patch projection is as torch draws any convolution; so MAE's Xavier goes."""
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Conv2d):
        module.reset_parameters()


def trained_part(state: dict, config: dict) -> tuple[dict, dict]:
    """Weights and config without a last block of which nothing beyond the queries, keys and values was ever trained, as
    TinyMIM leaves it: its biases are still exactly zero. Frozen features are those that enter it."""
    first, last = "blocks.0.", f"blocks.{config['depth'] - 1}."
    if state[last + "mlp.fc1.bias"].any() or not state[first + "mlp.fc1.bias"].any():
        return state, config
    state = {name: value for name, value in state.items() if not name.startswith(last)}
    return state, dict(config, depth=config["depth"] - 1, last_heads=config["heads"])


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
from vit import (STEP, CentreCrop, Images, RandomCrop, Run, Views, World, amount, balanced, classes_of, common_options,
                 complete, count, default_recipe, evaluate, in_order, launch, mixing, on_command_line, open_folder,
                 open_images, print_result, random_crop, random_erasing, share, start, take_over, torch_seed,
                 vit_options, within)

# MAE-Lite's improved recipe (projects/eval_tools/finetuning_exp.py); layer decay 0.75 for small (SMALL.md).
LIGHT = dict(
    model="tiny", image_size=224, mean=IMAGENET_MEAN, std=IMAGENET_STD, optimizer="adamw", pool="mean",
    epochs=300, warmup_epochs=5, batch_size=1024, blr=1e-3, min_lr=1e-6, weight_decay=0.05,
    layer_decay=0.85, drop_path=0.0, clip_grad=0.0, smoothing=0.0, mixup=0.2, cutmix=0.0, erasing=0.0, randaugment=10.0,
    crop_min=0.08, centre=0.875, eval_every=1)
# MAE's (FINETUNE.md and the arguments of main_finetune.py).
FULL = dict(LIGHT, model="base", epochs=100, blr=5e-4, layer_decay=0.65, drop_path=0.1, smoothing=0.1, mixup=0.8,
            cutmix=1.0, erasing=0.25, randaugment=9.0)
# What MAE's linear probe changes (main_linprobe.py).
PROBE = dict(micro_batch=2048, optimizer="lars", pool="cls", blr=0.1, min_lr=0.0, weight_decay=0.0, layer_decay=1.0,
             drop_path=0.0, smoothing=0.0, mixup=0.0, cutmix=0.0, randaugment=0.0)
# For arXiv 2402.03752's small images, classified by the class token (its "dummy patch"). The rest of the paper's
# fine-tuning is not known to us: these are our choices.
CIFAR = dict(
    model="tiny", image_size=36, patch_size=3, mlp_ratio=2.0, act="relu", qkv_bias=False, positions="learned",
    mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), optimizer="adamw", pool="cls",
    epochs=200, warmup_epochs=10, batch_size=512, blr=1e-3, min_lr=1e-6, weight_decay=0.05,
    layer_decay=0.75, drop_path=0.1, clip_grad=0.0, smoothing=0.1, mixup=0.8, cutmix=1.0, erasing=0.0, randaugment=9.0,
    crop_min=0.8, centre=1.0, eval_every=10)
# Ours: few labels, half a minute on one CPU core.
DEMO = dict(
    model="demo", image_size=32, patch_size=4, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), optimizer="adamw",
    pool="mean", labels=500, epochs=50, warmup_epochs=2, batch_size=32, blr=8e-3, min_lr=1e-6,
    weight_decay=0.05, layer_decay=0.75, drop_path=0.0, clip_grad=0.0, smoothing=0.1, mixup=0.0, cutmix=0.0,
    erasing=0.0, randaugment=0.0, crop_min=0.6, centre=1.0, eval_every=10)
RECIPES = {
    "imagenet": LIGHT,
    "imagenet-small": dict(LIGHT, model="small", layer_decay=0.75),
    "imagenet-base": FULL,
    "imagenet-large": dict(FULL, model="large", epochs=50, blr=1e-3, layer_decay=0.75, drop_path=0.2),
    "imagenet-huge": dict(FULL, model="huge", epochs=50, blr=1e-3, layer_decay=0.75, drop_path=0.3),
    # MAE-Lite's CIFAR-100 transfer (scripts/transfer.sh): SGD, learning rate 0.1 at 512, no weight decay, no mixing.
    "transfer": dict(LIGHT, optimizer="sgd", epochs=50, warmup_epochs=10, batch_size=512, blr=0.05, weight_decay=0.0,
                     layer_decay=0.75, clip_grad=1.0, mixup=0.0, randaugment=0.0),
    "cifar": CIFAR,
    "demo": DEMO,
    # MAE's. 16,384 images a batch need eight processes: on one give --batch-size 2048.
    "imagenet-linear": dict(LIGHT | PROBE, epochs=90, warmup_epochs=10, batch_size=16384),
    # Ours, after MAE's.
    "cifar-linear": dict(CIFAR | PROBE, epochs=50),
    "demo-linear": dict(DEMO | PROBE, blr=2.0, batch_size=100),
}
# What "imagenet" means for a network of this width, where no --recipe is given.
OF_WIDTH = {384: "imagenet-small", 768: "imagenet-base", 1024: "imagenet-large", 1280: "imagenet-huge"}


def parse_args(argv: list[str] | None) -> tuple[Namespace, tuple[dict, dict] | None]:
    """The command line, and what `read_encoder` gives for --init, or None. What is on neither the command line nor in
    the file comes from the recipe. Raises InputError for options that need another, or contradict the file."""
    parser = common_options(__doc__, RECIPES)
    add = parser.add_argument_group("method").add_argument
    add("--protocol", choices=["finetune", "linear", "knn"], help="what is trained; else finetune, or as --recipe says")
    add("--eval", action="store_true", help="evaluate the classifier in --init, and nothing else")
    add("--by-class", action="store_true", help="with --eval: the accuracy of each class, too")
    add("--predict", metavar="DIR", help="print file, class and its probability for all images below a folder, by the "
        "classifier in --init")
    add("--labels", type=count, help="labelled training images in total, balanced over the classes; else all")
    add("--reuse", type=within(0, kind=int), help="use only so many pre-trained blocks; the rest start afresh")
    add("--pool", choices=["cls", "mean"], help="features: cls (class token) or mean (of the patches)")
    add("--eval-every", type=count, help="epochs between evaluations")
    add("--optimizer", choices=["adamw", "sgd", "lars"], help="sgd: with Nesterov momentum 0.9")
    add("--layer-decay", type=share, help="factor of the learning rate from block to block downwards; from scratch 1")
    add("--clip-grad", type=amount, help="maximum gradient norm; 0: no clipping")
    add = parser.add_argument_group("regularisation").add_argument
    add("--drop-path", type=share, help="rate of stochastic depth in the last block, growing from 0")
    add("--smoothing", type=share, help="of the labels")
    add("--mixup", type=amount, help="alpha of MixUp; 0: none")
    add("--cutmix", type=amount, help="alpha of CutMix; 0: none")
    add("--erasing", type=share, help="probability of random erasing")
    add("--randaugment", type=within(0, 10), help="magnitude of timm's RandAugment, 0 to 10; 0: none")
    add("--centre", type=within(0.01, 1), help="share of the shorter side that is seen in evaluation")
    given = on_command_line(parser, argv)
    given.protocol = given.protocol or ("linear" if str(given.recipe).endswith("-linear") else "finetune")
    trained = given.protocol == "finetune" and not (given.eval or given.predict)
    weights = None if given.init is None else read_encoder(given.init, given.heads, other_heads=trained)
    recipe = choose_recipe(given, SIZES[given.model or "tiny"]["width"] if weights is None else weights[1]["width"])
    parser.set_defaults(**RECIPES[recipe], protocol=given.protocol)
    if weights is None:  # as DeiT and timm. Which layer decay MAE-Lite's own 75.8 % had is not documented
        parser.set_defaults(layer_decay=1.0, positions="learned")
    else:
        if "dist_token" in weights[0]:
            raise InputError(f"--init {given.init} has a distillation token: g2sd.py --stage specific --eval takes it")
        take_over(parser, given, {**weights[1], "heads": given.heads or weights[1]["heads"]})
        if (given.reuse or 0) > weights[1]["depth"]:
            raise InputError(f"--reuse {given.reuse}: {given.init} has {weights[1]['depth']} blocks")
    if np.max(given.image_size or parser.get_default("image_size")) > 224:
        parser.set_defaults(centre=1.0)  # as MAE sees larger images whole (util/datasets.py)
    args = complete(parser, argv, recipe)
    if weights is None and (args.eval or args.predict or args.reuse is not None or args.protocol != "finetune"):
        raise InputError("--eval, --predict, --reuse, --protocol linear and knn need --init, the file with the weights")
    if args.by_class and not args.eval or args.eval and args.predict:
        raise InputError("--by-class needs --eval, which goes without --predict")
    if (given.labels or args.resume) and (args.eval or args.predict):
        raise InputError("--labels is for training and k-NN, --resume for training")
    return args, weights


def choose_recipe(given: Namespace, width: int) -> str:
    """Name of the recipe, by the data, the protocol and, where images are large, the width of the network."""
    name = default_recipe(given)
    if given.protocol == "linear":
        linear = f"{name.split('-')[0]}-linear"
        return linear if linear in RECIPES else "imagenet-linear"
    return OF_WIDTH.get(width, name) if given.recipe is None and name == "imagenet" else name


def build(args: Namespace, weights: tuple[dict, dict] | None, classes: int) -> tuple[ViT, list[str]]:
    """The classifier, and what of it is not as in pre-training. weights: from `read_encoder`, or None."""
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
    model = ViT(**vit_options(args), pool=args.pool, classes=classes, drop_path=args.drop_path)
    return model.apply(start_afresh), ["from scratch"]


def pretrained(args: Namespace, state: dict, config: dict, classes: int) -> tuple[ViT, list[str]]:
    """The network of a file with its weights, but for the head and the blocks from --reuse on (MAE-Lite's study)."""
    frozen, changes = args.protocol != "finetune", []
    if frozen and (cut := trained_part(state, config))[1]["depth"] < config["depth"]:
        (state, config), changes = cut, ["without the last block, which was never trained"]
    if args.heads != config["heads"]:
        changes.append(f"{args.heads} heads in place of {config['heads']}")
    # TinyMIM gives the last block the teacher's heads in pre-training only (its models_vit.py).
    last_heads = config["last_heads"] if frozen else None
    model = ViT(**dict(config, image_size=args.image_size, heads=args.heads, last_heads=last_heads, pool=args.pool,
                       classes=classes, drop_path=args.drop_path))
    kept = model.depth if args.reuse is None else args.reuse
    model.blocks[kept:].apply(start_afresh)
    new = ("head.", *(f"blocks.{i}." for i in range(kept, model.depth)))
    state = {name: value for name, value in state.items() if not name.startswith(new)}
    if frozen and args.pool == "mean" and "norm.weight" in state:  # nothing could train a fresh fc_norm
        state.update({f"fc_norm.{name}": state[f"norm.{name}"] for name in ("weight", "bias")})
    fresh = dict.fromkeys(name.split(".")[0] for name in load_encoder(model, state, config, new))
    names = {"blocks": f"blocks from {kept + 1} on"}
    changes += [f"new {names.get(name, name)}" for name in fresh if name != "head" or args.protocol != "knn"]
    return model, changes or ["as it was pre-trained"]


def make_optimizer(model: ViT, args: Namespace) -> torch.optim.Optimizer:
    groups = param_groups(model, args.weight_decay, ("cls_token", "pos_embed"), args.layer_decay)
    if args.optimizer == "adamw":
        return torch.optim.AdamW(groups, betas=(0.9, 0.999), fused=True)
    if args.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=0.9, nesterov=True, fused=True)
    return LARS(groups)


# -------------------------------------------------------------------- the run


def main(argv: list[str] | None = None) -> None:
    args, weights = parse_args(argv)
    world = start(args)
    if args.predict:
        return predict(args, *weights, world)
    val = open_images(args, "val", labels=True)
    if args.eval:
        classes_of(args.init, weights[1], val.classes)
        model = load_classifier(args, *weights).to(world.device)
        centre = CentreCrop(model.image_size, args.centre)
        return print_result(evaluate(model, val, centre, args, world, args.by_class), world)
    images = open_images(args, "train", labels=True)
    if args.labels:
        images = balanced(images, args.labels, args.seed)
    model, changes = build(args, weights, len(images.classes))
    model.to(world.device)
    told = f"{args.protocol} of {len(images.classes)} classes: {', '.join(changes)}"
    if args.protocol == "knn":
        world.say(told)
        return print_result(knn(model, images, val, args, world), world)
    train(model, told, images, val, args, world)


def train(model: ViT, told: str, images: Images, val: Images, args: Namespace, world: World) -> None:
    optimizer = make_optimizer(model, args)
    run = Run("finetune", args, world, images, model, model, optimizer)
    world.say(told)
    if args.protocol == "linear" and (run.parts > 1 or args.batch_size < 2):
        raise InputError(f"--batch-size {args.batch_size}: BatchNorm needs a process's whole share at once, and two "
                         f"images in all: give 2 to {args.micro_batch * world.size}")
    wrapped, scaler = world.wrap(model, args.compile), run.scaler
    crop = ProbeCrop if args.protocol == "linear" else RandomCrop
    views = Views(images, random_crop(model.image_size, args.crop_min, args.randaugment, crop), args.seed)
    centre, mix = CentreCrop(model.image_size, args.centre), mixing(args.mixup, args.cutmix, len(images.classes))
    with run.batches(views) as batches:
        for step in run.steps(batches):
            if step > 1 and (step - 1) % (run.per_epoch * args.eval_every) == 0:
                run.evaluate(step - 1, val, centre)
            for part in range(1, run.parts + 1):
                pixels, _, index = next(batches)                                        # B C h w in 0..1; on the host B
                labels = world.send(torch.from_numpy(images.labels[index]))             # B
                torch.manual_seed(torch_seed(STEP, args.seed, step, world.rank, part))  # of erasing, mixing, drop path
                pixels = model.normalize(pixels)
                if args.erasing:
                    pixels = random_erasing(pixels, args.erasing)
                if mix:
                    pixels, labels = mix(pixels, labels)                                # labels become B K
                with world.share_gradients(wrapped, now=part == run.parts):
                    with world.autocast():
                        logits = wrapped(pixels)                                        # B K
                    loss = F.cross_entropy(logits.float(), labels, label_smoothing=args.smoothing)
                    scaler.scale(loss / run.parts).backward()
                run.add(loss=loss)
            if args.clip_grad:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    print_result(run.evaluate(run.last, val, centre), world)


def load_classifier(args: Namespace, state: dict, config: dict) -> ViT:
    """A classifier that this script wrote, or an official one."""
    model = ViT(**dict(config, image_size=args.image_size))
    if "head.1.weight" in state:
        model.head = probe_head(model.width, config["classes"])
    load_encoder(model, state, config, fresh=())
    return model


@torch.no_grad()
def predict(args: Namespace, state: dict, config: dict, world: World) -> None:
    """Prints a table, separated by tabs: file, class, its probability. What cannot be read is told and left out."""
    classes = classes_of(args.init, config)
    model = load_classifier(args, state, config).to(world.device).eval()
    images = replace(open_folder(args.predict, "", False), enough=4 * max(args.image_size))
    if world.size > 1:
        raise InputError("--predict is for one process")
    print("file\tclass\tprobability")
    views, wanted = Views(images, CentreCrop(model.image_size, args.centre), args.seed), iter(range(len(images)))
    with in_order(views, args, world) as batches:
        for pixels, _, index in batches:
            with world.autocast():
                logits = model(model.normalize(pixels))
            best = logits.float().softmax(1).max(1)
            for i, probability, label in zip(index, best.values.tolist(), best.indices.tolist(), strict=True):
                if i == next(wanted):  # else it stands for one that cannot be read
                    print(f"{os.fsdecode(images.items[i])}\t{classes[label]}\t{probability:.4f}")


@torch.no_grad()
def features_of(model: ViT, images: Images, args: Namespace, world: World) -> tuple[Tensor, Tensor]:
    """Features M D and labels M of all images. A process fills in the rows of its share; the others are zero there."""
    features = torch.zeros(len(images), model.width, device=world.device)
    with in_order(Views(images, CentreCrop(model.image_size, args.centre)), args, world) as batches:
        for pixels, _, index in batches:
            with world.autocast():
                features[index] = model.features(model.normalize(pixels)).float()
    return world.sum(features), world.send(torch.from_numpy(images.labels))


def knn(model: ViT, images: Images, val: Images, args: Namespace, world: World) -> dict[str, float]:
    """Accuracy in % on `val`, with `images` as the bank; the processes divide the queries among them."""
    model.eval()
    bank, queries = features_of(model, images, args, world), features_of(model, val, args, world)
    mine = zip(*(rows[world.rank::world.size].split(256) for rows in queries), strict=True)
    hits = sum(knn_hits(*some, *bank, len(images.classes)) for some in mine)
    return dict(top1=100 * world.sum(hits.double()).item() / len(val), val_images=len(val))


if __name__ == "__main__":
    launch(main)

"""TinyMIM: a small ViT learns how the tokens of a larger, masked-pretrained one relate to each other.

Ren et al., arXiv 2301.01296 (CVPR 2023); the default is the recipe that the authors released.

    teacher  frozen, sees the plain crop; q, k, v are those of its block 18 of 24 or 12 of 12, counted from 1
    student  sees the same crop with colour jitter; q, k, v are those of its last block, which has as many heads
    R_qk = softmax(q k^T / sqrt(d)),  R_vv = softmax(v v^T / sqrt(d))     in these blocks, for every head
    loss = KL(teacher's R_qk || student's) + KL(teacher's R_vv || student's)
           mean over images, heads and query tokens

No mask, no decoder, no projection. A distilled student can be the next teacher, L -> B -> S -> T: its file records
the number of heads of its last block. The paper's other targets and inputs are options (--target, --mask-ratio, ...).
ImageNet-1K, fine-tuned, table 8: T 75.8, S 83.0, B 85.0 % (MAE: 71.6, 80.6, 83.6).

Run    python mae.py --width 128 --heads 8 --blr 6e-3 --out runs/teacher        a teacher for the generated shapes, then
       python tinymim.py --teacher runs/teacher/encoder.pth          minutes on a laptop
       torchrun --standalone --nproc_per_node=8 tinymim.py --data /imagenet --model base \\
           --teacher mae_pretrain_vit_large.pth                      L -> B; its encoder.pth teaches S, and so on
Writes encoder.pth (the student and its config) and last.pth (all that --resume needs) every ten minutes and at the end,
       log.jsonl, args.json
Use    from tinymim import TinyMIM                                   copy this file and vit.py
Letters in shape comments: B images, C channels, h and w height and width in pixels, p patch side, N patches,
       n kept patches, L = 1 + N or 1 + n tokens, D width, E decoder width, H heads, d = D / H
"""
from argparse import BooleanOptionalAction, Namespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vit import (IMAGENET_MEAN, IMAGENET_STD, Block, InputError, ViT, init_linear, layer_norm, load_encoder,
                 param_groups, position_table, read_encoder, relation, take)

# -------------------------------------------------------------------- the method


class TinyMIM(nn.Module):
    """A student whose last block imitates the relations of one block of a teacher.

    encoder   its last block needs as many heads as the teacher's (`last_heads` of ViT): they are compared one by one

    What comes after the queries, keys and values of the last block is not trained. It keeps its initial values, in the
    files too: fine-tuning starts from them (as in the released code), and a student that becomes a teacher can give
    nothing beyond relations.
    """

    def __init__(self, encoder: ViT):
        super().__init__()
        self.encoder = encoder
        for module in beyond_relations(encoder):
            module.requires_grad_(False)

    def forward(self, images: Tensor, teacher: dict[str, Tensor]) -> dict[str, Tensor]:
        """images B C h w, normalised; teacher: what `observe` gave for it -> the loss and its two terms."""
        student = self.observe(self.encoder, images, self.encoder.depth)
        qk = divergence(student["qk"], teacher["qk"])
        vv = divergence(student["vv"], teacher["vv"])
        return dict(loss=qk + vv, qk=qk, vv=vv)

    def observe(self, vit: ViT, images: Tensor, number: int) -> dict[str, Tensor]:
        """Scores q k^T / sqrt(d) and v v^T / sqrt(d), not yet softmaxed, of block `number` (from 1) of a student or
        teacher: B H L L, class token included. Nothing beyond this block's queries, keys and values is computed."""
        x = vit.through(vit.embed(images), last=number - 1)                             # B L D, what enters the block
        q, k, v = vit.blocks[number - 1].qkv(x)                                         # B H L d
        return dict(qk=relation(q, k), vv=relation(v, v))


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) of the softmax over the last dimension, mean over all others (eq. 5, 9). Computed
    with log_softmax, as log(softmax) is infinite where scores are far apart."""
    if student.shape != teacher.shape:
        raise InputError(f"the student gives {tuple(student.shape)}, the teacher {tuple(teacher.shape)} (images, "
                         "heads, tokens, tokens): the student's last block needs the teacher's number of heads")
    s, t = (full_precision(x).log_softmax(-1) for x in (student, teacher))
    return (t.exp() * (t - s)).sum(-1).mean()


def full_precision(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def beyond_relations(vit: ViT) -> tuple[nn.Module, ...]:
    """What comes after the queries, keys and values of the last block, in the order of computation."""
    last = vit.blocks[-1]
    return last.attn.proj, nn.ModuleList([last.norm2, last.mlp]), vit.norm


def student_view(images: Tensor, numbers: Tensor, strength: float) -> Tensor:
    """Colour jitter, torchvision's without hue: brightness, contrast and saturation times 1 - strength to
    1 + strength, in random order, all drawn for each image. images B 3 h w in 0..1 -> the same.

    numbers   B 6 in 0..1: three factors, and three whose order is that of the operations
    """
    factors, row = 1 + strength * (2 * numbers[:, :3] - 1), torch.arange(len(images), device=images.device)
    for operation in numbers[:, 3:].argsort(1).T:                                       # B, each 0, 1 or 2
        grey = 0.299 * images[:, :1] + 0.587 * images[:, 1:2] + 0.114 * images[:, 2:]   # B 1 h w
        mean = grey.mean((2, 3), keepdim=True).expand_as(grey)
        # Each operation blends the image with another: black, its mean grey, or its greyscale version.
        other = torch.stack([torch.zeros_like(grey), mean, grey])[operation, row]       # B 1 h w
        factor = factors[row, operation].view(-1, 1, 1, 1)
        images = (other + factor * (images - other)).clamp(0, 1)
    return images


# -------------------------------------------------------------------- the paper's study of targets and inputs

# What can be compared, and how far the block has to be computed for it: to queries, keys and values (0), through
# its attention (1), through its MLP (2), to the end of the network (3). Letters as in eq. 2 and 3:
TARGETS = {
    "qk": 0, "vv": 0, "qq": 0, "kk": 0,         # relations
    "q": 0, "k": 0, "v": 0,                     # features, all heads side by side
    "attention": 1, "attention-residual": 1,    # H; H^ = x + H
    "ffn": 2, "block": 2,                       # F~ = MLP(norm(H^)); F = H^ + F~, FFN after the residual
    "output": 3, "class": 3,                    # after the last block and `norm`: all tokens; the class token
}
RELATIONS = ("qk", "vv", "qq", "kk")


class TinyMIMStudy(TinyMIM):
    """Section 3.1 of the paper: any sum of targets, masked input, additional masked image modelling.

    relations   `divergence`, or without softmax `smooth_l1` of the scores
    features    `smooth_l1` of the student's after a linear layer and the teacher's after a bare LayerNorm (eq. 7)
    class       `divergence` over the channels of the class token, the student's after a linear layer (eq. 6)
    mask_ratio  share of the patches that neither network sees
    mim_weight  weight of a reconstruction of these from the student's visible tokens, as in MAE

    Ours, as the paper's text does not say (its supplement we have not seen): the error without softmax; how a class
    token becomes a distribution; that all tokens count in features, several targets are added, and student and teacher
    miss the same patches; the weight of the reconstruction and that it paints the jittered image; that `output` comes
    after the final norm. Linear layers and decoder are discarded.
    """

    def __init__(self, encoder: ViT, teacher_width: int, targets: list[str], softmax: bool = True,
                 mask_ratio: float = 0.0, mim_weight: float = 0.0, decoder: tuple[int, int, int] = (512, 8, 16)):
        super().__init__(encoder)
        self.kept = int(encoder.patches * (1 - mask_ratio))
        if (mask_ratio and not 0 < self.kept < encoder.patches) or (mim_weight and not mask_ratio):
            raise InputError(f"mask ratio {mask_ratio} leaves {self.kept} of {encoder.patches} patches to see: give a "
                             "value between 0 and 1; masked image modelling (mim_weight) needs one, in the paper 0.75")
        if not set(targets) <= set(TARGETS) or len(set(targets)) < len(targets):
            raise InputError(f"targets {' '.join(targets)}: expected different ones of {', '.join(TARGETS)}")
        self.targets, self.softmax, self.mim_weight = targets, softmax, mim_weight
        self.adapters = nn.ModuleDict({name: nn.Linear(encoder.width, teacher_width)
                                       for name in targets if name not in RELATIONS}).apply(init_linear)
        self.decoder = PixelDecoder(encoder, *decoder) if mim_weight else None
        reach = 3 if mim_weight else max(TARGETS[name] for name in targets)
        for module in beyond_relations(encoder)[:reach]:  # its stages are those that TARGETS counts
            module.requires_grad_(True)

    def forward(self, images: Tensor, teacher: dict[str, Tensor], noise: Tensor | None = None) -> dict[str, Tensor]:
        """As TinyMIM's; noise B N in 0..1 where patches are masked. Every term comes under its own name."""
        names = [*self.targets, "output"] if self.mim_weight else self.targets
        student = targets_of(self.encoder, images, self.encoder.depth, names, self.seen(noise))
        terms = {name: self.compare(name, student[name], teacher[name]) for name in self.targets}
        loss = sum(terms.values())
        if self.mim_weight:
            terms["reconstruction"] = self.decoder(student["output"], images, random_masking(noise, self.kept)[1])
            loss = loss + self.mim_weight * terms["reconstruction"]
        return dict(loss=loss, **terms)

    def observe(self, vit: ViT, images: Tensor, number: int, noise: Tensor | None = None) -> dict[str, Tensor]:
        """The targets in block `number` of a student or teacher; the same noise hides the same patches from both."""
        return targets_of(vit, images, number, self.targets, self.seen(noise))

    def seen(self, noise: Tensor | None) -> Tensor | None:
        return None if noise is None else random_masking(noise, self.kept)[0]

    def compare(self, name: str, student: Tensor, teacher: Tensor) -> Tensor:
        """The error of one target."""
        if name in RELATIONS:
            return divergence(student, teacher) if self.softmax else smooth_l1(student, teacher)
        student = self.adapters[name](student)
        if name == "class":
            return divergence(student, teacher)
        return smooth_l1(student, F.layer_norm(full_precision(teacher), teacher.shape[-1:]))


def smooth_l1(student: Tensor, teacher: Tensor) -> Tensor:
    """Eq. 8: d^2 / 4 for |d| < 2, |d| - 1 beyond, of the difference d; mean over everything."""
    return F.smooth_l1_loss(full_precision(student), full_precision(teacher), beta=2.0)


def targets_of(vit: ViT, images: Tensor, number: int, names: list[str], keep: Tensor | None) -> dict[str, Tensor]:
    """The `names` of TARGETS in block `number` (from 1): relations B H L L, features B L D, class token B D."""
    x, block = vit.through(vit.embed(images, keep), last=number - 1), vit.blocks[number - 1]
    heads = dict(zip("qkv", block.qkv(x), strict=True))                                 # B H L d
    found = {name: relation(heads[name[0]], heads[name[1]]) for name in names if name in RELATIONS}
    found |= {name: each.transpose(1, 2).flatten(2) for name, each in heads.items()}    # B L D
    reach = max(TARGETS[name] for name in names)
    if reach > 0:
        found["attention"] = block.attn(block.norm1(x))
        found["attention-residual"] = x + found["attention"]
    if reach > 1:
        found["ffn"] = block.mlp(block.norm2(found["attention-residual"]))
        found["block"] = found["attention-residual"] + found["ffn"]
    if reach > 2:
        found["output"] = vit.norm(vit.through(found["block"], first=number + 1))
        found["class"] = found["output"][:, 0]
    return {name: found[name] for name in names}


class PixelDecoder(nn.Module):
    """MAE's decoder and its error: visible tokens -> pixels of the hidden patches, normalised within each."""

    def __init__(self, encoder: ViT, width: int, depth: int, heads: int):
        super().__init__()
        self.patch_size = encoder.patch_size
        self.embed = nn.Linear(encoder.width, width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, width).normal_(std=0.02))
        self.pos_embed = nn.Parameter(position_table("sincos", width, encoder.grid), False)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)), layer_norm(width),
                                    nn.Linear(width, encoder.channels * encoder.patch_size ** 2))
        self.apply(init_linear)

    def forward(self, z: Tensor, images: Tensor, restore: Tensor) -> Tensor:
        """z B 1+n D; images B C h w; restore B N, from `random_masking` -> mean squared error."""
        z = self.embed(z)                                                               # B 1+n E
        masks = self.mask_token.expand(len(z), restore.shape[1] + 1 - z.shape[1], -1)   # B N-n E
        patches = take(torch.cat([z[:, 1:], masks], dim=1), restore)                    # B N E, in their places
        y = self.blocks(torch.cat([z[:, :1], patches], dim=1) + self.pos_embed)[:, 1:]  # B N Cpp
        target = full_precision(F.unfold(images, self.patch_size, stride=self.patch_size).transpose(1, 2))
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
        hidden = restore >= z.shape[1] - 1
        return ((full_precision(y) - target).square().mean(-1) * hidden).sum() / hidden.sum()


def random_masking(noise: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """noise B N -> indices of the n = `kept` patches with the lowest noise, B n, and `restore` B N: the rank of every
    patch by its noise. Patch i is hidden if restore[i] >= n; tokens sorted by noise return to image order by this
    index."""
    order = noise.argsort(dim=1, stable=True)  # ties fall alike on CPUs and GPUs
    return order[:, :kept], order.argsort(dim=1)  # the second argsort inverts the permutation: restore[order[k]] = k


# -------------------------------------------------------------------- the recipe
from vit import (STEP, Run, Views, amount, common_options, count, launch, load_init, open_images, parse, random_crop,
                 say_next, share, start, torch_seed, vit_options)

RECIPES = {
    # The authors' README and code (main_pretrain.py, engine_pretrain.py, models_tinymim.py); one for T, S and B.
    # Fine-tuning: for B they give finetune.py's imagenet-base with --drop-path 0.2, for S and T nothing.
    "imagenet": dict(
        model="tiny", image_size=224, patch_size=16, crop_min=0.2, mean=IMAGENET_MEAN, std=IMAGENET_STD,
        epochs=300, warmup_epochs=15, batch_size=4096, blr=1.5e-4, min_lr=0.0, weight_decay=0.05),
    # Ours: network and batch of mae.py's cifar recipe, whose larger networks can teach; the paper's epochs.
    "cifar": dict(
        model="tiny", heads=12, image_size=36, patch_size=3, mlp_ratio=2.0, act="relu", qkv_bias=False,
        positions="learned", crop_min=0.6, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5),
        epochs=300, warmup_epochs=15, batch_size=1024, blr=1.5e-4, min_lr=0.0, weight_decay=0.05),
    # Ours: minutes on two CPU cores. Student and steps of mae.py's demo; half the images a step, as it sees them whole.
    "demo": dict(
        model="demo", image_size=32, patch_size=4, crop_min=0.6, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5),
        epochs=4, warmup_epochs=0.25, batch_size=32, blr=1.2e-2, min_lr=0.0, weight_decay=0.05),
}
# Heads of all blocks but the last, as in the released students (models_tinymim.py); their T is fine-tuned with 3
# (finetune.py --heads 3). The last block has as many as the imitated one. In the sequence L -> B -> S -> T a student's
# last block is read with the heads that it was distilled with: 16, 16, 16. The released classes have 16, 12, 12. Their
# S learns from B's block read with 12 (--teacher-last-heads 12), which joins parts of heads that were trained apart;
# their T needs S's block read with 12, but the class that should read it has 6, and fails.
HEADS = {"tiny": 6, "small": 6, "base": 12}
# Decoders of MAE-Lite for tiny and small, MAE's for the rest.
DECODERS = {"demo": (64, 1, 2), "tiny": (96, 1, 3), "small": (192, 1, 6)}
# What makes a teacher for each recipe.
TEACHERS = {
    "imagenet": "torchrun --standalone --nproc_per_node=8 mae.py --data {data} --model base --out runs/teacher",
    "cifar": "python mae.py --data {data} --recipe cifar --model small --out runs/teacher",
    "demo": "python mae.py --width 128 --heads 8 --blr 6e-3 --out runs/teacher",
}

def parse_args(argv: list[str] | None) -> Namespace:
    parser = common_options(__doc__, RECIPES)
    add = parser.add_argument_group("method").add_argument
    add("--teacher", help="file of a pre-trained encoder: of mae.py, of this script, or an official one")
    add("--teacher-heads", type=count, help="heads of the teacher, where its file does not say")
    add("--teacher-last-heads", type=count, help="heads of the teacher's last block, if other than its file says (the "
        "authors' TinyMIM-B: distilled with 16, read by their code with 12)")
    add("--teacher-block", type=count, help="block of the teacher that is imitated, from 1; else 18 of 24, or the last")
    add("--jitter", type=share, default=0.4, help="strength of the student's colour jitter, 0 to 1")
    add("--drop-path", type=share, default=0.1, help="rate of stochastic depth in the student's blocks but the last")
    add = parser.add_argument_group("study (sec. 3.1 of the paper)").add_argument
    add("--target", nargs="+", choices=TARGETS, default=["qk", "vv"], metavar="TARGET",
        help=f"what is compared, one or more of {', '.join(TARGETS)}")
    add("--softmax", action=BooleanOptionalAction, default=True, help="compare relations after softmax, else as scores")
    add("--mask-ratio", type=share, default=0.0, help="share of the patches that neither student nor teacher sees")
    add("--mim-weight", type=amount, default=0.0, help="weight of an additional MAE loss; needs --mask-ratio")
    add("--teacher-drop-path", type=share, default=0.0, help="rate of stochastic depth before the imitated block")
    return parse(parser, argv, RECIPES)


def load_teacher(args: Namespace, device: torch.device) -> tuple[ViT, int]:
    """The frozen teacher, and the number of its block to imitate. It stays outside of the model, so neither optimizer
    nor checkpoint ever meets it."""
    if args.teacher is None:
        raise InputError(f"--teacher is needed, a pre-trained encoder: an official file of MAE, or make one by\n    "
                         f"{TEACHERS[args.recipe].format(data=args.data)}\nand give --teacher runs/teacher/encoder.pth")
    state, config = read_encoder(args.teacher, args.teacher_heads, "--teacher-heads")
    theirs, depth = config["patch_size"], config["depth"]
    if theirs != args.patch_size:
        raise InputError(f"--teacher {args.teacher} cuts images into patches of {theirs} pixels, the student into ones "
                         f"of {args.patch_size}, but tokens are compared one by one: give --patch-size {theirs}")
    number = args.teacher_block or (18 if depth == 24 else depth)
    if number > depth:
        raise InputError(f"--teacher-block {number}: {args.teacher} has blocks 1 to {depth}")
    last_heads = args.teacher_last_heads or config["last_heads"]
    size = dict(config, image_size=args.image_size, last_heads=last_heads, pool="cls", classes=0)
    teacher = ViT(**size, drop_path=[args.teacher_drop_path if i < number else 0.0 for i in range(1, depth + 1)])
    load_encoder(teacher, state, config, fresh=() if {"output", "class"} & set(args.target) else ("norm.",))
    teacher.train(args.teacher_drop_path > 0)  # nothing but stochastic depth tells the modes apart
    return teacher.to(device).requires_grad_(False), number


def build(args: Namespace, teacher: ViT, number: int) -> TinyMIM:
    """The model that the arguments describe, with weights drawn from --seed."""
    torch.manual_seed(args.seed)
    size = vit_options(args)
    size["heads"] = args.heads or HEADS.get(args.model, size["heads"])
    if set(args.target) & set(RELATIONS):
        size["last_heads"] = teacher.blocks[number - 1].attn.heads
    encoder = load_init(ViT(**size, drop_path=[args.drop_path] * (size["depth"] - 1) + [0.0]), args)
    if args.target == ["qk", "vv"] and args.softmax and not args.mask_ratio and not args.mim_weight:
        return TinyMIM(encoder)
    decoder = DECODERS.get(args.model, (512, 8, 16))
    return TinyMIMStudy(encoder, teacher.width, args.target, args.softmax, args.mask_ratio, args.mim_weight, decoder)


# -------------------------------------------------------------------- the run


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    world = start(args)
    teacher, number = load_teacher(args, world.device)
    images = open_images(args)
    model = build(args, teacher, number).to(world.device)
    encoder = model.encoder
    # As in the released code the class token decays like a matrix; learned positions do not.
    groups = param_groups(model, args.weight_decay, undecayed=("encoder.pos_embed",))
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    run = Run("tinymim", args, world, images, model, encoder, optimizer)
    wrapped, scaler = world.wrap(model, args.compile), run.scaler
    observe = torch.compile(model.observe) if args.compile else model.observe
    world.say(f"{'+'.join(args.target)} of block {number} of {teacher.depth} of the teacher ({teacher.width} wide, "
              f"{teacher.blocks[number - 1].attn.heads} heads) in block {encoder.depth} of the student "
              f"({encoder.width} wide, {encoder.config['last_heads']} heads, elsewhere {encoder.config['heads']})")

    lengths = [6, encoder.patches] if args.mask_ratio else [6]  # random numbers of an image: for jitter and mask
    # In worker processes: crop, mirroring, numbers for the jitter and the mask, all from (seed, epoch, image).
    views = Views(images, random_crop(encoder.image_size, args.crop_min), args.seed, numbers=sum(lengths))
    with run.batches(views) as batches:
        for step in run.steps(batches):
            for part in range(1, run.parts + 1):
                pixels, numbers, _ = next(batches)                              # B C h w in 0..1; on the host B 6 (+ N)
                jitter, *noise = world.send(numbers).split(lengths, dim=1)              # B 6; if masked, B N
                torch.manual_seed(torch_seed(STEP, args.seed, step, world.rank, part))  # for stochastic depth
                with world.share_gradients(wrapped, now=part == run.parts):
                    with world.autocast():
                        with torch.no_grad():
                            teacher_targets = observe(teacher, teacher.normalize(pixels), number, *noise)
                        student_images = encoder.normalize(student_view(pixels, jitter, args.jitter))
                        losses = wrapped(student_images, teacher_targets, *noise)
                    scaler.scale(losses["loss"] / run.parts).backward()
                run.add(**losses)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    if world.rank == 0:
        say_next(args, f"{run.out}/encoder.pth")


if __name__ == "__main__":
    launch(main)

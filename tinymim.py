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

Run    python mae.py --width 128 --heads 8 --out runs/teacher        a teacher for the generated shapes, then
       python tinymim.py --teacher runs/teacher/encoder.pth          two minutes on a laptop
       torchrun --standalone --nproc_per_node=8 tinymim.py --data /imagenet --model base \
           --teacher mae_pretrain_vit_large.pth                      L -> B; its encoder.pth teaches S, and so on
Use    from tinymim import TinyMIM                                   copy this file and vit.py
Letters in shape comments: B images, C channels, p patch side, N patches, n kept patches, L = 1 + N or 1 + n tokens,
       D width, E decoder width, H heads, d = D / H
"""
from argparse import Namespace
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vit import (COUNT, IMAGENET_MEAN, IMAGENET_STD, MASKS, NOT_NEGATIVE, SHARE, Batches, Block, InputError, Log,
                 View, ViT, apply_recipe, autocast, cosine, decoder_sizes, drawn, encoder_options,
                 gradients_shared, init_linear, launch, layer_norm, load_checkpoint, load_encoder, normalizer,
                 open_images, open_run, param_groups, parse_args, parts_of_batch, position_table, read_encoder,
                 recipe_for, relation, reseed, save_checkpoint, say, set_lr, start_processes, take, vit_options,
                 wrap, write_file)

# -------------------------------------------------------------------- the method


class TinyMIM(nn.Module):
    """A student whose last block imitates the relations of one block of a teacher.

    encoder   its last block has as many heads as the teacher's block (`last_heads` of ViT), for heads are compared
              one by one; no parameter depends on it

    What comes after the queries, keys and values of the last block is not trained. It keeps its initial values, in the
    files too: fine-tuning starts from them (as in the released code), and a student that becomes a teacher can give
    nothing beyond relations.
    """

    def __init__(self, encoder: ViT):
        super().__init__()
        self.encoder = encoder
        for module in beyond_relations(encoder):
            module.requires_grad_(False)

    def forward(self, images: Tensor, goal: list[Tensor]) -> dict[str, Tensor]:
        """images B C h w, normalised; goal: what `observe` gave for the teacher -> the loss and its two terms."""
        student = self.observe(self.encoder, images, self.encoder.depth)
        qk, vv = (divergence(s, t) for s, t in zip(student, goal, strict=True))
        return dict(loss=qk + vv, qk=qk, vv=vv)

    def observe(self, vit: ViT, images: Tensor, number: int) -> list[Tensor]:
        """Scores before the softmax, q k^T / sqrt(d) and v v^T / sqrt(d), of block `number` of a student or
        teacher, each B H L L, class token included. Nothing beyond that block's queries, keys and values is
        computed."""
        q, k, v = vit.blocks[number - 1].qkv(tokens_into(vit, images, number))          # B H L d
        return [relation(q, k), relation(v, v)]


def tokens_into(vit: ViT, images: Tensor, number: int, keep: Tensor | None = None) -> Tensor:
    """What enters block `number`, counted from 1: B L D."""
    x = vit.embed(images, keep)
    for block in vit.blocks[:number - 1]:
        x = block(x)
    return x


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
    weights = torch.tensor([0.299, 0.587, 0.114], device=images.device).view(3, 1, 1)
    for operation in numbers[:, 3:].argsort(1).T:                                       # B, each 0, 1 or 2
        grey = (images * weights).sum(1, keepdim=True)                                  # B 1 h w
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
    features    `smooth_l1` of the student's, after a linear layer, and the teacher's, whitened by a LayerNorm without
                scale and shift (eq. 7)
    class       `divergence` over the channels of the class token, the student's after a linear layer (eq. 6)
    mask_ratio  share of the patches that neither network sees
    mim_weight  weight of a reconstruction of these from the student's visible tokens, as in MAE

    Ours, as the paper does not say: the error without softmax; how a class token becomes a distribution; that all
    tokens count in features; that several targets are added; that student and teacher miss the same patches; the
    weight of the reconstruction and that it paints the jittered image; that `output` is taken after the final norm.
    Linear layers and decoder are discarded.
    """

    def __init__(self, encoder: ViT, teacher_width: int, targets: list[str], softmax: bool = True,
                 mask_ratio: float = 0.0, mim_weight: float = 0.0, decoder: tuple[int, int, int] = (512, 8, 16)):
        super().__init__(encoder)
        patches = encoder.patches
        self.kept = int(patches * (1 - mask_ratio))
        if (mask_ratio and not 0 < self.kept < patches) or (mim_weight and not mask_ratio):
            raise InputError(f"mask ratio {mask_ratio} leaves {self.kept} of {patches} patches to see: give a value "
                             "between 0 and 1; masked image modelling (mim_weight) needs one, in the paper 0.75")
        self.targets, self.softmax, self.mim_weight = targets, softmax, mim_weight
        self.adapters = nn.ModuleDict({name: nn.Linear(encoder.width, teacher_width)
                                       for name in targets if name not in RELATIONS}).apply(init_linear)
        self.decoder = PixelDecoder(encoder, *decoder) if mim_weight else None
        reach = 3 if mim_weight else max(TARGETS[name] for name in targets)
        for module in beyond_relations(encoder)[:reach]:  # its stages are those that TARGETS counts
            module.requires_grad_(True)

    def forward(self, images: Tensor, goal: list[Tensor], noise: Tensor | None = None) -> dict[str, Tensor]:
        """As TinyMIM's; noise B N in 0..1 where patches are masked. Every term comes under its own name."""
        names = [*self.targets, "output"] if self.mim_weight else self.targets
        student = targets_of(self.encoder, images, self.encoder.depth, names, self.seen(noise))
        terms = {name: self.compare(name, s, t) for name, s, t in zip(self.targets, student, goal, strict=False)}
        loss = sum(terms.values())
        if self.mim_weight:
            terms["reconstruction"] = self.decoder(student[-1], images, random_masking(noise, self.kept)[1])
            loss = loss + self.mim_weight * terms["reconstruction"]
        return dict(loss=loss, **terms)

    def observe(self, vit: ViT, images: Tensor, number: int, noise: Tensor | None = None) -> list[Tensor]:
        """The targets of block `number`, in their order."""
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


def targets_of(vit: ViT, images: Tensor, number: int, names: list[str], keep: Tensor | None = None) -> list[Tensor]:
    """The `names` of TARGETS in block `number` (from 1): relations B H L L, features B L D, class token B D."""
    x, block = tokens_into(vit, images, number, keep), vit.blocks[number - 1]
    heads = dict(zip("qkv", block.qkv(x), strict=True))                                 # B H L d
    found = {name: relation(heads[name[0]], heads[name[1]]) for name in names if name in RELATIONS}
    found |= {name: each.transpose(1, 2).flatten(2) for name, each in heads.items()}    # B L D
    reach = max(TARGETS[name] for name in names)
    if reach > 0:
        attention = block.attn(block.norm1(x))
        found |= {"attention": attention, "attention-residual": x + attention}
    if reach > 1:
        ffn = block.mlp(block.norm2(x + attention))
        found |= {"ffn": ffn, "block": x + attention + ffn}
    if reach > 2:
        x = found["block"]
        for block in vit.blocks[number:]:
            x = block(x)
        output = vit.norm(x)
        found |= {"output": output, "class": output[:, 0]}
    return [found[name] for name in names]


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


def random_masking(noise: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """noise B N -> indices of the `keep` patches with the lowest noise, B n, and `restore` B N: the rank of every patch
    by its noise. Patch i is hidden if restore[i] >= n; tokens sorted by noise return to image order by this index."""
    order = noise.argsort(dim=1)
    return order[:, :keep], order.argsort(dim=1)  # the second argsort inverts the permutation: restore[order[k]] = k


# -------------------------------------------------------------------- the recipe

# What the paper settled on: the study of its section 3 changes these.
DEFAULTS = dict(target="qk+vv", softmax=True, mask_ratio=0.0, mim_weight=0.0, jitter=0.4, drop_path=0.1,
                teacher_drop_path=0.0)
RECIPES = {
    # The authors' README and code (main_pretrain.py, engine_pretrain.py, models_tinymim.py); one for T, S and B.
    # Fine-tuning: for B they give finetune.py's imagenet-base with --drop-path 0.2, for S and T nothing.
    "imagenet": dict(
        DEFAULTS, model="tiny", image_size=224, patch_size=16, crop_min=0.2, mean=IMAGENET_MEAN, std=IMAGENET_STD,
        epochs=300, warmup_epochs=15, batch_size=4096, micro_batch=256, blr=1.5e-4, min_lr=0.0, weight_decay=0.05),
    # Ours: network and batch of mae.py's cifar recipe, learned positions included, so that the two can be compared
    # and its larger networks can teach; the paper's epochs.
    "cifar": dict(
        DEFAULTS, model="tiny", heads=12, image_size=36, patch_size=3, mlp_ratio=2.0, act="relu", qkv_bias=False,
        positions="learned", crop_min=0.6, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5),
        epochs=300, warmup_epochs=15, batch_size=1024, micro_batch=1024, blr=1.5e-4, min_lr=0.0, weight_decay=0.05),
    # Ours: minutes on two CPU cores. The student and its number of steps are those of mae.py's demo, with half the
    # images a step, as it sees four times as many of their patches.
    "demo": dict(
        DEFAULTS, model="demo", image_size=32, patch_size=4, crop_min=0.6,
        mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5),
        epochs=4.8, warmup_epochs=0.25, batch_size=32, micro_batch=32, blr=1.2e-2, min_lr=0.0, weight_decay=0.05),
}
# Heads of all blocks but the last in the released students (models_tinymim.py), which fine-tune T with 3. The last
# block has the heads of the imitated one, and a student that teaches keeps them: this is our reading of the sequence
# L -> B -> S -> T, on which the released classes contradict each other.
HEADS = {"tiny": 6, "small": 6, "base": 12}
# Decoders of MAE-Lite for tiny and small (a large one only hurts a small encoder), MAE's for the rest.
DECODERS = {"demo": "64x1x2", "tiny": "96x1x3", "small": "192x1x6"}
# What makes a teacher for each recipe.
TEACHERS = {
    "imagenet": "torchrun --standalone --nproc_per_node=8 mae.py --data {data} --model base --out runs/teacher",
    "cifar": "python mae.py --data {data} --recipe cifar --model small --out runs/teacher",
    "demo": "python mae.py --width 128 --heads 8 --out runs/teacher",
}
STUDENT_VIEW = 10  # stream of chance for the jitter
OPTIONS = {
    "method": {
        "teacher": (str, None, "file of a pre-trained encoder: of mae.py, of this script, or an official one"),
        "teacher_heads": (int, COUNT, "heads of the teacher, where its file does not say"),
        "teacher_last_heads": (int, COUNT, "heads of the teacher's last block, if other than its file says (the "
                               "authors' TinyMIM-B: distilled with 16, read by their code with 12)"),
        "teacher_block": (int, COUNT, "block of the teacher that is imitated, from 1; else 18 of 24, or the last"),
        "jitter": (float, SHARE, "strength of the student's colour jitter, 0 to 1"),
        "drop_path": (float, SHARE, "rate of stochastic depth in all blocks of the student but the last"),
        "crop_min": (float, SHARE, "smallest share of an image's area in a random crop"),
    },
    "study (sec. 3.1 of the paper)": {
        "target": (str, None, f"what is compared, joined by +: {', '.join(TARGETS)}"),
        "softmax": (bool, None, "compare relations by the divergence of their softmax, else the scores"),
        "mask_ratio": (float, SHARE, "share of the patches that neither student nor teacher sees"),
        "mim_weight": (float, NOT_NEGATIVE, "weight of an additional MAE loss; needs --mask-ratio"),
        "teacher_drop_path": (float, SHARE, "rate of stochastic depth in the teacher's blocks before the imitated one"),
    },
}


def check(args: Namespace) -> None:
    """Raises InputError for what no run can do."""
    if args.teacher is None:
        command = TEACHERS[args.recipe].format(data=args.data)
        raise InputError(f"--teacher is needed, a pre-trained encoder: an official file of MAE, or make one by\n"
                         f"    {command}\nand give --teacher runs/teacher/encoder.pth")
    names = args.target.split("+")
    if not set(names) <= set(TARGETS) or len(set(names)) < len(names):
        raise InputError(f"--target {args.target}: expected different ones of {', '.join(TARGETS)}, joined by +")


def load_teacher(args: Namespace, device: torch.device) -> tuple[ViT, int, Callable[[Tensor], Tensor]]:
    """The frozen teacher, the number of its block to imitate, and the normalisation that it was trained with. It
    stays outside of the model, so neither optimizer nor checkpoint ever meets it."""
    state, config = read_encoder(args.teacher, args.teacher_heads, "--teacher-heads")
    theirs, ours, side = config["patch_size"], args.patch_size, args.image_size
    if theirs != ours:
        raise InputError(f"--teacher {args.teacher} cuts {side} pixels into {side // theirs} x {side // theirs} "
                         f"patches of {theirs}, the student into {side // ours} x {side // ours} of {ours}, but "
                         f"tokens are compared one by one: give --patch-size {theirs}")
    depth = config["depth"]
    number = args.teacher_block if args.teacher_block is not None else 18 if depth == 24 else depth
    if not 1 <= number <= depth:
        raise InputError(f"--teacher-block {number}: {args.teacher} has blocks 1 to {depth}")
    size = encoder_options(config, image_size=side, last_heads=args.teacher_last_heads or config["last_heads"])
    teacher = ViT(**size, drop_path=[args.teacher_drop_path if i < number else 0.0 for i in range(1, depth + 1)])
    to_the_end = any(TARGETS[name] == 3 for name in args.target.split("+"))
    load_encoder(teacher, state, config, fresh=() if to_the_end else ("norm.",))
    teacher.train(args.teacher_drop_path > 0)  # nothing but stochastic depth tells the modes apart
    return teacher.to(device).requires_grad_(False), number, normalizer(config["mean"], config["std"], device)


def build(args: Namespace, teacher: ViT, number: int) -> TinyMIM:
    """The model that the arguments describe, with weights drawn from --seed."""
    torch.manual_seed(args.seed)
    size, targets = vit_options(args), args.target.split("+")
    if args.heads is None:
        size["heads"] = HEADS.get(args.model, size["heads"])
    if set(targets) & set(RELATIONS):
        size["last_heads"] = teacher.blocks[number - 1].attn.heads
    encoder = ViT(**size, drop_path=[args.drop_path] * (size["depth"] - 1) + [0.0])
    if targets == ["qk", "vv"] and args.softmax and not args.mask_ratio and not args.mim_weight:
        return TinyMIM(encoder)
    decoder = decoder_sizes(DECODERS.get(args.model, "512x8x16"))
    return TinyMIMStudy(encoder, teacher.width, targets, args.softmax, args.mask_ratio, args.mim_weight, decoder)


# -------------------------------------------------------------------- the run


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv, __doc__, RECIPES, OPTIONS)
    world = start_processes(args)
    images = open_images(args)
    apply_recipe(args, recipe_for(args, images), RECIPES)
    check(args)
    teacher, number, teacher_normalize = load_teacher(args, world.device)
    model = build(args, teacher, number)
    out, checkpoint = open_run(args, "tinymim")
    wrapped = wrap(model, args, world)
    observe = torch.compile(model.observe) if args.compile else model.observe
    encoder, config = model.encoder, dict(model.encoder.config, mean=list(args.mean), std=list(args.std))

    parts, steps = parts_of_batch(args, world), len(images) // args.batch_size
    last, lr = round(args.epochs * steps), args.blr * args.batch_size / 256
    # As in the released code the class token decays like a matrix; learned positions do not.
    groups = param_groups(model, args.weight_decay, undecayed=("encoder.pos_embed",))
    optimizer = torch.optim.AdamW(groups, lr, betas=(0.9, 0.95), fused=args.device == "cuda")
    scaler = torch.amp.GradScaler(args.device, enabled=args.precision == "fp16")
    first = load_checkpoint(checkpoint, model, optimizer, scaler) if checkpoint else 0
    normalize = normalizer(args.mean, args.std, world.device)
    loader = Batches(images, View(encoder.image_size, (args.crop_min, 1.0)), args, world, first, last)
    log = Log(args, out, world, loader)
    if world.main:
        say(f"TinyMIM, recipe {args.recipe}: {len(images)} images, {last} steps of {args.batch_size}, "
            f"learning rate {lr:.3g}, {args.precision} on {world.size} x {args.device} -> {out}\n"
            f"{args.target} of block {number} of {teacher.depth} of the teacher ({teacher.width} wide, "
            f"{teacher.blocks[number - 1].attn.heads} heads) in block {encoder.depth} of the student "
            f"({encoder.width} wide, {encoder.config['last_heads']} heads, elsewhere {encoder.config['heads']})")

    def save(step: int) -> None:
        save_checkpoint(out, "tinymim", step, model, config, optimizer, scaler, args)
        write_file(dict(model=encoder.state_dict(), config=config), out / "encoder.pth")

    step = first
    for step in range(first + 1, last + 1):
        set_lr(optimizer, rate := cosine((step - 1) / steps, lr, args.min_lr, args.warmup_epochs, args.epochs))
        jitter = drawn(6, STUDENT_VIEW, step, args, world).chunk(parts)
        noise = drawn(encoder.patches, MASKS, step, args, world).chunk(parts) if args.mask_ratio else None
        sums = {}
        for part in range(parts):
            pixels = next(loader)[0]                                                    # B C h w, one crop for both
            reseed(args.seed, step, world.rank, part)  # for stochastic depth
            masked = [noise[part]] if noise else []
            jittered = normalize(student_view(pixels, jitter[part], args.jitter))
            with gradients_shared(wrapped, now=part == parts - 1):
                with autocast(args):
                    with torch.no_grad():
                        goal = observe(teacher, teacher_normalize(pixels), number, *masked)
                    losses = wrapped(jittered, goal, *masked)
                scaler.scale(losses["loss"] / parts).backward()
            sums = {name: sums.get(name, 0) + loss.detach() / parts for name, loss in losses.items()}
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

        if log.step(step, rate, **sums):
            break
        if log.save_due():
            save(step)
    log.finish(save, step)  # a run stopped by a signal ends here
    if world.main:
        say(f"next:  python finetune.py --data {args.data} --init {out}/encoder.pth")


if __name__ == "__main__":
    launch(main)

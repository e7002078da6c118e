"""Generic-to-specific distillation (G2SD): a small ViT imitates a large MAE, without labels, then a large classifier.

Huang et al., arXiv 2302.14771; what the paper leaves open follows the authors' code (pengzhiliang/G2SD).

    generic    both see the same random 25 % of the patches; no labels
               target = LayerNorm(state of the teacher's decoder after its block 4 of 8), no scale and shift
               loss   = smooth_l1(MLP(student's decoder), target), beta = 2, mean over all tokens
    specific   [class token, patches, distillation token] -> y_c, y_d, by a linear head each
               loss   = (CE(y_c, labels) + CE(y_d, argmax of the teacher)) / 2;   at inference y = (y_c + y_d) / 2

The first stage gives a plain encoder, the second a classifier. Watch the generic loss: predicting zeros gives about
0.247 (logged as `zeros`), and a run that stays near it learns nothing.

Run    python mae.py --width 128 --heads 8 --out runs/teacher                            the demo's teacher
       python g2sd.py --teacher runs/teacher/last.pth                                    stage 1 -> runs/g2sd-demo
       python finetune.py --init runs/teacher/encoder.pth --out runs/teacher-classes     the teacher learns labels
       python g2sd.py --stage specific --init runs/g2sd-demo/encoder.pth --teacher runs/teacher-classes/model.pth
       torchrun --standalone --nproc_per_node=8 g2sd.py --data /imagenet --teacher mae_pretrain_vit_base_full.pth
Use    from g2sd import GenericStudent, SpecificStudent                                  copy this file and vit.py
Letters in shape comments: B images, C channels, N patches, n kept patches, D encoder width, E decoder width,
       T width of the teacher's decoder, K classes
"""
from argparse import Namespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vit import (COMMON_OPTIONS, COUNT, MASKS, NOT_NEGATIVE, SHARE, Batches, Block, Images, InputError, Log,
                 View, ViT, World, apply_recipe, autocast, balanced, cosine, decoder_sizes, drawn,
                 encoder_options, evaluate, gradients_shared, init_linear, launch, load_checkpoint, load_encoder,
                 load_file, mixing, normalizer, open_images, open_run, param_groups, parse_args, parts_of_batch,
                 position_table, print_result, random_erasing, read_encoder, recipe_for, reseed, save_checkpoint,
                 say, sent, set_lr, start_processes, take, vit_options, weights_of, wrap, write_file)

# -------------------------------------------------------------------- the method: generic stage


class MaskedViT(nn.Module):
    """A ViT that sees a random subset of the patches, and a light decoder that works on all of them.

    decoder      width, blocks, heads; MLP ratio, activation and kind of positions are the encoder's
    mask_ratio   share of the patches that the encoder does not see
    """

    def __init__(self, encoder: ViT, decoder: tuple[int, int, int], mask_ratio: float = 0.75):
        super().__init__()
        patches, (width, depth, heads) = encoder.patches, decoder
        self.kept = int(patches * (1 - mask_ratio))  # cut, not rounded: as in all official code
        if not 0 < self.kept < patches:
            raise InputError(f"mask ratio {mask_ratio} leaves {self.kept} of {patches} patches to see; give a value "
                             "between 0 and 1")
        kind = encoder.config
        self.encoder = encoder
        self.decoder_embed = nn.Linear(encoder.width, width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, width).normal_(std=0.02))
        self.decoder_pos_embed = nn.Parameter(position_table(kind["positions"], width, encoder.grid),
                                              kind["positions"] == "learned")
        self.decoder_blocks = nn.ModuleList(Block(width, heads, kind["mlp_ratio"], kind["act"], kind["qkv_bias"])
                                            for _ in range(depth))
        self.decoder_embed.apply(init_linear)
        self.decoder_blocks.apply(init_linear)

    def encode(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """images B C h w, noise B N -> tokens of the kept patches B 1+n D, and `restore` B N."""
        keep, restore = random_masking(noise, self.kept)
        return self.encoder.encode(images, keep), restore

    def decode(self, z: Tensor, restore: Tensor, blocks: int | None = None) -> Tensor:
        """z B 1+n D, restore B N -> state of all tokens B 1+N E after the decoder's first `blocks` blocks, or all."""
        z = self.decoder_embed(z)                                                       # B 1+n E
        masks = self.mask_token.expand(len(z), restore.shape[1] + 1 - z.shape[1], -1)   # B N-n E
        patches = take(torch.cat([z[:, 1:], masks], dim=1), restore)                    # B N E, in their places
        y = torch.cat([z[:, :1], patches], dim=1) + self.decoder_pos_embed              # B 1+N E
        for block in self.decoder_blocks[:blocks]:
            y = block(y)
        return y


def random_masking(noise: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """noise B N -> indices of the `keep` patches with the lowest noise, B n, and `restore` B N: the rank of every patch
    by its noise. Patch i is hidden if restore[i] >= n; tokens sorted by noise return to image order by this index."""
    order = noise.argsort(dim=1)
    return order[:, :keep], order.argsort(dim=1)  # the second argsort inverts the permutation: restore[order[k]] = k


class GenericStudent(MaskedViT):
    """Stage 1: a small MAE whose decoder predicts features of the teacher's decoder instead of pixels.

    teacher_width   width T of the teacher's decoder
    tokens          where the two are compared: all (class token included), masked or visible patches
    """

    def __init__(self, encoder: ViT, decoder: tuple[int, int, int], teacher_width: int, mask_ratio: float = 0.75,
                 tokens: str = "all"):
        super().__init__(encoder, decoder, mask_ratio)
        if tokens not in ("all", "masked", "visible"):
            raise InputError(f"tokens {tokens!r} is unknown; there are all, masked, visible")
        self.tokens = tokens
        # The paper's figure shows no layers in between; the authors' code has these, discarded with the decoder.
        self.predictor = nn.Sequential(nn.Linear(decoder[0], teacher_width), nn.GELU(),
                                       nn.Linear(teacher_width, teacher_width)).apply(init_linear)

    def forward(self, images: Tensor, noise: Tensor, target: Tensor) -> dict[str, Tensor]:
        """images B C h w, noise B N, target B 1+N T -> the loss, and that of a student which predicts zeros."""
        z, restore = self.encode(images, noise)
        prediction = self.predictor(self.decode(z, restore))                            # B 1+N T
        return dict(loss=self.loss(prediction, target, restore),
                    zeros=self.loss(torch.zeros_like(target), target, restore))

    def loss(self, prediction: Tensor, target: Tensor, restore: Tensor) -> Tensor:
        """Smooth L1: d^2 / 4 for |d| < 2, |d| - 1 beyond; mean over the chosen tokens."""
        error = F.smooth_l1_loss(prediction.to(target.dtype), target, beta=2.0, reduction="none").mean(-1)  # B 1+N
        if self.tokens == "all":
            return error.mean()
        chosen = (restore >= self.kept) == (self.tokens == "masked")                    # B N
        return (error[:, 1:] * chosen).sum() / chosen.sum()


@torch.no_grad()
def generic_target(teacher: MaskedViT, images: Tensor, noise: Tensor, layer: int) -> Tensor:
    """What the student is to predict, B 1+N T, at least float32: the state of the teacher's decoder after its block
    `layer`, counted from 1, normalised for each token. The blocks above and the decoder's own norm are never run."""
    state = teacher.decode(*teacher.encode(images, noise), blocks=layer)
    state = state.to(torch.promote_types(state.dtype, torch.float32))
    return F.layer_norm(state, state.shape[-1:], eps=1e-6)


# -------------------------------------------------------------------- the method: specific stage


class SpecificStudent(ViT):
    """Stage 2: a classifier with a distillation token. The token comes last and has no position (DeiT's is second,
    with one); both tokens pass the same `norm`.

    token_head   whether the token has a head of its own; NKD distills into the class token's instead
    """

    def __init__(self, token_head: bool = True, **options):
        super().__init__(**options)
        if self.pool != "cls" or not self.config["classes"]:
            raise InputError("a student of the specific stage is a classifier by its class token")
        self.dist_token = nn.Parameter(torch.empty(1, 1, self.width).normal_(std=0.02))
        self.head_dist = nn.Linear(self.width, self.config["classes"]) if token_head else None
        nn.init.normal_(self.head.weight, std=2e-5)
        if token_head:
            nn.init.normal_(self.head_dist.weight, std=0.02)
            nn.init.zeros_(self.head_dist.bias)

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor | None]:
        """B C h w -> in training the logits of both tokens, B K each (None without a head); else their mean, B K."""
        x = self.embed(images)                                                          # B 1+N D
        x = torch.cat([x, self.dist_token.expand(len(x), -1, -1)], dim=1)               # B 1+N+1 D
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        by_class = self.head(x[:, 0])
        by_token = self.head_dist(x[:, -1]) if self.head_dist is not None else None
        if self.training:
            return by_class, by_token
        return by_class if by_token is None else (by_class + by_token) / 2


def specific_loss(by_class: Tensor, by_token: Tensor | None, labels: Tensor, teacher: Tensor,
                  smoothing: float = 0.0) -> dict[str, Tensor]:
    """Logits of the student's two heads and of the teacher, B K each; labels B, or B K after mixing.
    The labels teach the class token; the class that the teacher predicts for the same pixels teaches the distillation
    token. Where by_token is None, the loss is NKD."""
    at_least_float = torch.promote_types(by_class.dtype, torch.float32)
    if by_token is None:
        return dict(loss=nkd_loss(by_class.to(at_least_float), teacher.to(at_least_float), labels))
    truth = F.cross_entropy(by_class.to(at_least_float), labels, label_smoothing=smoothing)
    verdict = F.cross_entropy(by_token.to(at_least_float), teacher.argmax(1))
    return dict(loss=(truth + verdict) / 2, truth=truth, verdict=verdict)


def nkd_loss(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float = 1.0, alpha: float = 1.0) -> Tensor:
    """Normalised knowledge distillation, an option of the authors' code: with y the (largest) label,
    - p_t(y) log p_s(y) - alpha T^2 sum over c != y of q_t(c) log q_s(c),  q = softmax(logits / T) of all classes but y.
    """
    y = (labels.argmax(1) if labels.ndim == 2 else labels)[:, None]                     # B 1
    others = torch.arange(student.shape[1] - 1, device=y.device)
    others = others + (others >= y)                                                     # B K-1, all numbers but y
    known = teacher.softmax(1).gather(1, y) * student.log_softmax(1).gather(1, y)       # B 1
    q_teacher, q_student = ((logits / temperature).gather(1, others) for logits in (teacher, student))
    rest = (q_teacher.softmax(1) * q_student.log_softmax(1)).sum(1)                     # B
    return -known.mean() - alpha * temperature**2 * rest.mean()


# -------------------------------------------------------------------- the recipe

RECIPES = {
    # The authors' GD.sh and main_distill.py for ViT-S; they have no script of its own for ViT-T (--model tiny).
    "imagenet": dict(
        model="small", image_size=224, tokens="all", crop_min=0.2,
        epochs=300, warmup_epochs=10, batch_size=4096, micro_batch=256, blr=1.5e-4, min_lr=2.5e-6, weight_decay=0.05),
    # Ours: the network of mae.py's recipe for small images, so that the two compare.
    "cifar": dict(
        model="tiny", heads=12, image_size=36, patch_size=3, mlp_ratio=2.0, act="relu", qkv_bias=False,
        positions="learned", decoder="128x4x4", tokens="all", crop_min=0.6,
        epochs=800, warmup_epochs=40, batch_size=1024, micro_batch=1024, blr=1.5e-4, min_lr=0.0, weight_decay=0.05),
    # Ours: two minutes on two CPU cores.
    "demo": dict(
        model="demo", heads=4, image_size=32, patch_size=4, decoder="64x1x2", tokens="all", crop_min=0.6,
        epochs=9.6, warmup_epochs=0.5, batch_size=64, micro_batch=64, blr=1.2e-2, min_lr=0.0, weight_decay=0.05),
    # The authors' SD.sh and main_finetune_dis.py, ViT-S.
    "imagenet-specific": dict(
        distillation="hard", epochs=200, warmup_epochs=5, batch_size=1024, micro_batch=256, blr=1e-3, min_lr=1e-6,
        weight_decay=0.05, layer_decay=0.75, drop_path=0.0, smoothing=0.1, mixup=0.8, cutmix=1.0, erasing=0.25,
        randaugment=9.0, crop_min=0.08, centre=0.875, eval_every=1),
    # Ours, after finetune.py's recipes of the same names.
    "cifar-specific": dict(
        distillation="hard", epochs=200, warmup_epochs=10, batch_size=512, micro_batch=512, blr=1e-3, min_lr=1e-6,
        weight_decay=0.05, layer_decay=0.75, drop_path=0.0, smoothing=0.1, mixup=0.8, cutmix=1.0, erasing=0.0,
        randaugment=9.0, crop_min=0.8, centre=1.0, eval_every=10),
    "demo-specific": dict(
        distillation="hard", labels=500, epochs=30, warmup_epochs=2, batch_size=32, micro_batch=256, blr=1.6e-2,
        min_lr=1e-6, weight_decay=0.05, layer_decay=0.75, drop_path=0.0, smoothing=0.1, mixup=0.0, cutmix=0.0,
        erasing=0.0, randaugment=0.0, crop_min=0.6, centre=1.0, eval_every=10),
}
# The authors' students (models_mae.py): 64 channels to a head, and a decoder that is thrown away with the predictor.
STUDENTS = {"tiny": dict(heads=3, decoder="128x4x4"), "small": dict(heads=6, decoder="256x4x8")}
OPTIONS = {
    "method": {
        "stage": (str, ("generic", "specific"), "generic (no labels, the default) or specific (classification)"),
        "teacher": (str, None, "generic: last.pth of mae.py, or an official MAE file with decoder; specific: model.pth "
                               "of finetune.py, or an official fine-tuned file"),
        "teacher_heads": (int, COUNT, "heads of the teacher, where its file does not say"),
        "crop_min": (float, SHARE, "smallest share of an image's area in a random crop"),
    },
    "generic stage": {
        "decoder": (str, None, "WIDTHxBLOCKSxHEADS of the student's decoder; tiny has 128x4x4, small 256x4x8"),
        "layer": (int, COUNT, "block of the teacher's decoder that is imitated, counted from 1, else half way: 4 of 8"),
        "tokens": (str, ("all", "masked", "visible"), "tokens that are compared: all, masked or visible"),
        "mask_ratio": (float, SHARE, "share of the patches hidden from both, else as in the teacher's training"),
        "teacher_decoder_heads": (int, COUNT, "heads of the teacher's decoder, else as its file says, or width / 32"),
    },
    "specific stage": {
        "init": (str, None, "encoder.pth of the generic stage or another; with --eval, model.pth"),
        "eval": (bool, None, "evaluate the classifier in --init, and nothing else"),
        "distillation": (str, ("hard", "nkd"), "hard (the teacher's top class, with its own token and head) or nkd"),
        "labels": (int, COUNT, "labelled training images in total, balanced over the classes; else all"),
        "layer_decay": (float, SHARE, "factor of the learning rate from block to block downwards"),
        "drop_path": (float, SHARE, "rate of stochastic depth in the last block, growing from 0"),
        "smoothing": (float, SHARE, "of the labels"),
        "mixup": (float, NOT_NEGATIVE, "alpha of MixUp; 0: none"),
        "cutmix": (float, NOT_NEGATIVE, "alpha of CutMix; 0: none"),
        "erasing": (float, SHARE, "probability of random erasing"),
        "randaugment": (float, (0, 10), "magnitude of timm's RandAugment, 0 to 10; 0: none"),
        "centre": (float, (0.01, 1), "share of the shorter side that is seen in evaluation"),
        "eval_every": (int, COUNT, "epochs between evaluations"),
    },
}


def check_stage(args: Namespace) -> None:
    """Raises InputError for options of the other stage, and names the command that makes a file that is not given."""
    other = dict(generic="specific", specific="generic")[args.stage]
    foreign = [name for name in OPTIONS[f"{other} stage"] if getattr(args, name) is not None]
    if args.stage == "specific":  # a file may not know its heads; in training, positions are stretched to --image-size
        free = ("heads",) if args.eval else ("heads", "image_size")
        foreign += [name for name in COMMON_OPTIONS["model"] if name not in free and getattr(args, name) is not None]
    if foreign:
        raise InputError(f"--{foreign[0].replace('_', '-')} is no option of --stage {args.stage}"
                         + (", where the network comes from --init" if foreign[0] in COMMON_OPTIONS["model"] else ""))
    if args.recipe and args.recipe.endswith("-specific") and args.stage == "generic":
        raise InputError(f"--recipe {args.recipe} is one of --stage specific")
    size = "--width 128 --heads 8" if args.data == "shapes" else f"--data {args.data} --model base"
    if args.stage == "generic" and args.teacher is None:
        raise InputError("--teacher is missing: an MAE with its decoder. Make one by\n"
                         f"  python mae.py {size} --out runs/teacher\nand give --teacher runs/teacher/last.pth")
    if args.stage == "specific" and args.init is None:
        raise InputError("--init is missing: the encoder that the generic stage makes, by\n"
                         f"  python g2sd.py --data {args.data} --teacher runs/teacher/last.pth --out runs/g2sd\n"
                         "and give --init runs/g2sd/encoder.pth")
    if args.stage == "specific" and args.teacher is None and not args.eval:
        raise InputError("--teacher is missing: a fine-tuned classifier. Make one by\n  python finetune.py "
                         f"--data {args.data} --init runs/teacher/encoder.pth --out runs/teacher-classes\n"
                         "and give --teacher runs/teacher-classes/model.pth")


def load_mae(args: Namespace) -> tuple[MaskedViT, dict]:
    """The frozen teacher of the generic stage, encoder and decoder, and its config; sets args.mask_ratio where it was
    not given. The teacher stays outside of the model: neither optimizer nor checkpoint ever meets it.

    Raises InputError for a file without decoder, or unless all weights of both halves match.
    """
    state, config = read_encoder(args.teacher, args.teacher_heads, "--teacher-heads")
    file = load_file(args.teacher)
    weights = weights_of(file)
    prefix = [name.removesuffix("decoder_embed.weight") for name in weights if name.endswith("decoder_embed.weight")]
    if not prefix:
        raise InputError(f"--teacher {args.teacher} holds an encoder only, but this stage imitates the teacher's "
                         "decoder. Give last.pth of mae.py, not encoder.pth; of the official files "
                         "mae_pretrain_vit_base_full.pth, not mae_pretrain_vit_base.pth")
    decoder = {name.removeprefix(prefix[0]): value for name, value in weights.items()
               if name.startswith((f"{prefix[0]}decoder_", f"{prefix[0]}mask_token"))}
    trained = file["args"] if isinstance(file.get("args"), dict) else {}  # ours; the official ones carry no plain types
    if args.mask_ratio is None:
        args.mask_ratio = trained.get("mask_ratio", 0.75)
    width = len(decoder["decoder_embed.weight"])
    depth = len({name.split(".")[1] for name in decoder if name.startswith("decoder_blocks.")})
    # Every decoder of MAE, MAE-Lite and G2SD has 32 channels to a head.
    heads = int(trained["decoder"].split("x")[2]) if trained.get("decoder") else max(1, width // 32)
    sizes = (width, depth, args.teacher_decoder_heads or heads)
    teacher = MaskedViT(ViT(**encoder_options(config)), sizes, args.mask_ratio)
    load_encoder(teacher.encoder, state, config, fresh=())
    own = {name: value for name, value in teacher.state_dict().items() if not name.startswith("encoder.")}
    wrong = [name for name in own if name not in decoder or decoder[name].shape != own[name].shape]
    wrong += [name for name in decoder if name not in own and not name.startswith(("decoder_norm.", "decoder_pred."))]
    if wrong:
        raise InputError(f"--teacher {args.teacher}: its decoder does not fit; missing, unknown or of another shape: "
                         f"{', '.join(wrong)}")
    teacher.load_state_dict({name: decoder[name] for name in own}, strict=False)
    return teacher.eval().requires_grad_(False), config


def build_generic(args: Namespace, teacher: MaskedViT) -> GenericStudent:
    """The student that the arguments describe, with weights drawn from --seed."""
    if args.decoder is None:
        raise InputError(f"--decoder WIDTHxBLOCKSxHEADS is needed: only {' and '.join(STUDENTS)} have a default")
    torch.manual_seed(args.seed)
    student = GenericStudent(ViT(**vit_options(args)), decoder_sizes(args.decoder), teacher.decoder_embed.out_features,
                             args.mask_ratio, args.tokens)
    sizes = [(vit.image_size, vit.patch_size, vit.grid) for vit in (teacher.encoder, student.encoder)]
    if sizes[0] != sizes[1]:
        told = ["{} pixels in patches of {}, a grid of {}".format(*size) for size in sizes]
        raise InputError(f"the teacher sees {told[0]}; the student {told[1]}. They are compared patch by patch: change "
                         "--image-size or --patch-size")
    if not 1 <= args.layer <= len(teacher.decoder_blocks):
        raise InputError(f"--layer {args.layer}: the teacher's decoder has blocks 1 to {len(teacher.decoder_blocks)}")
    return student


def load_trained(path: str, heads: int | None, flag: str, images: Images, data: str) -> tuple[ViT, dict]:
    """A classifier that this script or finetune.py wrote, or an official one, and its config. Raises InputError unless
    it knows as many classes as the data have."""
    state, config = read_encoder(path, heads, flag)
    if config["classes"] != len(images.classes):
        knows = f"knows {config['classes']} classes" if config["classes"] else "is no classifier"
        raise InputError(f"{path} {knows}, but --data {data} has {len(images.classes)} classes")
    size = {name: value for name, value in config.items() if name not in ("mean", "std")}
    model = SpecificStudent("head_dist.weight" in state, **size) if "dist_token" in state else ViT(**size)
    load_encoder(model, state, config, fresh=())
    return model, config


def build_specific(args: Namespace, state: dict, config: dict, classes: int) -> SpecificStudent:
    """The student with the encoder of --init. Raises InputError unless exactly the token and the heads are new."""
    new = ("dist_token", "head.", "head_dist.")
    known = [name for name in state if name.startswith(new)]
    if known:
        raise InputError(f"--init {args.init} is a classifier already, with {', '.join(known)}; give the encoder.pth "
                         "of the generic stage")
    torch.manual_seed(args.seed)
    size = encoder_options(config, image_size=args.image_size or config["image_size"], last_heads=None)
    student = SpecificStudent(args.distillation == "hard", **size, classes=classes, drop_path=args.drop_path)
    load_encoder(student, state, config, fresh=new)
    student.pos_embed.requires_grad_(True)  # fixed in the first stage, learned in this one
    return student


# -------------------------------------------------------------------- the run


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv, __doc__, RECIPES, OPTIONS)
    args.stage = args.stage or "generic"
    check_stage(args)
    world = start_processes(args)
    if args.stage == "generic":
        generic(args, world)
    else:
        specific(args, world)


def generic(args: Namespace, world: World) -> None:
    teacher, config = load_mae(args)
    args.mean, args.std = config["mean"], config["std"]  # both see the same tensor
    if args.layer is None:
        args.layer = max(1, len(teacher.decoder_blocks) // 2)  # 4 of 8 in the paper
    images = open_images(args)
    apply_recipe(args, recipe_for(args, images), RECIPES)
    for name, value in STUDENTS.get(args.model, {}).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    model = build_generic(args, teacher)
    out, checkpoint = open_run(args, "g2sd")
    teacher.to(world.device)
    wrapped = wrap(model, args, world)
    encoder, config = model.encoder, dict(model.encoder.config, mean=list(args.mean), std=list(args.std))

    parts, steps = parts_of_batch(args, world), len(images) // args.batch_size
    last, lr = round(args.epochs * steps), args.blr * args.batch_size / 256
    # Class and mask token decay like matrices, as in the authors' code; learned positions do not.
    groups = param_groups(model, args.weight_decay, undecayed=("encoder.pos_embed", "decoder_pos_embed"))
    optimizer = torch.optim.AdamW(groups, lr, betas=(0.9, 0.95), fused=args.device == "cuda")
    scaler = torch.amp.GradScaler(args.device, enabled=args.precision == "fp16")
    first = load_checkpoint(checkpoint, model, optimizer, scaler) if checkpoint else 0
    normalize = normalizer(args.mean, args.std, world.device)
    loader = Batches(images, View(encoder.image_size, (args.crop_min, 1.0)), args, world, first, last)
    log = Log(args, out, world, loader)
    if world.main:
        say(f"G2SD generic, recipe {args.recipe}: {len(images)} images, {last} steps of {args.batch_size}, learning "
              f"rate {lr:.3g}, block {args.layer} of {len(teacher.decoder_blocks)} of the teacher's decoder, "
              f"{args.precision} on {world.size} x {args.device} -> {out}")

    def save(step: int) -> None:
        save_checkpoint(out, "g2sd", step, model, config, optimizer, scaler, args)
        write_file(dict(model=encoder.state_dict(), config=config), out / "encoder.pth")

    step = first
    for step in range(first + 1, last + 1):
        set_lr(optimizer, rate := cosine((step - 1) / steps, lr, args.min_lr, args.warmup_epochs, args.epochs))
        noise = drawn(encoder.patches, MASKS, step, args, world)                        # rows N
        sums = {}
        for part, part_noise in enumerate(noise.chunk(parts), start=1):
            pixels = normalize(next(loader)[0])                                         # B C h w
            with gradients_shared(wrapped, now=part == parts):
                with autocast(args):
                    target = generic_target(teacher, pixels, part_noise, args.layer)    # B 1+N T
                    losses = wrapped(pixels, part_noise, target)
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
        say(f"next:  python finetune.py --data {args.data} --init {out}/encoder.pth\n"
            f"or     python g2sd.py --stage specific --data {args.data} --init {out}/encoder.pth --teacher MODEL.pth\n"
            "       (MODEL.pth: the teacher, fine-tuned by finetune.py)")


def specific(args: Namespace, world: World) -> None:
    val = open_images(args, "val", labels=True)
    images = val if args.eval else open_images(args, "train", labels=True)
    apply_recipe(args, recipe_for(args, images).removesuffix("-specific") + "-specific", RECIPES)
    if args.eval:
        model, config = load_trained(args.init, args.heads, "--heads", val, args.data)
        normalize = normalizer(config["mean"], config["std"], world.device)
        view = View(model.image_size, centre=args.centre)
        print_result(evaluate(model.to(world.device), val, view, normalize, args, world), world)
        return
    state, config = read_encoder(args.init, args.heads)
    args.mean, args.std = config["mean"], config["std"]
    model = build_specific(args, state, config, len(images.classes))
    teacher, its = load_trained(args.teacher, args.teacher_heads, "--teacher-heads", images, args.data)
    for what, a, b in (("image size", teacher.image_size, model.image_size), ("pixel mean", its["mean"], args.mean),
                       ("pixel deviation", its["std"], args.std)):
        if list(a) != list(b):
            raise InputError(f"the teacher has {what} {list(a)}, the student {list(b)}, but both see the same tensor")
    teacher.to(world.device).eval().requires_grad_(False)
    if args.labels:
        images = balanced(images, args.labels, args.seed)
    out, checkpoint = open_run(args, "g2sd")
    wrapped = wrap(model, args, world)
    config = dict(model.config, mean=list(args.mean), std=list(args.std))

    parts, steps = parts_of_batch(args, world), len(images) // args.batch_size
    last, lr = round(args.epochs * steps), args.blr * args.batch_size / 256
    groups = param_groups(model, args.weight_decay, ("cls_token", "pos_embed"), args.layer_decay)
    optimizer = torch.optim.AdamW(groups, lr, betas=(0.9, 0.999), fused=args.device == "cuda")
    scaler = torch.amp.GradScaler(args.device, enabled=args.precision == "fp16")
    first = load_checkpoint(checkpoint, model, optimizer, scaler) if checkpoint else 0
    normalize = normalizer(args.mean, args.std, world.device)
    view = View(model.image_size, (args.crop_min, 1.0), randaugment=args.randaugment)
    centre = View(model.image_size, centre=args.centre)
    mix = mixing(args.mixup, args.cutmix, len(images.classes))
    loader = Batches(images, view, args, world, first, last)
    log = Log(args, out, world, loader)
    if world.main:
        say(f"G2SD specific, recipe {args.recipe}: {len(images)} images of {len(images.classes)} classes, {last} "
              f"steps of {args.batch_size}, learning rate {lr:.3g}, {args.precision} on {world.size} x {args.device} "
              f"-> {out}")

    def save(step: int) -> None:
        save_checkpoint(out, "g2sd", step, model, config, optimizer, scaler, args)
        write_file(dict(model=model.state_dict(), config=config), out / "model.pth")

    step = first
    for step in range(first + 1, last + 1):
        set_lr(optimizer, rate := cosine((step - 1) / steps, lr, args.min_lr, args.warmup_epochs, args.epochs))
        sums = {}
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
                    with torch.no_grad():
                        answers = teacher(pixels)                                       # B K
                    by_class, by_token = wrapped(pixels)
                losses = specific_loss(by_class, by_token, labels, answers, args.smoothing)
                scaler.scale(losses["loss"] / parts).backward()
            sums = {name: sums.get(name, 0) + loss.detach() / parts for name, loss in losses.items()}
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

        if log.step(step, rate, **sums):
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


if __name__ == "__main__":
    launch(main)

"""Generic-to-specific distillation (G2SD): a small ViT imitates a large MAE, without labels, then a large classifier.

Huang et al., arXiv 2302.14771; of the paper we know the abstract and the two losses, all else is from the authors' code
(pengzhiliang/G2SD).

    generic    both see the same random 25 % of the patches; no labels
               target = LayerNorm(state of the teacher's decoder after its block 4 of 8), no scale and shift
               loss   = smooth_l1(MLP(student's decoder), target), beta = 2, mean over all tokens
    specific   [class token, patches, distillation token] -> y_c, y_d, by a linear head each
               loss   = (CE(y_c, labels) + CE(y_d, argmax of the teacher)) / 2;   at inference y = (y_c + y_d) / 2

The first stage gives a plain encoder, the second a classifier. Watch the generic loss: predicting zeros gives about
0.247 (logged as `zeros`), and a run that stays near it learns nothing.

Run    python mae.py --width 128 --heads 8 --blr 6e-3 --out runs/teacher                 the demo's teacher
       python g2sd.py --teacher runs/teacher/last.pth                                    stage 1 -> runs/g2sd-demo
       python finetune.py --init runs/teacher/encoder.pth --out runs/teacher-classes     the teacher learns labels
       python g2sd.py --stage specific --init runs/g2sd-demo/encoder.pth --teacher runs/teacher-classes/model.pth
       torchrun --standalone --nproc_per_node=8 g2sd.py --data /imagenet --teacher mae_pretrain_vit_base_full.pth
Use    from g2sd import GenericStudent, SpecificStudent                                  copy this file and vit.py
Letters in shape comments: B images, C channels, N patches, n kept patches, D encoder width, E decoder width,
       T width of the teacher's decoder, K classes
"""
from argparse import ArgumentParser, Namespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vit import (SIZES, Block, InputError, ViT, init_linear, load_encoder, load_file, param_groups, position_table,
                 read_encoder, take, weights_of)

# -------------------------------------------------------------------- the method: generic stage


class MaskedViT(nn.Module):
    """A ViT that sees a random subset of the patches, and a light decoder that works on all of them.

    decoder          width, blocks, heads
    mask_ratio       share of the patches that the encoder does not see
    decoder_config   MLP ratio, activation, qkv_bias and positions of the decoder, where they are not the encoder's
    """

    def __init__(self, encoder: ViT, decoder: tuple[int, int, int], mask_ratio: float = 0.75,
                 decoder_config: dict | None = None):
        super().__init__()
        patches, (width, depth, heads) = encoder.patches, decoder
        self.kept = int(patches * (1 - mask_ratio))  # cut, not rounded: as in all official code
        if not 0 < self.kept < patches:
            raise InputError(f"mask ratio {mask_ratio} leaves {self.kept} of {patches} patches to see: at least "
                             "one must be seen and one hidden")
        config = {**encoder.config, **(decoder_config or {})}
        self.encoder = encoder
        self.decoder_embed = nn.Linear(encoder.width, width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, width).normal_(std=0.02))
        self.decoder_pos_embed = nn.Parameter(position_table(config["positions"], width, encoder.grid),
                                              config["positions"] == "learned")
        self.decoder_blocks = nn.ModuleList(Block(width, heads, config["mlp_ratio"], config["act"], config["qkv_bias"])
                                            for _ in range(depth))
        self.decoder_embed.apply(init_linear)
        self.decoder_blocks.apply(init_linear)

    def encode(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """images B C h w, noise B N -> tokens of the kept patches B 1+n D, and `restore` B N."""
        keep, restore = random_masking(noise, self.kept)
        return self.encoder.encode(images, keep), restore

    def decode(self, z: Tensor, restore: Tensor, blocks: int | None = None) -> Tensor:
        """z B 1+n D, restore B N -> state of all tokens B 1+N E after the decoder's last block, or (for G2SD) after its
        first `blocks`."""
        z = self.decoder_embed(z)                                                       # B 1+n E
        masks = self.mask_token.expand(len(z), restore.shape[1] + 1 - z.shape[1], -1)   # B N-n E
        patches = take(torch.cat([z[:, 1:], masks], dim=1), restore)                    # B N E, in their places
        y = torch.cat([z[:, :1], patches], dim=1) + self.decoder_pos_embed              # B 1+N E
        for block in self.decoder_blocks[:blocks]:
            y = block(y)
        return y


def random_masking(noise: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """noise B N -> indices of the n = `kept` patches with the lowest noise, B n, and `restore` B N: the rank of every
    patch by its noise. Patch i is hidden if restore[i] >= n; tokens sorted by noise return to image order by this
    index."""
    order = noise.argsort(dim=1, stable=True)  # ties fall alike on CPUs and GPUs
    return order[:, :kept], order.argsort(dim=1)  # the second argsort inverts the permutation: restore[order[k]] = k


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
        # As in the authors' code; discarded with the decoder.
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
        hidden = restore >= self.kept                                                   # B N
        chosen = hidden if self.tokens == "masked" else ~hidden
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

    options      of ViT
    token_head   whether the token has a head of its own; NKD distills into the class token's instead
    """

    def __init__(self, options: dict, token_head: bool = True):
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
        x = self.norm(self.through(x))
        by_class = self.head(x[:, 0])                                                   # B K
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
from vit import (STEP, CentreCrop, Images, Run, Views, World, amount, balanced, classes_of, common_options, count,
                 default_recipe, evaluate, launch, load_init, mixing, open_images, parse, print_result, random_crop,
                 random_erasing, say, say_next, share, start, torch_seed, vit_options, within)

# The authors' SD.sh and main_finetune_dis.py, ViT-S.
SPECIFIC = dict(
    distillation="hard", epochs=200, warmup_epochs=5, batch_size=1024, blr=1e-3, min_lr=1e-6,
    weight_decay=0.05, layer_decay=0.75, drop_path=0.0, smoothing=0.1, mixup=0.8, cutmix=1.0, erasing=0.25,
    randaugment=9.0, crop_min=0.08, centre=0.875, eval_every=1)
RECIPES = {
    # The authors' GD.sh and main_distill.py for ViT-S; they have no script of its own for ViT-T (--model tiny).
    "imagenet": dict(
        model="small", image_size=224, tokens="all", crop_min=0.2,
        epochs=300, warmup_epochs=10, batch_size=4096, blr=1.5e-4, min_lr=2.5e-6, weight_decay=0.05),
    # Ours: the network of mae.py's recipe for small images, so that the two compare.
    "cifar": dict(
        model="tiny", heads=12, image_size=36, patch_size=3, mlp_ratio=2.0, act="relu", qkv_bias=False,
        positions="learned", decoder=(128, 4, 4), tokens="all", crop_min=0.6,
        epochs=800, warmup_epochs=40, batch_size=1024, blr=1.5e-4, min_lr=0.0, weight_decay=0.05),
    # Ours: some four minutes on one CPU core.
    "demo": dict(
        model="demo", image_size=32, patch_size=4, decoder=(64, 1, 2), tokens="all", crop_min=0.6,
        epochs=8, warmup_epochs=0.5, batch_size=64, blr=1.2e-2, min_lr=0.0, weight_decay=0.05),
    "imagenet-specific": SPECIFIC,
    # Ours, after finetune.py's recipes of the same names.
    "cifar-specific": dict(SPECIFIC, warmup_epochs=10, batch_size=512, drop_path=0.1, erasing=0.0,
                           crop_min=0.8, centre=1.0, eval_every=10),
    "demo-specific": dict(SPECIFIC, labels=500, epochs=50, warmup_epochs=2, batch_size=32, blr=1.6e-2, mixup=0.0,
                          cutmix=0.0, erasing=0.0, randaugment=0.0, crop_min=0.6, centre=1.0, eval_every=10),
}
# The authors' default students (models_mae.py): 64 channels to a head. The decoder goes with the predictor.
STUDENTS = {"tiny": dict(heads=3, decoder=(128, 4, 4)), "small": dict(heads=6, decoder=(256, 4, 8))}


def parse_args(argv: list[str] | None) -> tuple[Namespace, MaskedViT | tuple[dict, dict]]:
    """The command line, completed by the file that it follows, and what is in this file: the teacher of the generic
    stage, or what `read_encoder` gives for --init."""
    alone = ArgumentParser(add_help=False, allow_abbrev=False)
    alone.add_argument("--stage", default="generic")
    stage = alone.parse_known_args(argv)[0].stage
    parser = common_options(__doc__, RECIPES)
    add = parser.add_argument_group("method").add_argument
    add("--stage", choices=["generic", "specific"], default="generic", help="generic (no labels) or specific "
        "(classification); each has options of its own: see --stage specific --help")
    add("--teacher", help="generic: last.pth of mae.py, or an official MAE file with decoder; specific: model.pth of "
        "finetune.py, or an official fine-tuned file")
    add("--teacher-heads", type=count, help="heads of the teacher, where its file does not say")
    add = parser.add_argument_group(f"{stage} stage").add_argument
    if stage == "generic":
        add("--decoder", type=count, nargs=3, metavar=("WIDTH", "BLOCKS", "HEADS"), help="of the student's decoder; "
            "else the recipe's, or by --model: 128 4 4 for tiny, 256 4 8 for small")
        add("--layer", type=count, help="imitated block of the teacher's decoder, from 1; else half way: 4 of 8")
        add("--tokens", choices=["all", "masked", "visible"], help="tokens that are compared")
        add("--mask-ratio", type=share, help="share of the patches hidden from both; else as in the teacher's training")
        add("--teacher-decoder-heads", type=count, help="of the teacher, where its file does not say; MAE's have 16")
    else:
        add("--eval", action="store_true", help="evaluate the classifier in --init, a model.pth, and nothing else")
        add("--distillation", choices=["hard", "nkd"], help="hard: a token learns the teacher's class; nkd: nkd_loss")
        add("--labels", type=count, help="labelled training images in total, balanced over the classes; else all")
        add("--layer-decay", type=share, help="factor of the learning rate from block to block downwards")
        add("--drop-path", type=share, help="rate of stochastic depth in the last block, growing from 0")
        add("--smoothing", type=share, help="of the labels")
        add("--mixup", type=amount, help="alpha of MixUp; 0: none")
        add("--cutmix", type=amount, help="alpha of CutMix; 0: none")
        add("--erasing", type=share, help="probability of random erasing")
        add("--randaugment", type=within(0, 10), help="magnitude of timm's RandAugment, 0 to 10; 0: none")
        add("--centre", type=within(0.01, 1), help="share of the shorter side that is seen in evaluation")
        add("--eval-every", type=count, help="epochs between evaluations")
    args = parse(parser, argv, RECIPES, recipe_of_stage)
    check_stage(args)
    if args.stage == "generic":
        loaded, config, args.mask_ratio = load_mae(args)
        args.layer = args.layer or max(1, len(loaded.decoder_blocks) // 2)  # 4 of 8 in the authors' code
        args.mean, args.std = config["mean"], config["std"]  # student and teacher see the same tensor
    else:
        loaded = read_encoder(args.init, args.heads)
    return args, loaded


def recipe_of_stage(given: Namespace) -> str:
    """Name of the recipe. Those of the specific stage end in -specific, which --recipe may leave out."""
    name = default_recipe(given)
    if given.stage == "specific":
        return name.removesuffix("-specific") + "-specific"
    if name.endswith("-specific"):
        raise InputError(f"--recipe {name} is one of --stage specific")
    return name


def check_stage(args: Namespace) -> None:
    """Raises InputError if a file is missing, with the command that makes it."""
    data = f"--data {args.data}"
    if args.stage == "generic" and args.teacher is None:
        size = "--width 128 --heads 8 --blr 6e-3" if args.data == "shapes" else f"{data} --model base"
        raise InputError("--teacher is missing: an MAE with its decoder. Make one by\n"
                         f"  python mae.py {size} --out runs/teacher\nand give --teacher runs/teacher/last.pth")
    if args.stage == "specific":
        if args.init is None or args.teacher is None and not args.eval:
            raise InputError("--init (an encoder) or --teacher (a classifier) is missing. Make them by\n"
                             f"  python g2sd.py {data} --teacher runs/teacher/last.pth --out runs/g2sd\n"
                             f"  python finetune.py {data} --init runs/teacher/encoder.pth --out runs/classes\n"
                             "and give --init runs/g2sd/encoder.pth --teacher runs/classes/model.pth")


def load_mae(args: Namespace) -> tuple[MaskedViT, dict, float]:
    """The frozen teacher of the generic stage, its config, and the share of patches to hide. The teacher stays outside
    of the model, so neither optimizer nor checkpoint ever meets it. Raises InputError for a file without decoder, or
    unless all weights of both halves match."""
    state, config = read_encoder(args.teacher, args.teacher_heads, "--teacher-heads")
    file = load_file(args.teacher)
    weights = weights_of(file)
    prefix = [name.removesuffix("decoder_embed.weight") for name in weights if name.endswith("decoder_embed.weight")]
    if not prefix:
        raise InputError(f"--teacher {args.teacher} has no decoder to be imitated. Give last.pth of mae.py, "
                         "not encoder.pth; or mae_pretrain_vit_base_full.pth, not mae_pretrain_vit_base.pth")
    decoder = {name.removeprefix(prefix[0]): value for name, value in weights.items()
               if name.startswith((f"{prefix[0]}decoder_", f"{prefix[0]}mask_token"))
               and "decoder_norm." not in name and "decoder_pred." not in name}         # these two are never run
    trained = file["args"] if isinstance(file.get("args"), dict) else {}  # ours; in official files a Namespace
    ratio = trained.get("mask_ratio", 0.75) if args.mask_ratio is None else args.mask_ratio
    width, said = len(decoder["decoder_embed.weight"]), trained.get("decoder")
    depth = len({name.split(".")[1] for name in decoder if name.startswith("decoder_blocks.")})
    usual = 16 if width == 512 else 0  # MAE's
    heads = args.teacher_decoder_heads or (said[2] if isinstance(said, (list, tuple)) and len(said) == 3 else usual)
    if not heads:
        raise InputError(f"--teacher {args.teacher} does not say how many heads its decoder, {width} wide, has: give "
                         "--teacher-decoder-heads (3 or 6 in MAE-Lite's, 96 or 192 wide)")
    encoder = ViT(**dict(config, pool="cls", classes=0))
    try:
        teacher = MaskedViT(encoder, (width, depth, heads), ratio, trained.get("decoder_config"))
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise InputError(f"--teacher {args.teacher}: its settings do not describe its decoder: {error}") from None
    load_encoder(teacher.encoder, state, config, fresh=())
    own = {(name, x.shape) for name, x in teacher.state_dict().items() if not name.startswith("encoder.")}
    if wrong := {name for name, _ in own ^ {(name, x.shape) for name, x in decoder.items()}}:
        raise InputError(f"--teacher {args.teacher}: missing, unknown or of another shape: {', '.join(sorted(wrong))}")
    teacher.load_state_dict(decoder, strict=False)
    return teacher.eval().requires_grad_(False), config, ratio


def build_generic(args: Namespace, teacher: MaskedViT) -> GenericStudent:
    """The student that the arguments describe, with weights drawn from --seed."""
    torch.manual_seed(args.seed)
    own = {**SIZES[args.model], "decoder": None, **STUDENTS.get(args.model, {})}
    decoder, heads = args.decoder or own["decoder"], args.heads or own["heads"]
    if decoder is None:
        raise InputError(f"--decoder WIDTH BLOCKS HEADS is needed: only {' and '.join(STUDENTS)} have a default")
    encoder = load_init(ViT(**{**vit_options(args), "heads": heads}), args)
    student = GenericStudent(encoder, decoder, teacher.decoder_embed.out_features, args.mask_ratio, args.tokens)
    theirs, ours = ((*vit.image_size, vit.patch_size) for vit in (teacher.encoder, student.encoder))
    if theirs != ours:
        raise InputError("the teacher sees {} x {} pixels in patches of {}, the student {} x {} in patches of {}: they "
                         "are compared patch by patch; change --image-size or --patch-size".format(*theirs, *ours))
    if args.layer > len(teacher.decoder_blocks):
        raise InputError(f"--layer {args.layer}: the teacher's decoder has blocks 1 to {len(teacher.decoder_blocks)}")
    return student


def build_specific(args: Namespace, state: dict, config: dict, classes: int) -> SpecificStudent:
    """The student with the encoder of --init. Raises InputError unless exactly the token and the heads are new."""
    new = ("dist_token", "head.", "head_dist.")
    if known := [name for name in state if name in ("dist_token", "head.weight", "head_dist.weight")]:
        raise InputError(f"--init {args.init} is a classifier already, with {', '.join(known)}; give an encoder.pth")
    torch.manual_seed(args.seed)
    options = dict(config, image_size=args.image_size, last_heads=None, pool="cls", classes=classes,
                   drop_path=args.drop_path)
    student = SpecificStudent(options, args.distillation == "hard")
    load_encoder(student, state, config, fresh=new)
    student.pos_embed.requires_grad_(True)  # a sin-cos table, too, is learned in this stage
    return student


def load_trained(path: str, state: dict, config: dict, images: Images) -> ViT:
    """A classifier of this script, of finetune.py or an official one. Raises InputError unless it knows the classes."""
    classes_of(path, config, images.classes)
    model = SpecificStudent(config, "head_dist.weight" in state) if "dist_token" in state else ViT(**config)
    load_encoder(model, state, config, fresh=())
    return model


def load_teacher(args: Namespace, student: SpecificStudent, images: Images) -> ViT:
    """The frozen teacher of the specific stage. Raises InputError unless it sees the same tensor as the student."""
    state, config = read_encoder(args.teacher, args.teacher_heads, "--teacher-heads")
    for name in ("image_size", "mean", "std"):
        if config[name] != student.config[name]:
            raise InputError(f"the teacher has {name} {config[name]}, the student {student.config[name]}; both see the "
                             "same tensor")
    return load_trained(args.teacher, state, config, images).eval().requires_grad_(False)


# -------------------------------------------------------------------- the run


def main(argv: list[str] | None = None) -> None:
    args, loaded = parse_args(argv)
    world = start(args)
    if args.stage == "generic":
        generic(args, loaded, world)
    elif args.eval:
        if args.image_size != loaded[1]["image_size"]:
            raise InputError(f"--image-size: {args.init} is evaluated as it was trained, at {loaded[1]['image_size']}")
        val = open_images(args, "val", labels=True)
        model = load_trained(args.init, *loaded, val).to(world.device)
        print_result(evaluate(model, val, CentreCrop(model.image_size, args.centre), args, world), world)
    else:
        specific(args, *loaded, world)


def generic(args: Namespace, teacher: MaskedViT, world: World) -> None:
    images, teacher = open_images(args), teacher.to(world.device)
    model = build_generic(args, teacher).to(world.device)
    encoder = model.encoder
    # As in the authors' code, class and mask token decay like matrices; learned positions do not.
    groups = param_groups(model, args.weight_decay, undecayed=("encoder.pos_embed", "decoder_pos_embed"))
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    run = Run("g2sd", args, world, images, model, encoder, optimizer)
    wrapped, scaler = world.wrap(model, args.compile), run.scaler

    # In worker processes: crop, mirroring, and a number for every patch (the mask), all from (seed, epoch, image).
    views = Views(images, random_crop(encoder.image_size, args.crop_min), args.seed, numbers=encoder.patches)
    with run.batches(views) as batches:
        for step in run.steps(batches):
            for part in range(1, run.parts + 1):
                pixels, noise, _ = next(batches)                                # B C h w in 0..1; on the host B N
                pixels, noise = encoder.normalize(pixels), world.send(noise)
                with world.share_gradients(wrapped, now=part == run.parts):
                    with world.autocast():
                        target = generic_target(teacher, pixels, noise, args.layer)     # B 1+N T
                        losses = wrapped(pixels, noise, target)
                    scaler.scale(losses["loss"] / run.parts).backward()
                run.add(**losses)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    if world.rank == 0:
        say_next(args, f"{run.out}/encoder.pth")
        say("or the second stage: g2sd.py --stage specific, with this file as --init and a fine-tuned --teacher")


def specific(args: Namespace, state: dict, config: dict, world: World) -> None:
    images, val = open_images(args, "train", labels=True), open_images(args, "val", labels=True)
    if args.labels:
        images = balanced(images, args.labels, args.seed)
    model = build_specific(args, state, config, len(images.classes)).to(world.device)
    teacher = load_teacher(args, model, images).to(world.device)
    groups = param_groups(model, args.weight_decay, ("cls_token", "pos_embed"), args.layer_decay)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), fused=True)
    run = Run("g2sd", args, world, images, model, model, optimizer)
    wrapped, scaler = world.wrap(model, args.compile), run.scaler

    views = Views(images, random_crop(model.image_size, args.crop_min, args.randaugment), args.seed)
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
                        by_class, by_token = wrapped(pixels)                            # B K each
                        losses = specific_loss(by_class, by_token, labels, teacher(pixels), args.smoothing)
                    scaler.scale(losses["loss"] / run.parts).backward()
                run.add(**losses)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    print_result(run.evaluate(run.last, val, centre), world)


if __name__ == "__main__":
    launch(main)

"""Masked autoencoder (MAE): hide 75 % of the patches, encode the rest, reconstruct the hidden ones.

He et al., arXiv 2111.06377; for ViT-Tiny with the recipe of MAE-Lite, Wang et al., arXiv 2205.14443.

    keep = a random 25 % of the patches, drawn anew for every image
    z    = encoder([class token, patches[keep]])          the encoder never sees a hidden patch
    y    = decoder([z at the kept positions, mask token elsewhere])
    loss = mean of (y - t)^2 over the hidden patches,  t = (pixels - mean) / sqrt(variance + 1e-6) within each patch

With --teacher, D-MAE (MAE-Lite): the raw attention scores q k^T / sqrt(d) of the last block also learn to match those
of a larger MAE; with --decode-from K as well, D2-MAE: the decoder reads the normalised state after block K, and the
blocks above learn from the teacher alone. With --recipe cifar, the small-image variant of Tan, arXiv 2402.03752: the
loss on the visible patches is added with a small weight.

Run    python mae.py                                          generated shapes, minutes on a laptop
       python mae.py --data /imagenet                         one GPU, or the CPU
       torchrun --standalone --nproc_per_node=8 mae.py --data /imagenet    eight GPUs
       python mae.py --data /imagenet --teacher mae_pretrain_vit_base.pth
Writes encoder.pth (the encoder and its config) and last.pth (all that --resume needs) every ten minutes and at the end,
       log.jsonl, args.json, pictures/ and reconstruction.png
Use    from mae import MaskedAutoencoder                      copy this file and vit.py
       loss = MaskedAutoencoder(ViT(**SIZES["tiny"]))(images)["loss"]
Letters in shape comments: B images, C channels, h and w height and width in pixels, p patch side, N patches,
       n kept patches, L = 1 + n tokens, D encoder width, E decoder width, H heads, d = D / H
"""
from argparse import BooleanOptionalAction, Namespace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.utils import make_grid, save_image

from vit import (IMAGENET_MEAN, IMAGENET_STD, Block, InputError, ViT, init_linear, layer_norm, load_encoder,
                 param_groups, position_table, read_encoder, relation, take)

# -------------------------------------------------------------------- the method


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


class MaskedAutoencoder(MaskedViT):
    """MAE: a MaskedViT whose decoder predicts pixels.

    norm_pix        compare with pixels normalised within each patch
    visible_weight  weight of the mean error on visible patches (alpha of arXiv 2402.03752); 0: plain MAE
    """

    def __init__(self, encoder: ViT, decoder: tuple[int, int, int] = (96, 1, 3), mask_ratio: float = 0.75,
                 norm_pix: bool = True, visible_weight: float = 0.0, decoder_config: dict | None = None):
        super().__init__(encoder, decoder, mask_ratio, decoder_config)
        self.norm_pix, self.visible_weight = norm_pix, visible_weight
        self.decoder_norm = layer_norm(decoder[0])
        self.decoder_pred = nn.Linear(decoder[0], encoder.patch_size ** 2 * encoder.channels)
        self.decoder_pred.apply(init_linear)

    def forward(self, images: Tensor, noise: Tensor | None = None) -> dict[str, Tensor]:
        """images B C h w, normalised; noise B N in 0..1, else drawn here -> {"loss": mean squared error}."""
        if noise is None:
            noise = torch.rand(len(images), self.encoder.patches, device=images.device)
        z, restore = self.encode(images, noise)
        return dict(loss=self.reconstruction_loss(images, self.predict(z, restore), restore >= self.kept))

    def predict(self, z: Tensor, restore: Tensor) -> Tensor:
        """Pixels of all patches, B N ppC."""
        return self.decoder_pred(self.decoder_norm(self.decode(z, restore)))[:, 1:]

    def reconstruction_loss(self, images: Tensor, prediction: Tensor, hidden: Tensor) -> Tensor:
        """Mean squared error on the hidden patches, plus visible_weight times that on the others; prediction B N ppC,
        hidden B N (true or false)."""
        target = self.target(images)                                                    # B N ppC
        error = (prediction.to(target.dtype) - target).square().mean(-1)                # B N
        loss = (error * hidden).sum() / hidden.sum()
        if self.visible_weight:
            loss = loss + self.visible_weight * (error * ~hidden).sum() / (~hidden).sum()
        return loss

    def target(self, images: Tensor) -> Tensor:
        """What is to be predicted, at least float32: images B C h w -> B N ppC."""
        target = patchify(images, self.encoder.patch_size)
        target = target.to(torch.promote_types(target.dtype, torch.float32))            # whatever autocast does
        if self.norm_pix:
            mean, std = patch_statistics(target)
            target = (target - mean) / std
        return target

    @torch.no_grad()
    def reconstruct(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The prediction and the target, both as images B C h w, and which pixels were hidden (B 1 h w, 0 or 1). With
        norm_pix both are normalised within each patch: mean and deviation of a hidden patch are not predicted, and to
        take the true ones would show what the network does not know."""
        z, restore = self.encode(images, noise)
        patch_size, grid = self.encoder.patch_size, self.encoder.grid
        hidden = (restore >= self.kept).float().view(-1, 1, *grid)
        hidden = hidden.repeat_interleave(patch_size, 2).repeat_interleave(patch_size, 3)
        values = self.predict(z, restore).float(), self.target(images)
        return *(unpatchify(x, patch_size, grid) for x in values), hidden


def patchify(images: Tensor, p: int) -> Tensor:
    """B C h w -> B N ppC, patches row by row; inside a patch row, column, channel with the channel fastest."""
    x = images.unflatten(3, (-1, p)).unflatten(2, (-1, p))                              # B C rows p columns p
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(patches: Tensor, p: int, grid: tuple[int, int]) -> Tensor:
    """B N ppC -> B C h w: the inverse of `patchify`."""
    x = patches.unflatten(2, (p, p, -1)).unflatten(1, grid)                             # B rows columns p p C
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def patch_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each patch over pixels and channels together, B N 1; the variance is the unbiased one."""
    return patches.mean(-1, keepdim=True), (patches.var(-1, keepdim=True) + 1e-6).sqrt()


# -------------------------------------------------------------------- with a teacher


class DistilledMAE(MaskedAutoencoder):
    """D-MAE: in addition to reconstructing, the student matches the raw attention scores of a teacher that sees the
    same patches in the same order, class token included. A bias-free linear layer across the heads (`adapters`, as
    1 x 1 convolutions) maps the student's heads to the teacher's; it is trained jointly and then discarded.

    loss = reconstruction + weight * sum over `layers` of mean (adapter(S_student) - S_teacher)^2,   S = q k^T / sqrt(d)
    layers          numbers of the compared blocks, counted from 1
    teacher_heads   how many heads the teacher has in each of them
    """

    def __init__(self, encoder: ViT, decoder: tuple[int, int, int] = (96, 1, 3), mask_ratio: float = 0.75,
                 norm_pix: bool = True, visible_weight: float = 0.0, decoder_config: dict | None = None, *,
                 teacher_heads: list[int], layers: list[int], weight: float = 1.0):
        super().__init__(encoder, decoder, mask_ratio, norm_pix, visible_weight, decoder_config)
        self.layers, self.weight = layers, weight
        self.adapters = nn.ModuleList(nn.Conv2d(encoder.blocks[layer - 1].attn.heads, heads, 1, bias=False)
                                      for layer, heads in zip(layers, teacher_heads, strict=True))

    def forward(self, images: Tensor, noise: Tensor, teacher_scores: list[Tensor]) -> dict[str, Tensor]:
        """images B C h w, noise B N, what `observe_teacher` gave -> the loss and its two terms."""
        keep, restore = random_masking(noise, self.kept)
        scores, z = self.observe(images, keep)
        reconstruction = self.reconstruction_loss(images, self.predict(z, restore), restore >= self.kept)
        with torch.autocast(images.device.type, enabled=False):
            attention = sum(F.mse_loss(adapter(student), teacher)
                            for adapter, student, teacher in zip(self.adapters, scores, teacher_scores, strict=True))
        return dict(loss=reconstruction + self.weight * attention, reconstruction=reconstruction, attention=attention)

    @torch.no_grad()
    def observe_teacher(self, teacher: ViT, images: Tensor, noise: Tensor) -> list[Tensor]:
        """The teacher's raw scores for each layer, B heads L L, on the very patches that the student keeps: same noise,
        same mask."""
        keep, _ = random_masking(noise, self.kept)
        return attention_scores(teacher, images, keep, self.layers)[0]

    def observe(self, images: Tensor, keep: Tensor) -> tuple[list[Tensor], Tensor]:
        """The student's, B H L L, and what the decoder reads, B L D."""
        scores, x = attention_scores(self.encoder, images, keep, self.layers)
        return scores, self.encoder.norm(self.encoder.through(x, first=max(self.layers)))


class DecoupledMAE(DistilledMAE):
    """D2-MAE (MAE-Lite's mae_lite_distill_d2_exp.py): the decoder reads the normalised state after block
    `decode_from`, so that the blocks above it learn from the teacher alone. One extra block follows, of which only
    norm1 and qkv are kept; the scores of its queries and keys are compared with those of the teacher's last block, and
    it is discarded like the decoder."""

    def __init__(self, encoder: ViT, decoder: tuple[int, int, int] = (96, 1, 3), mask_ratio: float = 0.75,
                 norm_pix: bool = True, visible_weight: float = 0.0, decoder_config: dict | None = None, *,
                 teacher_heads: list[int], layers: list[int], weight: float = 1.0, decode_from: int):
        super().__init__(encoder, decoder, mask_ratio, norm_pix, visible_weight, decoder_config,
                         teacher_heads=teacher_heads, layers=layers, weight=weight)
        if not 1 <= decode_from < encoder.depth:
            raise InputError(f"decode_from {decode_from}: expected a block from 1 to {encoder.depth - 1}, as the "
                             "blocks above it are the teacher's")
        if layers != [encoder.depth]:
            raise InputError(f"layers {layers}: with decode_from only the last block, {encoder.depth}, is compared")
        self.decode_from = decode_from
        self.extra = Block(encoder.width, encoder.blocks[-1].attn.heads, qkv_bias=encoder.config["qkv_bias"])
        self.extra.apply(init_linear)
        del self.extra.attn.proj, self.extra.norm2, self.extra.mlp

    def observe(self, images: Tensor, keep: Tensor) -> tuple[list[Tensor], Tensor]:
        x = self.encoder.through(self.encoder.embed(images, keep), last=self.decode_from)
        z = self.encoder.norm(x)
        queries, keys, _ = self.extra.qkv(self.encoder.through(x, first=self.decode_from + 1))
        return [relation(queries, keys)], z

    def encode(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        keep, restore = random_masking(noise, self.kept)
        return self.observe(images, keep)[1], restore


def attention_scores(vit: ViT, images: Tensor, keep: Tensor, layers: list[int]) -> tuple[list[Tensor], Tensor]:
    """Raw scores B H L L of the blocks `layers` (from 1), and the input B L D of the last of these: nothing beyond
    its queries and keys is computed, so a teacher stops there."""
    x, block, scores = vit.embed(images, keep), 1, {}
    for layer in sorted(layers):
        x, block = vit.through(x, first=block, last=layer - 1), layer                   # B L D, what enters `layer`
        queries, keys, _ = vit.blocks[layer - 1].qkv(x)
        scores[layer] = relation(queries, keys)
    return [scores[layer] for layer in layers], x


# -------------------------------------------------------------------- the recipe
from vit import (CentreCrop, Images, Run, Views, World, amount, common_options, count, launch, load_init, open_images,
                 parse, random_crop, say, say_next, share, start, vit_options, write_file)

# batch_size counts the images of all processes. The learning rate rises over warmup_epochs to blr * batch_size / 256,
# and falls along half a cosine to min_lr.
RECIPES = {
    # MAE-Lite's ViT-Tiny (projects/mae_lite/mae_lite_exp.py); it crops bilinearly or bicubically by chance.
    "imagenet": dict(
        model="tiny", image_size=224, mask_ratio=0.75, norm_pix=True, visible_weight=0.0, crop_min=0.08,
        mean=IMAGENET_MEAN, std=IMAGENET_STD,
        epochs=400, warmup_epochs=40, batch_size=4096, blr=1.5e-4, min_lr=0.0, weight_decay=0.05),
    # arXiv 2402.03752: 36 pixels, patches of 3, ReLU, learned positions (of the decoder, too), visible patches
    # discounted. Of the paper only the abstract could be read: MLP ratio 2 is from the author's next one (2407.17783),
    # the width follows from the number of parameters; length, learning rate, crops, mean and deviation are from a
    # re-implementation, the batch nearly. Ours: 12 heads, qkv without bias, the decoder's size, alpha, plain pixels.
    "cifar": dict(
        model="tiny", image_size=36, patch_size=3, mlp_ratio=2.0, act="relu", qkv_bias=False, positions="learned",
        decoder=(96, 2, 3), decoder_config=dict(mlp_ratio=2.0, act="relu", qkv_bias=False, positions="learned"),
        mask_ratio=0.75, norm_pix=False, visible_weight=0.1, crop_min=0.6,
        mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5),
        epochs=4000, warmup_epochs=400, batch_size=1024, blr=1.5e-4, min_lr=0.0, weight_decay=0.05),
    # Ours: some three minutes on one CPU core, 2,496 steps. Plain pixels: pictures show them, and seeds differ less.
    "demo": dict(
        model="demo", image_size=32, patch_size=4, mask_ratio=0.75, norm_pix=False, visible_weight=0.0, crop_min=0.6,
        mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5),
        epochs=8, warmup_epochs=0.5, batch_size=64, blr=1.2e-2, min_lr=0.0, weight_decay=0.05),
}
# Decoders of MAE-Lite for tiny and small, MAE's for the rest.
DECODERS = {"demo": (64, 1, 2), "tiny": (96, 1, 3), "small": (192, 1, 6)}


def parse_args(argv: list[str] | None) -> Namespace:
    parser = common_options(__doc__, RECIPES)
    add = parser.add_argument_group("method").add_argument
    add("--mask-ratio", type=share, help="share of the patches that is hidden")
    add("--norm-pix", action=BooleanOptionalAction, help="compare with pixels normalised within each patch")
    add("--visible-weight", type=amount, help="weight of the error on visible patches")
    add("--decoder", type=count, nargs=3, metavar=("WIDTH", "BLOCKS", "HEADS"), help="of the decoder; else by --model: "
        "96 1 3 for tiny, 192 1 6 for small, 512 8 16 for base and larger")
    parser.set_defaults(decoder_config=None)  # a recipe's word alone
    add = parser.add_argument_group("distillation (D-MAE)").add_argument
    add("--teacher", help="file of a pre-trained MAE encoder: ours or an official one")
    add("--teacher-heads", type=count, help="heads of the teacher, where its file does not say")
    add("--distill-layers", type=count, nargs="+", help="blocks whose scores are compared, from 1; else the last")
    add("--distill-weight", type=amount, help="weight of the attention term; else 1")
    add("--decode-from", type=count, help="D2-MAE: the decoder reads the state after this block (MAE-Lite: 8 of 12), "
        "and the blocks above it learn from the teacher alone")
    args = parse(parser, argv, RECIPES)
    args.decoder = args.decoder or DECODERS.get(args.model, (512, 8, 16))  # noted in last.pth, for g2sd.py
    for name in ("teacher_heads", "distill_layers", "distill_weight", "decode_from"):
        if args.teacher is None and getattr(args, name) is not None:
            raise InputError(f"--{name.replace('_', '-')} needs --teacher")
    return args


def build(args: Namespace, teacher: ViT | None) -> MaskedAutoencoder:
    """The model that the arguments describe, with weights drawn from --seed."""
    torch.manual_seed(args.seed)
    encoder = load_init(ViT(**vit_options(args)), args)
    options = dict(mask_ratio=args.mask_ratio, norm_pix=args.norm_pix, visible_weight=args.visible_weight,
                   decoder_config=args.decoder_config)
    if teacher is None:
        return MaskedAutoencoder(encoder, args.decoder, **options)
    layers = args.distill_layers or [encoder.depth]
    if encoder.grid != teacher.grid or encoder.depth != teacher.depth:
        raise InputError(f"--teacher has {teacher.grid} patches and {teacher.depth} blocks, the student {encoder.grid} "
                         f"and {encoder.depth}: D-MAE compares patch by patch and block by block")
    if max(layers) > encoder.depth:
        raise InputError(f"--distill-layers {layers}: there are blocks 1 to {encoder.depth}")
    options.update(teacher_heads=[teacher.blocks[layer - 1].attn.heads for layer in layers], layers=layers,
                   weight=1.0 if args.distill_weight is None else args.distill_weight)
    if args.decode_from is None:
        return DistilledMAE(encoder, args.decoder, **options)
    return DecoupledMAE(encoder, args.decoder, decode_from=args.decode_from, **options)


def load_teacher(args: Namespace, device: torch.device) -> ViT | None:
    """The frozen teacher. It stays outside of the model, so neither optimizer nor checkpoint ever meets it."""
    if args.teacher is None:
        return None
    state, config = read_encoder(args.teacher, args.teacher_heads, "--teacher-heads")
    teacher = ViT(**dict(config, image_size=args.image_size, pool="cls", classes=0))
    load_encoder(teacher, state, config, fresh=("norm.",))  # scores are taken before the final norm
    return teacher.to(device).eval().requires_grad_(False)


# -------------------------------------------------------------------- the run


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    world = start(args)
    images = open_images(args)
    teacher = load_teacher(args, world.device)
    model = build(args, teacher).to(world.device)
    encoder = model.encoder
    # As in MAE, class and mask token decay like matrices; learned positions do not.
    groups = param_groups(model, args.weight_decay, undecayed=("encoder.pos_embed", "decoder_pos_embed"))
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    run = Run("mae", args, world, images, model, encoder, optimizer)
    wrapped, scaler = world.wrap(model, args.compile), run.scaler

    # In worker processes: crop, mirroring, and a number for every patch (the mask), all from (seed, epoch, image).
    views = Views(images, random_crop(encoder.image_size, args.crop_min), args.seed, numbers=encoder.patches)
    with run.batches(views) as batches:
        for step in run.steps(batches):
            for part in range(1, run.parts + 1):
                pixels, noise, _ = next(batches)                                # B C h w in 0..1; on the host B N
                noise = world.send(noise)
                with world.share_gradients(wrapped, now=part == run.parts):
                    with world.autocast():
                        inputs = [encoder.normalize(pixels), noise]
                        if teacher:
                            inputs.append(model.observe_teacher(teacher, teacher.normalize(pixels), noise))
                        losses = wrapped(*inputs)
                    scaler.scale(losses["loss"] / run.parts).backward()
                run.add(**losses)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            if world.rank == 0 and step % max(1, run.last // 10) == 0 and step < run.last:  # some ten on the way
                picture = run.out / f"pictures/{step:07d}.png"
                run.write(step, **save_reconstructions(model, images, args, world, picture))
    if world.rank == 0:
        run.write(run.last, **save_reconstructions(model, images, args, world, run.out / "reconstruction.png"))
        say(f"{run.out}/reconstruction.png: image | visible patches | with the predictions for the others"
            + " | target, normalised in each patch" * args.norm_pix)
        say_next(args, f"{run.out}/encoder.pth")


@torch.no_grad()
def save_reconstructions(model: MaskedAutoencoder, images: Images, args: Namespace, world: World,
                         path: Path) -> dict[str, float]:
    """Measures the squared error on the hidden patches of 64 training images, with the same masks every time, and that
    of painting each with the mean of its visible patches. Of eight it writes a picture: image | visible patches | with
    the predictions for the others. With norm_pix these are shown as grey + value / 5, beside the target."""
    encoder = model.encoder
    views = Views(images, CentreCrop(encoder.image_size), args.seed, numbers=encoder.patches)
    seen = [views[0, i] for i in np.linspace(0, len(images) - 1, 64).astype(int).tolist()]
    pixels = world.send(torch.stack([view for view, *_ in seen])).movedim(-1, 1).float() / 255  # B C h w
    noise = world.send(torch.stack([noise for _, noise, *_ in seen]))                   # B N
    with world.autocast():
        prediction, target, hidden = model.reconstruct(encoder.normalize(pixels), noise)
    visible = 1 - hidden
    constant = (target * visible).sum((2, 3), keepdim=True) / visible.sum((2, 3), keepdim=True)  # B C 1 1
    errors = {name: (((x - target).square().mean(1, keepdim=True) * hidden).sum() / hidden.sum()).item()
              for name, x in (("masked_mse", prediction), ("baseline_mse", constant))}
    mean, std = (0.5, 0.2) if args.norm_pix else (encoder.mean, encoder.std)
    prediction, target = ((x * std + mean).clamp(0, 1) for x in (prediction, target))
    columns = [pixels, pixels * visible + 0.5 * hidden, target * visible + prediction * hidden]
    columns += [target] * args.norm_pix
    tiles = torch.stack(columns, dim=1)[:8].flatten(0, 1)                               # 24 or 32 C h w
    larger = -(-96 // min(encoder.image_size))  # small images would not be seen
    tiles = tiles.repeat_interleave(larger, 2).repeat_interleave(larger, 3)
    try:
        picture = make_grid(tiles, nrow=2 * len(columns), padding=4, pad_value=1.0)
        write_file(partial(save_image, picture, format="png"), path)
    except InputError as error:  # no reason to end a training
        say(f"warning: {error}")
    return errors


if __name__ == "__main__":
    launch(main)

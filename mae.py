"""Masked autoencoder (MAE): hide 75 % of the patches, encode the rest, reconstruct the hidden ones.

He et al., arXiv 2111.06377; for ViT-Tiny with the recipe of MAE-Lite, Wang et al., arXiv 2205.14443.

    keep = a random 25 % of the patches, drawn anew for every image
    z    = encoder([class token, patches[keep]])          the encoder never sees a hidden patch
    y    = decoder([z at the kept positions, mask token elsewhere])
    loss = mean of (y - pixels)^2 over the hidden patches, pixels normalised within each patch

With --teacher, D-MAE (MAE-Lite): the raw attention scores q k^T / sqrt(d) of the last block also learn to match those
of a larger MAE; with --decode-from K as well, D2-MAE: the decoder reads the state after block K, and the blocks above
learn from the teacher alone. With --recipe cifar, the small-image variant of Tan, arXiv 2402.03752: the loss on the
visible patches is added with a small weight.

Run    python mae.py                                          generated shapes, two minutes on a laptop
       python mae.py --data /imagenet                         one GPU, or the CPU
       torchrun --standalone --nproc_per_node=8 mae.py --data /imagenet    eight GPUs
       python mae.py --data /imagenet --teacher mae_pretrain_vit_base.pth
Use    from mae import MaskedAutoencoder                      copy this file and vit.py
Letters in shape comments: B images, C channels, h and w height and width in pixels, p patch side, N patches,
       n kept patches, L = 1 + n tokens, D encoder width, E decoder width, H heads, d = D / H
"""
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.utils import make_grid, save_image

from vit import (COUNT, IMAGENET_MEAN, IMAGENET_STD, MASKS, NOT_NEGATIVE, SHARE, Batches, Block, Images,
                 InputError, Log, View, ViT, World, apply_recipe, autocast, cosine, decoder_sizes, drawn,
                 encoder_options, gradients_shared, in_order, init_linear, launch, layer_norm, load_checkpoint,
                 load_encoder, normalizer, open_images, open_run, param_groups, parse_args, parts_of_batch,
                 position_table, read_encoder, recipe_for, relation, save_checkpoint, say, sent, set_lr,
                 start_processes, take, uniform, vit_options, wrap, write_file)

# -------------------------------------------------------------------- the method


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


class MaskedAutoencoder(MaskedViT):
    """MAE: a MaskedViT whose decoder predicts pixels.

    norm_pix        compare with pixels normalised within each patch
    visible_weight  weight of the mean error on visible patches (alpha of arXiv 2402.03752); 0: plain MAE
    """

    def __init__(self, encoder: ViT, decoder: tuple[int, int, int] = (96, 1, 3), mask_ratio: float = 0.75,
                 norm_pix: bool = True, visible_weight: float = 0.0):
        super().__init__(encoder, decoder, mask_ratio)
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
        """Mean squared error on the hidden patches; prediction B N ppC, hidden B N (true or false)."""
        target = patchify(images, self.encoder.patch_size)                              # B N ppC
        target = target.to(torch.promote_types(target.dtype, torch.float32))
        if self.norm_pix:
            mean, std = patch_statistics(target)
            target = (target - mean) / std
        error = (prediction.to(target.dtype) - target).square().mean(-1)                # B N
        loss = (error * hidden).sum() / hidden.sum()
        if self.visible_weight:
            loss = loss + self.visible_weight * (error * ~hidden).sum() / (~hidden).sum()
        return loss

    @torch.no_grad()
    def reconstruct(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Reconstructed images B C h w, and which pixels were hidden (B 1 h w, 0 or 1). Predictions of normalised
        pixels get the true mean and standard deviation of their patch back, or they would be grey."""
        z, restore = self.encode(images, noise)
        prediction, patch_size, grid = self.predict(z, restore).float(), self.encoder.patch_size, self.encoder.grid
        if self.norm_pix:
            mean, std = patch_statistics(patchify(images, patch_size))
            prediction = prediction * std + mean
        hidden = (restore >= self.kept).float().view(-1, 1, *grid)
        hidden = hidden.repeat_interleave(patch_size, 2).repeat_interleave(patch_size, 3)
        return unpatchify(prediction, patch_size, grid), hidden


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


class DistilledMAE(MaskedAutoencoder):
    """D-MAE: in addition to reconstructing, the student matches the raw attention scores of a teacher that sees the
    same patches in the same order, class token included. A bias-free linear layer across the heads (`adapters`, as
    1 x 1 convolutions) maps the student's heads to the teacher's; it is trained jointly and then discarded.

    loss = reconstruction + weight * sum over `layers` of mean (adapter(S_student) - S_teacher)^2,   S = q k^T / sqrt(d)
    layers   numbers of the compared blocks, counted from 1
    """

    def __init__(self, *arguments, teacher_heads: list[int], layers: list[int], weight: float = 1.0, **options):
        super().__init__(*arguments, **options)
        if not all(1 <= layer <= self.encoder.depth for layer in layers):
            raise InputError(f"layers {layers}: the student has blocks 1 to {self.encoder.depth}")
        self.layers, self.weight = layers, weight
        self.adapters = nn.ModuleList(nn.Conv2d(self.encoder.blocks[layer - 1].attn.heads, heads, 1, bias=False)
                                      for layer, heads in zip(layers, teacher_heads, strict=True))

    def forward(self, images: Tensor, noise: Tensor, teacher_scores: list[Tensor]) -> dict[str, Tensor]:
        """images B C h w, noise B N, the teacher's scores B H L L for each layer -> the loss and its two terms."""
        keep, restore = random_masking(noise, self.kept)
        scores, z = self.observe(images, keep)
        reconstruction = self.reconstruction_loss(images, self.predict(z, restore), restore >= self.kept)
        with torch.autocast(images.device.type, enabled=False):
            attention = sum(F.mse_loss(adapter(student), teacher)
                            for adapter, student, teacher in zip(self.adapters, scores, teacher_scores, strict=True))
        return dict(loss=reconstruction + self.weight * attention, reconstruction=reconstruction, attention=attention)

    def observe(self, images: Tensor, keep: Tensor) -> tuple[list[Tensor], Tensor]:
        """Raw scores B H L L, one for each that the teacher gives, and what the decoder reads, B L D."""
        scores, x = attention_scores(self.encoder, images, keep, self.layers)
        for block in self.encoder.blocks[max(self.layers) - 1:]:  # x has not passed the last compared block yet
            x = block(x)
        return scores, self.encoder.norm(x)


class DecoupledMAE(DistilledMAE):
    """D2-MAE (MAE-Lite's mae_lite_distill_d2_exp.py): the decoder reads the state after block `decode_from`, so that
    the blocks above it learn from the teacher alone. One extra block follows, of which only the queries and
    keys exist; they are compared with the teacher's last, and the block is discarded like the decoder."""

    def __init__(self, *arguments, decode_from: int, **options):
        super().__init__(*arguments, **options)
        if not 1 <= decode_from < self.encoder.depth:
            raise InputError(f"decode_from {decode_from}: expected a block from 1 to {self.encoder.depth - 1}, as the "
                             "blocks above it are the teacher's")
        self.decode_from = decode_from
        heads, kind = self.encoder.blocks[-1].attn.heads, self.encoder.config
        self.extra = Block(self.encoder.width, heads, qkv_bias=kind["qkv_bias"]).apply(init_linear)
        del self.extra.attn.proj, self.extra.norm2, self.extra.mlp

    def observe(self, images, keep):
        x = self.encoder.embed(images, keep)
        for number, block in enumerate(self.encoder.blocks, start=1):
            x = block(x)
            if number == self.decode_from:
                z = self.encoder.norm(x)
        return [relation(*self.extra.qkv(x)[:2])], z

    def encode(self, images, noise):
        keep, restore = random_masking(noise, self.kept)
        return self.observe(images, keep)[1], restore


def attention_scores(vit: ViT, images: Tensor, keep: Tensor, layers: list[int]) -> tuple[list[Tensor], Tensor]:
    """Raw scores B H L L of the blocks `layers` (from 1), and the input B L D of the last of these: nothing beyond
    its queries and keys is computed, so a teacher stops there."""
    x, scores = vit.embed(images, keep), {}
    for number, block in enumerate(vit.blocks[:max(layers)], start=1):
        if number in layers:
            scores[number] = relation(*block.qkv(x)[:2])
        if number < max(layers):
            x = block(x)
    return [scores[layer] for layer in layers], x


# -------------------------------------------------------------------- the recipe

RECIPES = {
    # MAE-Lite's ViT-Tiny (projects/mae_lite/mae_lite_exp.py), but for its crops: bilinear or bicubic by chance.
    "imagenet": dict(
        model="tiny", image_size=224, mask_ratio=0.75, norm_pix=True, visible_weight=0.0, crop_min=0.08,
        mean=IMAGENET_MEAN, std=IMAGENET_STD,
        epochs=400, warmup_epochs=40, batch_size=4096, micro_batch=256, blr=1.5e-4, min_lr=0.0, weight_decay=0.05,
        distill_weight=1.0),
    # arXiv 2402.03752: 36 pixels, patches of 3, ReLU, MLP ratio 2, learned positions, visible patches discounted.
    # The paper leaves open, and we chose: 12 heads, qkv without bias, the decoder, alpha = 0.1, plain pixels,
    # batch size and length. Crops and their scale follow a re-implementation.
    "cifar": dict(
        model="tiny", image_size=36, patch_size=3, mlp_ratio=2.0, act="relu", qkv_bias=False, positions="learned",
        decoder="96x2x3", mask_ratio=0.75, norm_pix=False, visible_weight=0.1, crop_min=0.6,
        mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5),
        epochs=4000, warmup_epochs=400, batch_size=1024, micro_batch=1024, blr=1.5e-4, min_lr=0.0, weight_decay=0.05,
        distill_weight=1.0),
    # Ours: two minutes on two CPU cores.
    "demo": dict(
        model="demo", image_size=32, patch_size=4, decoder="64x1x2", mask_ratio=0.75, norm_pix=True, visible_weight=0.0,
        crop_min=0.6, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5),
        epochs=9.6, warmup_epochs=0.5, batch_size=64, micro_batch=64, blr=1.2e-2, min_lr=0.0, weight_decay=0.05,
        distill_weight=1.0),
}
# Decoders of MAE-Lite for tiny and small (a large one only hurts a small encoder), MAE's for the rest.
DECODERS = {"demo": "64x1x2", "tiny": "96x1x3", "small": "192x1x6"}
OPTIONS = {
    "method": {
        "mask_ratio": (float, SHARE, "share of the patches that is hidden"),
        "norm_pix": (bool, None, "compare with pixels normalised within each patch"),
        "visible_weight": (float, NOT_NEGATIVE, "weight of the error on visible patches"),
        "decoder": (str, None, "WIDTHxBLOCKSxHEADS of the decoder; else by --model: tiny 96x1x3, small 192x1x6, base "
                               "and larger 512x8x16"),
        "crop_min": (float, SHARE, "smallest share of an image's area in a random crop"),
    },
    "distillation (D-MAE)": {
        "teacher": (str, None, "file of a pre-trained MAE encoder: ours or an official one"),
        "teacher_heads": (int, COUNT, "heads of the teacher, where its file does not say"),
        "distill_layers": (str, None, "blocks whose scores are compared, counted from 1, as 6,12; else the last"),
        "distill_weight": (float, NOT_NEGATIVE, "weight of the attention term"),
        "decode_from": (int, COUNT, "D2-MAE: the decoder reads the state after this block (MAE-Lite: 8 of 12), and the "
                                    "blocks above it learn from the teacher alone"),
    },
}


def build(args: Namespace, teacher: ViT | None) -> MaskedAutoencoder:
    """The model that the arguments describe, with weights drawn from --seed."""
    torch.manual_seed(args.seed)
    encoder = ViT(**vit_options(args))
    decoder = decoder_sizes(args.decoder)
    options = dict(mask_ratio=args.mask_ratio, norm_pix=args.norm_pix, visible_weight=args.visible_weight)
    if teacher is None:
        if args.decode_from:
            raise InputError("--decode-from (D2-MAE) needs --teacher")
        return MaskedAutoencoder(encoder, decoder, **options)
    layers = distilled_layers(args, encoder)
    if encoder.grid != teacher.grid or encoder.depth != teacher.depth:
        raise InputError(f"--teacher has {teacher.grid} patches and {teacher.depth} blocks, the student {encoder.grid} "
                         f"and {encoder.depth}: D-MAE compares patch by patch and block by block")
    options.update(teacher_heads=[teacher.blocks[layer - 1].attn.heads for layer in layers], layers=layers,
                   weight=args.distill_weight)
    if args.decode_from is None:
        return DistilledMAE(encoder, decoder, **options)
    if layers != [encoder.depth]:
        raise InputError(f"--distill-layers {args.distill_layers}: with --decode-from only the last block is compared")
    return DecoupledMAE(encoder, decoder, decode_from=args.decode_from, **options)


def distilled_layers(args: Namespace, encoder: ViT) -> list[int]:
    try:
        layers = [int(number) for number in args.distill_layers.split(",")] if args.distill_layers else [encoder.depth]
    except ValueError:
        raise InputError(f"--distill-layers {args.distill_layers} is not a list of numbers, as 6,12") from None
    if not all(1 <= layer <= encoder.depth for layer in layers):
        raise InputError(f"--distill-layers {args.distill_layers}: there are blocks 1 to {encoder.depth}")
    return layers


def load_teacher(args: Namespace, device: torch.device) -> tuple[ViT, Callable[[Tensor], Tensor]] | tuple[None, None]:
    """The frozen teacher, and the normalisation that it was trained with. It stays outside of the model, so neither
    optimizer nor checkpoint ever meets it."""
    if args.teacher is None:
        return None, None
    state, config = read_encoder(args.teacher, args.teacher_heads, "--teacher-heads")
    teacher = ViT(**encoder_options(config, image_size=args.image_size))
    load_encoder(teacher, state, config, fresh=("norm.",))  # scores are taken before the final norm
    return teacher.to(device).eval().requires_grad_(False), normalizer(config["mean"], config["std"], device)


# -------------------------------------------------------------------- the run


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv, __doc__, RECIPES, OPTIONS)
    world = start_processes(args)
    images = open_images(args)
    apply_recipe(args, recipe_for(args, images), RECIPES)
    args.decoder = args.decoder or DECODERS.get(args.model, "512x8x16")
    teacher, teacher_normalize = load_teacher(args, world.device)
    model = build(args, teacher)
    out, checkpoint = open_run(args, "mae")
    wrapped = wrap(model, args, world)
    encoder, config = model.encoder, dict(model.encoder.config, mean=list(args.mean), std=list(args.std))

    parts, steps = parts_of_batch(args, world), len(images) // args.batch_size
    last, lr = round(args.epochs * steps), args.blr * args.batch_size / 256
    # As in MAE, class and mask token decay like matrices; learned positions do not.
    groups = param_groups(model, args.weight_decay, undecayed=("encoder.pos_embed", "decoder_pos_embed"))
    optimizer = torch.optim.AdamW(groups, lr, betas=(0.9, 0.95), fused=args.device == "cuda")
    scaler = torch.amp.GradScaler(args.device, enabled=args.precision == "fp16")
    first = load_checkpoint(checkpoint, model, optimizer, scaler) if checkpoint else 0
    normalize = normalizer(args.mean, args.std, world.device)
    loader = Batches(images, View(encoder.image_size, (args.crop_min, 1.0)), args, world, first, last)
    log = Log(args, out, world, loader)
    if world.main:
        name = "D2-MAE" if args.decode_from else "D-MAE" if teacher else "MAE"
        say(f"{name}, recipe {args.recipe}: {len(images)} images, {last} steps of "
              f"{args.batch_size}, learning rate {lr:.3g}, {args.precision} on {world.size} x {args.device} -> {out}")

    def save(step: int) -> None:
        save_checkpoint(out, "mae", step, model, config, optimizer, scaler, args)
        write_file(dict(model=encoder.state_dict(), config=config), out / "encoder.pth")

    step = first
    for step in range(first + 1, last + 1):
        set_lr(optimizer, rate := cosine((step - 1) / steps, lr, args.min_lr, args.warmup_epochs, args.epochs))
        noise = drawn(encoder.patches, MASKS, step, args, world)                        # rows N
        sums = {}
        for part, part_noise in enumerate(noise.chunk(parts), start=1):
            pixels = next(loader)[0]                                                    # B C h w, in 0..1
            with gradients_shared(wrapped, now=part == parts):
                with autocast(args):
                    goal = [teacher_scores(model, teacher, teacher_normalize(pixels), part_noise)] if teacher else []
                    losses = wrapped(normalize(pixels), part_noise, *goal)
                scaler.scale(losses["loss"] / parts).backward()
            sums = {name: sums.get(name, 0) + loss.detach() / parts for name, loss in losses.items()}
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

        if log.step(step, rate, **sums):
            break
        if log.save_due():
            save(step)
        if world.main and step % max(1, last // 10) == 0:
            score = save_reconstructions(model, images, normalize, args, world, out / f"pictures/{step:07d}.png")
            log.write(dict(step=step, **score))
    log.finish(save, step)  # a run stopped by a signal ends here
    if world.main:
        score = save_reconstructions(model, images, normalize, args, world, out / "reconstruction.png")
        free = "each hidden patch its true mean" if args.norm_pix else "hidden patches the mean of the visible ones"
        say(f"squared error on hidden pixels {score['masked_mse']:.4f}; painting {free}: {score['baseline_mse']:.4f}\n"
            f"{out}/reconstruction.png\nnext:  python finetune.py --data {args.data} --init {out}/encoder.pth")


@torch.no_grad()
def teacher_scores(model: DistilledMAE, teacher: ViT, pixels: Tensor, noise: Tensor) -> list[Tensor]:
    """The teacher's scores on the very patches that the student keeps: same noise, same mask."""
    keep, _ = random_masking(noise, model.kept)
    return attention_scores(teacher, pixels, keep, model.layers)[0]


def save_reconstructions(model: MaskedAutoencoder, images: Images, normalize: Callable, args: Namespace, world: World,
                         path: Path) -> dict[str, float]:
    """Writes rows of image | masked | reconstruction | the same with the visible patches, and measures the squared
    error on the hidden pixels (0..1) of 64 images. The baseline paints what a network gets for free: with norm_pix
    the true mean of each hidden patch, else the mean of the image's visible patches."""
    alone, size, p = World(0, 1, world.device), model.encoder.image_size, model.encoder.patch_size
    some = images.subset(np.linspace(0, len(images) - 1, 64).astype(int))
    pixels = torch.cat([pixels for pixels, _ in in_order(some, View(size), args, alone, strict=False)])       # B C h w
    noise = uniform((len(pixels), model.encoder.patches), args.seed, MASKS, 0)
    with autocast(args):
        painted, hidden = model.reconstruct(normalize(pixels), sent(noise, world.device))
    mean, std = (torch.tensor(value, device=world.device).view(-1, 1, 1) for value in (args.mean, args.std))
    painted, visible = (painted * std + mean).clamp(0, 1), 1 - hidden
    if args.norm_pix:
        patches = patchify(pixels, p)
        baseline = unpatchify(patch_statistics(patches)[0].expand_as(patches), p, model.encoder.grid)
    else:
        baseline = (pixels * visible).sum((2, 3), keepdim=True) / visible.sum((2, 3), keepdim=True)
    rows = torch.stack([pixels, pixels * visible + 0.5 * hidden, painted, pixels * visible + painted * hidden], dim=1)
    try:
        path.parent.mkdir(exist_ok=True)
        save_image(make_grid(rows[:8].flatten(0, 1), nrow=8, padding=2, pad_value=1.0), path)
    except OSError as error:  # no reason to end a training
        say(f"warning: {path} cannot be written: {error}")
    values = hidden.sum().item() * pixels.shape[1]
    return dict(masked_mse=((painted - pixels).square() * hidden).sum().item() / values,
                baseline_mse=((baseline - pixels).square() * hidden).sum().item() / values)


if __name__ == "__main__":
    launch(main)

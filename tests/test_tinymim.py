"""TinyMIM against the values of the reference code and of the paper's formulas, the mistakes that these values exclude,
and the script from teacher to fine-tuning."""
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms.v2 import functional as V2

import finetune
import mae
import tests.reference_tinymim as reference
import tinymim
from tests.reference import evaluate, no_encoder
from tests.test_mae import assert_meets
from tinymim import (OPTIONS, RECIPES, RELATIONS, TARGETS, PixelDecoder, TinyMIM, TinyMIMStudy, build, divergence, targets_of,
                     main, random_masking, student_view)
from vit import (IMAGENET_MEAN, IMAGENET_STD, InputError, ViT, apply_recipe, param_groups, parse_args, read_encoder,
                 relation)

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = {name: json.loads((ROOT / f"tests/golden/tinymim_{name}.json").read_text()) for name in ("tiny", "targets")}
TINY, PAPER = GOLDEN["tiny"]["expected"], GOLDEN["targets"]["expected"]
# What the files hold beside our values: other readings of the paper, mistakes, and what the released code overflows to.
OTHERS = re.compile("mistake|variants|mse|_l1$|l1_whitened|eps 1e-6|patch_tokens_only|official_softmax|^mean$|"
                    "^optimizer$|^sequential$|^parameters_without|class_token.*smooth_l1_beta2_whitened_target")


def without_others(expected: dict, where: str = "") -> dict:
    return {key: without_others(value, key) if isinstance(value, dict) else value for key, value in expected.items()
            if not OTHERS.search(key) and not OTHERS.search(where + "/" + key)}


# ---- golden values

@pytest.mark.parametrize("name", GOLDEN)
def test_reference_values_are_met(name):
    ours = evaluate(GOLDEN[name])
    assert_meets(ours, without_others(GOLDEN[name]["expected"]), rtol=1e-8)


def test_the_same_tensors_learn_as_in_the_reference():
    ours = evaluate(GOLDEN["tiny"])
    assert ours["grad_norm"].keys() == TINY["grad_norm"].keys()
    assert ours["parameters_without_gradient"] == TINY["parameters_without_gradient"]


@pytest.mark.parametrize("reading", TINY["sequential"])
def test_a_distilled_student_teaches_a_narrower_one_in_both_readings_of_its_last_block(reading):
    case = TINY["sequential"][reading]
    ours = reference.sequential(GOLDEN["tiny"], case["narrow_student"], case["teacher_last_block_heads"])
    for name in ours:
        assert ours[name] == pytest.approx(case[name], rel=1e-8)


def test_state_dict_has_the_official_names_and_shapes():
    for who, shapes in GOLDEN["tiny"]["state_dict_shapes"].items():
        model = TinyMIM(reference.build_vit(GOLDEN["tiny"]["config"][who]))
        assert {no_encoder(name): list(x.shape) for name, x in model.state_dict().items()} == shapes


def other_block(self, vit, images, number, observe=TinyMIM.observe):
    return observe(self, vit, images, min(number + 1, vit.depth))  # counted from 0; the student's is its last anyway


def sum_of_heads_and_tokens(s, t):
    return F.kl_div(s.log_softmax(-1), t.softmax(-1), reduction="batchmean")


def mean_over_heads(s, t):
    s, t = (x.softmax(-1).mean(1) for x in (s, t))
    return (t * (t.log() - s.log())).sum(-1).mean()


# Each of the usual mistakes that the reference lists, made in the code: (where, what instead).
MISTAKES = {
    "teacher block 4 instead of 3 (counted from 1)": ("tinymim.TinyMIM.observe", other_block),
    "KL with the arguments swapped, KL(student || teacher)": ("tinymim.divergence", lambda s, t: divergence(t, s)),
    "reduction='batchmean' (sum over heads and query tokens)": ("tinymim.divergence", sum_of_heads_and_tokens),
    "query rows of patches only (class-token row left out)": (
        "tinymim.divergence", lambda s, t: divergence(s[:, :, 1:], t[:, :, 1:])),
    "no 1/sqrt(head_dim)": ("tinymim.relation", lambda a, b: a @ b.transpose(-2, -1)),
    "student fed with the teacher's view": (
        "tests.reference_tinymim.views", lambda golden, f=reference.views: f(golden)[:1] * 2),
    "mean attention over heads": ("tinymim.divergence", mean_over_heads),
}


def test_every_listed_mistake_is_tried():
    assert MISTAKES.keys() == TINY["values_of_common_mistakes [qk, vv]"].keys()


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_code_gives_the_value_that_the_reference_lists_for_it(mistake, monkeypatch):
    monkeypatch.setattr(*MISTAKES[mistake])
    ours = evaluate(GOLDEN["tiny"])
    listed = TINY["values_of_common_mistakes [qk, vv]"][mistake]
    assert [ours["qk_loss"], ours["vv_loss"]] == pytest.approx(listed, rel=1e-8)
    assert abs(ours["loss"] / TINY["loss"] - 1) > 1e-3


# Mistakes in the other targets: (where, what instead, the value that it moves, the value it gives if that is listed).
FEATURE = ("feature", "smooth_l1_beta2_whitened_eps1e-5")
RAW = "no_softmax_smooth_l1_beta2"
STUDY_MISTAKES = {
    "beta 1": ("tinymim.F.smooth_l1_loss", lambda s, t, beta, f=F.smooth_l1_loss: f(s, t, beta=1.0),
               FEATURE, ("feature", "mistake: beta 1")),
    "not whitened": ("tinymim.F.layer_norm", lambda x, shape: x,
                     FEATURE, ("feature", "mistake: affine-free norm forgotten")),
    "whitened with the eps of the ViT": ("tinymim.F.layer_norm", lambda x, shape, f=F.layer_norm: f(x, shape, eps=1e-6),
                                         FEATURE, ("feature", "whitened eps 1e-6")),
    "mean squared error of scores": ("tinymim.F.smooth_l1_loss", lambda s, t, beta: F.mse_loss(s, t),
                                     ("relations", "vv", RAW), ("relations", "vv", "no_softmax_mse")),
    "absolute error of scores": ("tinymim.F.smooth_l1_loss", lambda s, t, beta: F.l1_loss(s, t),
                                 ("relations", "qq", RAW), ("relations", "qq", "no_softmax_l1")),
    "highest noise kept": ("tinymim.random_masking", lambda noise, keep: random_masking(-noise, keep),
                           ("masked_input", "qk_loss"), None),
}


@pytest.mark.parametrize("mistake", STUDY_MISTAKES)
def test_a_mistake_in_another_target_misses_the_formula(mistake, monkeypatch):
    def at(values, keys):
        for key in keys:
            values = values[key]
        return values
    where, instead, moved, listed = STUDY_MISTAKES[mistake]
    if where.startswith("tinymim.F."):  # in tinymim alone, so that the adapter's own use stays
        functions = dict(smooth_l1_loss=F.smooth_l1_loss, layer_norm=F.layer_norm)
        functions[where.removeprefix("tinymim.F.")] = instead
        monkeypatch.setattr("tinymim.F", SimpleNamespace(**functions))
    else:
        monkeypatch.setattr(where, instead)
    ours = at(evaluate(GOLDEN["targets"]), moved)
    assert abs(ours / at(PAPER, moved) - 1) > 1e-6
    if listed:
        assert ours == pytest.approx(at(PAPER, listed), rel=1e-8)


def test_softmax_before_the_logarithm_would_overflow():
    scores = [80 * x for x in torch.randn(2, 1, 2, 5, 5)]
    by_hand = [x.softmax(-1) for x in scores]
    assert not (by_hand[1] * (by_hand[1].log() - by_hand[0].log())).sum().isfinite()
    assert divergence(*scores).isfinite()


# ---- the method

def student(last_heads: int | None = 4, **options) -> ViT:
    torch.manual_seed(0)
    return ViT(image_size=16, patch_size=4, width=16, depth=3, heads=2, last_heads=last_heads, **options)


def teacher(**options) -> ViT:
    torch.manual_seed(1)
    return ViT(**dict(dict(image_size=16, patch_size=4, width=24, depth=4, heads=4), **options)).requires_grad_(False)


def test_networks_stop_at_the_queries_keys_and_values_of_the_block():
    model, net, called = TinyMIM(student()), teacher(), []
    for name, module in [*model.encoder.named_modules(), *(("teacher." + n, m) for n, m in net.named_modules())]:
        module.register_forward_hook(lambda *_, name=name: called.append(name))
    model(torch.randn(2, 3, 16, 16), model.observe(net, torch.randn(2, 3, 16, 16), 3))
    assert {"teacher.blocks.1.mlp", "teacher.blocks.2.attn.qkv", "blocks.2.attn.qkv"} <= set(called)
    assert not {"teacher.blocks.2.attn.proj", "teacher.blocks.3", "teacher.norm"} & set(called)
    assert not {"blocks.2.attn.proj", "blocks.2.mlp", "blocks.2", "norm"} & set(called)


def test_a_student_equal_to_its_teacher_has_no_loss():
    model, x = TinyMIM(student()), torch.randn(2, 3, 16, 16)
    assert model(x, model.observe(model.encoder, x, 3))["loss"].abs() < 1e-7
    assert model(x, model.observe(model.encoder, -x, 3))["loss"] > 1e-6


def test_loss_is_the_sum_of_its_parts_by_the_formula():
    model, net, x = TinyMIM(student()), teacher(), torch.randn(2, 3, 16, 16)
    goal = model.observe(net, x, 4)
    losses, ours = model(x, goal), model.observe(model.encoder, x, 3)
    for name, s, t in zip(("qk", "vv"), ours, goal, strict=True):
        s, t = s.softmax(-1), t.softmax(-1)
        torch.testing.assert_close(losses[name], (t * (t / s).log()).sum() / (2 * 4 * 17))
    torch.testing.assert_close(losses["loss"], losses["qk"] + losses["vv"])


def test_other_heads_than_the_teachers_are_refused_and_not_broadcast():
    for heads in (1, 2):
        model, net, x = TinyMIM(student(heads)), teacher(), torch.randn(2, 3, 16, 16)
        with pytest.raises(InputError, match="number of heads"):
            model(x, model.observe(net, x, 4))


@pytest.mark.parametrize("targets, options", [
    *(([name], {}) for name in TARGETS), (["qq", "kk", "vv"], {}), (["q", "k", "v"], {}),
    (["qk", "vv"], dict(softmax=False)), (["qk", "vv"], dict(mask_ratio=0.75)),
    (["qk", "vv"], dict(mask_ratio=0.75, mim_weight=1.0)), (["class"], dict(mask_ratio=0.75, mim_weight=0.5))])
def test_every_trainable_parameter_learns_and_the_teacher_does_not(targets, options):
    net, x = teacher(), torch.randn(2, 3, 16, 16)
    heads = 4 if set(targets) & set(RELATIONS) else None
    model = TinyMIMStudy(student(heads), net.width, targets, decoder=(16, 1, 2), **options)
    noise = [torch.rand(2, 16)] if "mask_ratio" in options else []
    losses = model(x, model.observe(net, x, 3, *noise), *noise)
    losses["loss"].backward()
    total = sum(losses[name] for name in targets) + options.get("mim_weight", 0) * losses.get("reconstruction", 0)
    torch.testing.assert_close(losses["loss"], total)
    assert list(losses)[1:1 + len(targets)] == targets
    assert [name for name, p in model.named_parameters() if p.requires_grad != (p.grad is not None)] == []
    assert all(p.grad is None for p in net.parameters())
    assert all(name.startswith("encoder.") for name in model.state_dict() if name.endswith("cls_token"))


def test_the_default_is_the_study_with_its_two_relations():
    net, x, y = teacher(), torch.randn(2, 3, 16, 16), torch.randn(2, 3, 16, 16)
    plain, study = TinyMIM(student()), TinyMIMStudy(student(), 24, ["qk", "vv"])
    ours, theirs = (model(x, model.observe(net, y, 3)) for model in (plain, study))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    trained = [[name for name, p in model.named_parameters() if p.requires_grad] for model in (plain, study)]
    assert trained[0] == trained[1]


def test_targets_are_the_parts_of_a_block():
    net, x = teacher(), torch.randn(2, 3, 16, 16)
    got = dict(zip(TARGETS, targets_of(net, x, 2, list(TARGETS)), strict=True))
    inside = net.blocks[0](net.embed(x))
    torch.testing.assert_close(got["block"], net.blocks[1](inside))
    torch.testing.assert_close(got["attention-residual"], inside + got["attention"])
    torch.testing.assert_close(got["block"], got["attention-residual"] + got["ffn"])
    torch.testing.assert_close(got["output"], net.encode(x))
    torch.testing.assert_close(got["class"], net.encode(x)[:, 0])
    q, k, v = net.blocks[1].qkv(inside)
    torch.testing.assert_close(got["qk"].softmax(-1) @ v, F.scaled_dot_product_attention(q, k, v))
    torch.testing.assert_close(got["kk"], relation(k, k))
    fused = net.blocks[1].attn.qkv(net.blocks[1].norm1(inside))
    assert torch.equal(torch.cat([got["q"], got["k"], got["v"]], -1), fused)


def test_a_masked_student_and_teacher_see_the_same_patches_and_no_others():
    net, x, noise = teacher(), torch.randn(2, 3, 16, 16), torch.rand(2, 16)
    model = TinyMIMStudy(student(), 24, ["qk", "vv"], mask_ratio=0.75)
    hidden = random_masking(noise, 4)[1] >= 4
    change = 9 * hidden.float().view(2, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    goal = model.observe(net, x, 3, noise)
    assert goal[0].shape == (2, 4, 5, 5)
    assert all(torch.equal(a, b) for a, b in zip(goal, model.observe(net, x + change, 3, noise), strict=True))
    assert torch.equal(model(x, goal, noise)["loss"], model(x + change, goal, noise)["loss"])


@pytest.mark.parametrize("mask_ratio, mim_weight", [(1.0, 0.0), (-0.5, 0.0), (0.0, 1.0)])
def test_a_mask_that_hides_nothing_or_all_is_refused(mask_ratio, mim_weight):
    with pytest.raises(InputError, match="mask ratio"):
        TinyMIMStudy(student(), 24, ["qk"], mask_ratio=mask_ratio, mim_weight=mim_weight)


def test_reconstruction_is_maes():
    torch.manual_seed(0)
    encoder, x, noise = student(), torch.randn(2, 3, 16, 16), torch.rand(2, 16)
    theirs, ours = mae.MaskedAutoencoder(encoder, (16, 2, 2), 0.75), PixelDecoder(encoder, 16, 2, 2)
    order = torch.arange(48).view(4, 4, 3).permute(2, 0, 1).flatten()  # theirs: channel last in a patch; ours: first
    ours.embed, ours.mask_token, ours.pos_embed = theirs.decoder_embed, theirs.mask_token, theirs.decoder_pos_embed
    ours.blocks[0], ours.blocks[1], ours.blocks[2] = *theirs.decoder_blocks, theirs.decoder_norm
    ours.blocks[3].weight.data = theirs.decoder_pred.weight[order]
    ours.blocks[3].bias.data = theirs.decoder_pred.bias[order]
    z, restore = theirs.encode(x, noise)
    torch.testing.assert_close(ours(z, x, restore), theirs(x, noise)["loss"])


# ---- the student's view

def test_jitter_is_torchvisions_with_the_same_factors_in_the_same_order():
    x, numbers = torch.rand(8, 3, 16, 16), torch.rand(8, 6)
    ours = student_view(x, numbers, 0.4)
    operations = (V2.adjust_brightness, V2.adjust_contrast, V2.adjust_saturation)
    for image, result, row in zip(x, ours, numbers, strict=True):
        for i in row[3:].argsort().tolist():
            image = operations[i](image, 0.6 + 0.8 * row[i].item())
        torch.testing.assert_close(result, image, atol=2e-4, rtol=0)  # torchvision's weights of grey have four digits
    assert len({tuple(row[3:].argsort().tolist()) for row in numbers}) > 1


def test_jitter_is_drawn_for_every_image_and_can_be_off():
    x, numbers = torch.rand(1, 3, 16, 16).expand(4, -1, -1, -1), torch.rand(4, 6)
    ours = student_view(x, numbers, 0.4)
    assert all(not torch.allclose(ours[0], other) for other in ours[1:])
    assert torch.equal(ours[2:3], student_view(x[2:3], numbers[2:3], 0.4))
    torch.testing.assert_close(student_view(x, numbers, 0.0), x)
    assert ours.min() >= 0 and ours.max() <= 1


# ---- files, recipes, commands

def write_encoder(path: Path, **options) -> ViT:
    """A file as mae.py writes it."""
    net = teacher(**options)
    torch.save(dict(model=net.state_dict(), config=dict(net.config, mean=[0.4] * 3, std=[0.3] * 3)), path)
    return net


def arguments(*flags: str, recipe: str = "demo"):
    args = parse_args([*flags, "--device", "cpu"], "", RECIPES, OPTIONS)
    apply_recipe(args, recipe, RECIPES)
    return args


def load(*flags: str, recipe: str = "demo"):
    return tinymim.load_teacher(arguments("--image-size", "16", *flags, recipe=recipe), torch.device("cpu"))


def test_a_teacher_is_frozen_and_sees_with_its_own_mean_and_deviation(tmp_path):
    net = write_encoder(tmp_path / "t.pth")
    loaded, number, normalize = load("--teacher", str(tmp_path / "t.pth"))
    assert number == 4 and not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), loaded.parameters(), strict=True))
    torch.testing.assert_close(normalize(torch.full((1, 3, 2, 2), 0.7)), torch.ones(1, 3, 2, 2))


@pytest.mark.parametrize("depth, given, number", [(24, None, 18), (12, None, 12), (24, 21, 21), (4, 1, 1)])
def test_target_block_is_18_of_24_or_the_last_or_the_one_given(tmp_path, depth, given, number):
    write_encoder(tmp_path / "t.pth", depth=depth)
    flags = [] if given is None else ["--teacher-block", str(given)]
    assert load("--teacher", str(tmp_path / "t.pth"), *flags)[1] == number


def test_student_gets_the_heads_of_the_block_that_it_imitates(tmp_path):
    write_encoder(tmp_path / "t.pth", heads=2, last_heads=8)  # as a distilled student is
    for flags, heads in (([], 8), (["--teacher-block", "3"], 2), (["--teacher-last-heads", "4"], 4)):
        flags = ["--teacher", str(tmp_path / "t.pth"), "--image-size", "16", *flags]
        net, number, _ = load(*flags)
        model = build(arguments(*flags), net, number)
        assert type(model) is TinyMIM
        assert [block.attn.heads for block in model.encoder.blocks] == [4, 4, 4, heads]
        assert model.encoder.config["last_heads"] == heads
    flags = ["--teacher", str(tmp_path / "t.pth"), "--image-size", "16", "--target", "block"]  # needs no common heads
    assert build(arguments(*flags), *load(*flags)[:2]).encoder.config["last_heads"] == 4


@pytest.mark.parametrize("recipe, model, heads", [
    ("imagenet", "tiny", 6), ("imagenet", "small", 6), ("imagenet", "base", 12), ("cifar", "tiny", 12)])
def test_body_heads_and_drop_path_are_those_of_the_released_students(recipe, model, heads):
    args, net = arguments("--model", model, recipe=recipe), teacher(width=48, heads=16 if model != "tiny" else 12)
    encoder = build(args, net, 4).encoder
    assert [block.attn.heads for block in encoder.blocks] == [heads] * 11 + [net.config["heads"]]
    assert [block.drop_path for block in encoder.blocks] == [0.1] * 11 + [0.0]


def test_recipe_has_the_released_numbers():
    args = arguments("--model", "base", recipe="imagenet")
    assert args.blr * args.batch_size / 256 == pytest.approx(2.4e-3)
    assert (args.epochs, args.warmup_epochs, args.weight_decay, args.min_lr) == (300, 15, 0.05, 0)
    assert (args.crop_min, args.jitter, args.drop_path) == (0.2, 0.4, 0.1)
    model = build(args, teacher(width=64, heads=16), 4)
    assert sum(p.numel() for p in model.encoder.parameters()) == 85_798_656
    undecayed = [p for group in param_groups(model, 0.05) if not group["weight_decay"] for p in group["params"]]
    assert all(p.ndim == 1 for p in undecayed) and not model.encoder.pos_embed.requires_grad


def test_teacher_drop_path_is_constant_before_the_block_and_off_by_default(tmp_path):
    write_encoder(tmp_path / "t.pth")
    flags = ["--teacher", str(tmp_path / "t.pth"), "--teacher-block", "3"]
    net = load(*flags, "--teacher-drop-path", "0.1")[0]
    assert net.training and [block.drop_path for block in net.blocks] == [0.1, 0.1, 0.0, 0.0]
    assert not any(block.drop_path for block in load(*flags)[0].blocks)


def official(path: Path, prefix: str = "", width: int = 24, **more) -> None:
    """A file as the authors' code writes it: the names of MAE, TinyMIM or a wrapped network, without a config."""
    net = teacher(width=width, heads=4)
    state = {prefix + name: x for name, x in net.state_dict().items()}
    torch.save(dict(model=dict(state, **more)), path)


@pytest.mark.parametrize("prefix, more", [("", {}), ("module.", {}), ("", {"mask_token": torch.zeros(1, 1, 8)}),
                                          ("model.", {"tch_model.cls_token": torch.zeros(1, 1, 8)})])
def test_official_files_teach_and_their_heads_have_to_be_said(tmp_path, prefix, more):
    official(tmp_path / "t.pth", prefix, **more)
    with pytest.raises(InputError, match="--teacher-heads"):
        load("--teacher", str(tmp_path / "t.pth"))
    net, _, normalize = load("--teacher", str(tmp_path / "t.pth"), "--teacher-heads", "2", "--teacher-last-heads", "4")
    assert [block.attn.heads for block in net.blocks] == [2, 2, 2, 4]
    x = torch.rand(2, 3, 16, 16)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    torch.testing.assert_close(normalize(x), (x - mean) / std)


def test_a_file_without_final_norm_teaches_relations_but_not_outputs(tmp_path):
    net = teacher()
    state = {name: x for name, x in net.state_dict().items() if not name.startswith("norm.")}
    torch.save(dict(model=state, config=dict(net.config, mean=[0.5] * 3, std=[0.5] * 3)), tmp_path / "t.pth")
    load("--teacher", str(tmp_path / "t.pth"))
    with pytest.raises(InputError, match="norm.weight"):
        load("--teacher", str(tmp_path / "t.pth"), "--target", "class")


def test_a_teacher_of_another_resolution_gets_its_positions_stretched(tmp_path):
    write_encoder(tmp_path / "t.pth", image_size=24)
    assert load("--teacher", str(tmp_path / "t.pth"))[0].grid == (4, 4)


@pytest.mark.parametrize("flags, message", [
    ([], r"mae.py --width 128 --heads 8 --out runs/teacher\nand give --teacher runs/teacher/encoder.pth"),
    (["--teacher", "none.pth"], "none.pth: no such file"),
    (["--teacher", "t.pth", "--patch-size", "8"], r"4 x 4 patches of 4, the student into 2 x 2 of 8"),
    (["--teacher", "t.pth", "--teacher-block", "5"], "blocks 1 to 4"),
    (["--teacher", "t.pth", "--target", "qv"], "--target qv"),
    (["--teacher", "t.pth", "--target", "qk+qk"], r"--target qk\+qk"),
    (["--teacher", "t.pth", "--mim-weight", "1"], "mask ratio"),
    (["--teacher", "t.pth", "--mask-ratio", "1"], "mask ratio"),
    (["--teacher", "t.pth", "--teacher-heads", "3"], "--teacher-heads 3: .* was trained with 4 heads"),
    (["--teacher", "t.pth", "--width", "20", "--teacher-last-heads", "8"], "20 cannot .* among 8 heads"),
])
def test_faults_of_the_user_are_one_clear_line_and_leave_no_folder(tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    write_encoder(tmp_path / "t.pth")
    monkeypatch.setattr(tinymim, "open_images", lambda args: None)
    with pytest.raises(InputError, match=message):
        main(["--recipe", "demo", "--image-size", "16", "--out", "run", "--device", "cpu", *flags])
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with the script and vit.py alone, 48 small pictures and a teacher."""
    place = tmp_path_factory.mktemp("alone")
    for name in ("tinymim.py", "vit.py"):
        shutil.copy(ROOT / name, place)
    rng = np.random.default_rng(0)
    for split, count in (("train", 24), ("val", 4)):
        for i in range(2 * count):
            folder = place / "pictures" / split / "ab"[i % 2]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    write_encoder(place / "teacher.pth")
    return place


SHORT = ("--recipe demo --data pictures --teacher teacher.pth --image-size 16 --width 16 --depth 3 --heads 2 "
         "--batch-size 8 --epochs 2 --warmup-epochs 0.5 --log-every 1 --device cpu")


def run(place: Path, flags: str, processes: int = 1) -> subprocess.CompletedProcess:
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    return subprocess.run([sys.executable, *torchrun, "tinymim.py", *flags.split()], cwd=place, capture_output=True,
                          text=True, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}, timeout=300)


def here(place: Path, monkeypatch, flags: str) -> None:
    """The same in this process, without the seconds of a start."""
    monkeypatch.chdir(place)
    main([*SHORT.split(), *flags.split()])


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


def test_the_script_and_vit_alone_run_and_help(place):
    assert run(place, "--help").stdout.startswith("usage: tinymim.py")
    done = run(place, f"{SHORT} --out alone --epochs 1")
    assert done.returncode == 0, done.stderr
    assert ("qk+vv of block 4 of 4 of the teacher (24 wide, 4 heads) in block 3 of the student (16 wide, 4 heads, "
            "elsewhere 2)") in done.stderr
    done = run(place, "--recipe demo --data pictures")
    assert done.returncode == 2 and "python mae.py --width 128" in done.stderr and "Traceback" not in done.stderr


def test_resume_equals_an_uninterrupted_run_bit_for_bit(place, monkeypatch):
    here(place, monkeypatch, "--out whole")

    def stop_at_5(self, step, rate, step_of=tinymim.Log.step, **sums):
        return step_of(self, step, rate, **sums) or step == 5

    with monkeypatch.context() as patched:  # what a signal does: leave after the step, save
        patched.setattr(tinymim.Log, "step", stop_at_5)
        here(place, monkeypatch, "--out parts")
    assert torch.load(place / "parts/last.pth")["step"] == 5
    here(place, monkeypatch, "--out parts --resume")
    whole, parts = (torch.load(place / name / "last.pth") for name in ("whole", "parts"))
    assert whole["step"] == parts["step"] == 12
    assert all(torch.equal(whole["model"][name], parts["model"][name]) for name in whole["model"])
    states = [x["optimizer"]["state"] for x in (whole, parts)]
    assert all(torch.equal(states[0][i][name], states[1][i][name]) for i in states[0] for name in states[0][i])
    assert losses(place / "whole") == losses(place / "parts")


def test_two_processes_give_the_losses_of_one(place, monkeypatch):
    for extra, name in (("", "plain"), (" --mask-ratio 0.5 --mim-weight 1 --target qk+block", "study")):
        here(place, monkeypatch, f"--drop-path 0 --out {name}1{extra}")
        done = run(place, f"{SHORT} --drop-path 0 --out {name}2{extra}", processes=2)
        assert done.returncode == 0, done.stderr
        one, two = losses(place / f"{name}1"), losses(place / f"{name}2")
        assert len(one) == 12 and one == pytest.approx(two, rel=1e-4)
        assert one[0] == pytest.approx(two[0], rel=1e-6)
        assert len(set(one)) == 12


def test_parts_of_a_batch_give_the_losses_of_the_whole(place, monkeypatch):
    here(place, monkeypatch, "--drop-path 0 --out parts1")
    here(place, monkeypatch, "--drop-path 0 --micro-batch 2 --out parts4")
    assert losses(place / "parts1") == pytest.approx(losses(place / "parts4"), rel=1e-4)


@pytest.mark.parametrize("flags", [
    "--target qq+kk+vv --no-softmax", "--target q+k+v", "--target attention+ffn+block --teacher-drop-path 0.1",
    "--target class --mask-ratio 0.75 --mim-weight 0.5", "--target output --teacher-block 2"])
def test_the_study_runs_from_the_command_line(place, monkeypatch, flags):
    out = "study-" + re.sub(r"\W+", "-", flags)
    here(place, monkeypatch, f"{flags} --epochs 1 --out {out}")
    assert len(losses(place / out)) == 6 and all(np.isfinite(losses(place / out)))
    state, config = read_encoder(str(place / out / "encoder.pth"))
    assert state.keys() == student().state_dict().keys() and config["mean"] == [0.5, 0.5, 0.5]


def test_distilled_students_teach_and_are_fine_tuned(place, monkeypatch, capsys):
    here(place, monkeypatch, "--out first")
    assert torch.load(place / "first/encoder.pth")["config"]["last_heads"] == 4
    here(place, monkeypatch, "--teacher first/encoder.pth --width 8 --out second")
    here(place, monkeypatch, "--teacher first/last.pth --width 8 --out second-from-last")
    assert losses(place / "second") == losses(place / "second-from-last")
    file = torch.load(place / "second/encoder.pth")
    assert file["config"]["last_heads"] == 4 and file["config"]["heads"] == 2
    assert set(torch.load(place / "second/last.pth")["model"]) == {"encoder." + name for name in file["model"]}
    finetune.main("--data pictures --recipe demo --init second/encoder.pth --labels 16 --batch-size 8 --epochs 1 "
                  "--device cpu --out tuned".split())
    assert "top1" in capsys.readouterr().out


def test_loss_falls_and_the_untaught_parts_stay_as_they_were(place, monkeypatch):
    here(place, monkeypatch, "--epochs 20 --warmup-epochs 1 --blr 0.05 --out falls")
    curve = losses(place / "falls")
    assert np.mean(curve[-6:]) < 0.7 * np.mean(curve[:6])
    args = arguments(*SHORT.split())
    fresh = build(args, teacher(), 4).encoder.state_dict()
    trained = torch.load(place / "falls/encoder.pth")["model"]
    same = {name for name in fresh if torch.equal(fresh[name], trained[name])}
    untaught = {name.replace("blocks.11", "blocks.2") for name in TINY["parameters_without_gradient"]}
    assert same == {"pos_embed"} | untaught


def test_half_precision_keeps_the_loss_finite_and_in_float32():
    model, net, x = TinyMIM(student()), teacher(), 30 * torch.randn(2, 3, 16, 16)
    for block in (model.encoder.blocks[-1], net.blocks[-1]):
        block.attn.qkv.weight.data *= 300
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x, model.observe(net, x, 4))
    assert out["loss"].dtype == torch.float32 and out["loss"].isfinite()
    out["loss"].backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)

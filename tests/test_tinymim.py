"""TinyMIM against the values of the reference code and of the paper's formulas, the mistakes that these values exclude,
its options and files, and the chain from teacher to fine-tuning."""
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms.v2 import functional as V2

import finetune
import mae
import tests.reference_tinymim as reference
import tinymim
import vit
from tests.reference import assert_meets, evaluate, no_encoder
from tinymim import (RELATIONS, TARGETS, PixelDecoder, TinyMIM, TinyMIMStudy, build, divergence, main, parse_args,
                     random_masking, student_view, targets_of)
from vit import IMAGENET_MEAN, IMAGENET_STD, InputError, ViT, read_encoder, relation

GOLDEN = {name: json.loads((Path(__file__).parent / f"golden/tinymim_{name}.json").read_text())
          for name in ("tiny", "targets")}
TINY, PAPER = GOLDEN["tiny"]["expected"], GOLDEN["targets"]["expected"]
# What the files hold beside our values: other readings of the paper, mistakes, and what the released code overflows to.
ABSENT = {"values_of_common_mistakes [qk, vv]", "sequential", "optimizer", "mse_whitened_target", "l1_whitened_target",
          "smooth_l1_beta2_whitened_target", "whitened eps 1e-6", "patch_tokens_only", "variants (target not whitened)",
          "mistake: affine-free norm forgotten", "mistake: beta 1", "mean", "no_softmax_mse", "no_softmax_l1",
          "official_softmax_then_log_in_float32", "official_softmax_then_log_in_float64"}


# ---- golden values

@pytest.mark.parametrize("name", GOLDEN)
def test_reference_values_are_met_and_the_same_tensors_learn(name):
    ours, expected = evaluate(GOLDEN[name]), GOLDEN[name]["expected"]
    assert_meets(ours, expected, 1e-8, ABSENT)
    assert ours.get("grad_norm", {}).keys() == expected.get("grad_norm", {}).keys()


@pytest.mark.parametrize("reading", TINY["sequential"])
def test_a_distilled_student_teaches_a_narrower_one_in_both_readings_of_its_last_block(reading):
    case = TINY["sequential"][reading]
    ours = reference.sequential(GOLDEN["tiny"], case["narrow_student"], case["teacher_last_block_heads"])
    assert ours == {name: pytest.approx(case[name], rel=1e-8) for name in ("qk_loss", "vv_loss", "loss")}


def test_state_dict_has_the_official_names_and_shapes():
    for who, shapes in GOLDEN["tiny"]["state_dict_shapes"].items():
        model = TinyMIM(reference.build_vit(GOLDEN["tiny"]["config"][who]))
        assert {no_encoder(name): list(x.shape) for name, x in model.state_dict().items()} == shapes


def mean_over_heads(s, t):
    s, t = (x.softmax(-1).mean(1) for x in (s, t))
    return (t * (t.log() - s.log())).sum(-1).mean()


# Each of the usual mistakes that the reference lists, made in the code: (where, what instead).
LISTED = TINY["values_of_common_mistakes [qk, vv]"]
MISTAKES = {
    "teacher block 4 instead of 3 (counted from 1)": (  # the student's is its last anyway
        "tinymim.TinyMIM.observe", lambda self, vit, images, number, f=TinyMIM.observe:
        f(self, vit, images, min(number + 1, vit.depth))),
    "KL with the arguments swapped, KL(student || teacher)": ("tinymim.divergence", lambda s, t: divergence(t, s)),
    "reduction='batchmean' (sum over heads and query tokens)": (
        "tinymim.divergence", lambda s, t: F.kl_div(s.log_softmax(-1), t.softmax(-1), reduction="batchmean")),
    "query rows of patches only (class-token row left out)": (
        "tinymim.divergence", lambda s, t: divergence(s[:, :, 1:], t[:, :, 1:])),
    "no 1/sqrt(head_dim)": ("tinymim.relation", lambda a, b: a @ b.transpose(-2, -1)),
    "student fed with the teacher's view": (
        "tests.reference_tinymim.views", lambda golden, f=reference.views: f(golden)[:1] * 2),
    "mean attention over heads": ("tinymim.divergence", mean_over_heads),
}


@pytest.mark.parametrize("mistake", LISTED)
def test_a_mistake_in_the_code_gives_the_value_that_the_reference_lists_for_it(mistake, monkeypatch):
    monkeypatch.setattr(*MISTAKES[mistake])
    ours = evaluate(GOLDEN["tiny"])
    assert [ours["qk_loss"], ours["vv_loss"]] == pytest.approx(LISTED[mistake], rel=1e-8)
    assert abs(ours["loss"] / TINY["loss"] - 1) > 1e-3


# Mistakes in the other targets: (function, what instead, the value that it moves, what that becomes if it is listed).
FEATURE, RAW = ("feature", "smooth_l1_beta2_whitened_eps1e-5"), "no_softmax_smooth_l1_beta2"
STUDY_MISTAKES = {
    "beta 1": ("smooth_l1_loss", lambda s, t, beta: F.smooth_l1_loss(s, t), FEATURE, ("feature", "mistake: beta 1")),
    "not whitened": ("layer_norm", lambda x, shape: x, FEATURE, ("feature", "mistake: affine-free norm forgotten")),
    "the eps of the ViT": ("layer_norm", lambda x, shape, f=F.layer_norm: f(x, shape, eps=1e-6),
                           FEATURE, ("feature", "whitened eps 1e-6")),
    "absolute error of scores": ("smooth_l1_loss", lambda s, t, beta: F.l1_loss(s, t),
                                 ("relations", "qq", RAW), ("relations", "qq", "no_softmax_l1")),
    "highest noise kept": ("random_masking", lambda noise, keep: random_masking(-noise, keep),
                           ("masked_input", "qk_loss"), None),
}


@pytest.mark.parametrize("mistake", STUDY_MISTAKES)
def test_a_mistake_in_another_target_misses_the_formula(mistake, monkeypatch):
    def at(values, keys):
        for key in keys:
            values = values[key]
        return values
    name, instead, moved, listed = STUDY_MISTAKES[mistake]
    functions = dict(smooth_l1_loss=F.smooth_l1_loss, layer_norm=F.layer_norm)
    if name in functions:  # in tinymim alone, so that the networks' own use stays
        monkeypatch.setattr(tinymim, "F", SimpleNamespace(**{**functions, name: instead}))
    else:
        monkeypatch.setattr(tinymim, name, instead)
    ours = at(evaluate(GOLDEN["targets"]), moved)
    assert abs(ours / at(PAPER, moved) - 1) > 1e-6
    assert listed is None or ours == pytest.approx(at(PAPER, listed), rel=1e-8)


# ---- the method

def student(last_heads: int | None = 4) -> ViT:
    torch.manual_seed(0)
    return ViT(image_size=16, patch_size=4, width=16, depth=3, heads=2, last_heads=last_heads)


def teacher(**options) -> ViT:
    torch.manual_seed(1)
    return ViT(**dict(dict(image_size=16, patch_size=4, width=24, depth=4, heads=4), **options)).requires_grad_(False)


def pictures() -> torch.Tensor:
    return torch.randn(2, 3, 16, 16)


def test_networks_stop_at_the_queries_keys_and_values_of_the_block():
    model, net, called = TinyMIM(student()), teacher(), []
    for name, module in [*model.encoder.named_modules(), *(("teacher." + n, m) for n, m in net.named_modules())]:
        module.register_forward_hook(lambda *_, name=name: called.append(name))
    model(pictures(), model.observe(net, pictures(), 3))
    assert {"teacher.blocks.1.mlp", "teacher.blocks.2.attn.qkv", "blocks.2.attn.qkv"} <= set(called)
    assert not {"teacher.blocks.2.attn.proj", "teacher.blocks.3", "teacher.norm"} & set(called)
    assert not {"blocks.2.attn.proj", "blocks.2.mlp", "blocks.2", "norm"} & set(called)


def test_a_student_equal_to_its_teacher_has_no_loss_and_another_has_that_of_the_formula():
    model, net, x = TinyMIM(student()), teacher(), pictures()
    assert model(x, model.observe(model.encoder, x, 3))["loss"].abs() < 1e-7
    assert model(x, model.observe(model.encoder, -x, 3))["loss"] > 1e-6
    theirs, ours = model.observe(net, x, 4), model.observe(model.encoder, x, 3)
    losses = model(x, theirs)
    for name in ("qk", "vv"):
        s, t = ours[name].softmax(-1), theirs[name].softmax(-1)
        torch.testing.assert_close(losses[name], (t * (t / s).log()).sum() / (2 * 4 * 17))
    torch.testing.assert_close(losses["loss"], losses["qk"] + losses["vv"])


def test_other_heads_than_the_teachers_are_refused_and_not_broadcast():
    model, x = TinyMIM(student(last_heads=1)), pictures()
    with pytest.raises(InputError, match="number of heads"):
        model(x, model.observe(teacher(), x, 4))


@pytest.mark.parametrize("targets, options", [
    *(([name], {}) for name in TARGETS), (["qq", "kk", "vv"], {}), (["q", "k", "v"], {}),
    (["qk", "vv"], dict(softmax=False)), (["qk", "vv"], dict(mask_ratio=0.75)),
    (["qk", "vv"], dict(mask_ratio=0.75, mim_weight=1.0)), (["class"], dict(mask_ratio=0.75, mim_weight=0.5))])
def test_every_trainable_parameter_learns_and_the_teacher_does_not(targets, options):
    net, x = teacher(), pictures()
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
    net, x, y = teacher(), pictures(), pictures()
    plain, study = TinyMIM(student()), TinyMIMStudy(student(), 24, ["qk", "vv"])
    ours, theirs = (model(x, model.observe(net, y, 3)) for model in (plain, study))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    trained = [[name for name, p in model.named_parameters() if p.requires_grad] for model in (plain, study)]
    assert trained[0] == trained[1]


def test_targets_of_which_no_file_has_values():
    net, x = teacher(), pictures()
    got, inside = targets_of(net, x, 2, list(TARGETS), keep=None), net.blocks[0](net.embed(x))
    torch.testing.assert_close(got["class"], net.encode(x)[:, 0])
    q, k, v = net.blocks[1].qkv(inside)
    torch.testing.assert_close(got["qk"].softmax(-1) @ v, F.scaled_dot_product_attention(q, k, v))
    assert all(torch.equal(got[name], relation(x, x)) for name, x in (("vv", v), ("qq", q), ("kk", k)))


def test_a_masked_student_and_teacher_see_the_same_patches_and_no_others():
    net, x, noise = teacher(), pictures(), torch.rand(2, 16)
    model = TinyMIMStudy(student(), 24, ["qk", "vv"], mask_ratio=0.75)
    hidden = random_masking(noise, 4)[1] >= 4
    change = 9 * hidden.float().view(2, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    theirs, same = model.observe(net, x, 3, noise), model.observe(net, x + change, 3, noise)
    assert theirs["qk"].shape == (2, 4, 5, 5) and all(torch.equal(theirs[name], same[name]) for name in theirs)
    assert torch.equal(model(x, theirs, noise)["loss"], model(x + change, theirs, noise)["loss"])


def test_reconstruction_is_maes():
    encoder, x, noise = student(), pictures(), torch.rand(2, 16)
    theirs, ours = mae.MaskedAutoencoder(encoder, (16, 2, 2), 0.75), PixelDecoder(encoder, 16, 2, 2)
    order = torch.arange(48).view(4, 4, 3).permute(2, 0, 1).flatten()  # theirs: channel last in a patch; ours: first
    ours.embed, ours.mask_token, ours.pos_embed = theirs.decoder_embed, theirs.mask_token, theirs.decoder_pos_embed
    ours.blocks[0], ours.blocks[1], ours.blocks[2] = *theirs.decoder_blocks, theirs.decoder_norm
    ours.blocks[3].weight.data = theirs.decoder_pred.weight[order]
    ours.blocks[3].bias.data = theirs.decoder_pred.bias[order]
    z, restore = theirs.encode(x, noise)
    torch.testing.assert_close(ours(z, x, restore), theirs(x, noise)["loss"])


def test_half_precision_keeps_the_loss_finite_and_in_float32():
    model, net, x = TinyMIM(student()), teacher(), 30 * pictures()
    for block in (model.encoder.blocks[-1], net.blocks[-1]):
        block.attn.qkv.weight.data *= 300
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(x, model.observe(net, x, 4))["loss"]
    assert loss.dtype == torch.float32 and loss.isfinite()
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_jitter_is_torchvisions_with_the_same_factors_in_the_same_order():
    x, numbers = torch.rand(8, 3, 16, 16), torch.rand(8, 6)
    operations = (V2.adjust_brightness, V2.adjust_contrast, V2.adjust_saturation)
    for image, result, row in zip(x, student_view(x, numbers, 0.4), numbers, strict=True):
        for i in row[3:].argsort().tolist():
            image = operations[i](image, 0.6 + 0.8 * row[i].item())
        torch.testing.assert_close(result, image, atol=2e-4, rtol=0)  # torchvision's weights of grey have four digits
    assert len({tuple(row[3:].argsort().tolist()) for row in numbers}) > 1
    torch.testing.assert_close(student_view(x, numbers, 0.0), x)
    assert torch.equal(student_view(x, numbers, 0.4)[2:3], student_view(x[2:3], numbers[2:3], 0.4))


# ---- teachers, recipes, options

def arguments(*flags: str, recipe: str = "demo"):
    return parse_args(["--recipe", recipe, "--device", "cpu", *flags])


def load(*flags: str):
    return tinymim.load_teacher(arguments("--image-size", "16", "--teacher", "t.pth", *flags), torch.device("cpu"))


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes a teacher as mae.py does, to t.pth in the current folder, which is a new one."""
    def write(**options) -> ViT:
        net = teacher(**options)
        torch.save(dict(model=net.state_dict(), config=dict(net.config, mean=[0.4] * 3, std=[0.3] * 3)), "t.pth")
        return net
    monkeypatch.chdir(tmp_path)
    return write


def test_a_teacher_is_frozen_and_sees_with_its_own_mean_and_deviation(write):
    net = write()
    loaded, number = load()
    assert number == 4 and not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), loaded.parameters(), strict=True))
    torch.testing.assert_close(loaded.normalize(torch.full((1, 3, 2, 2), 0.7)), torch.ones(1, 3, 2, 2))
    net = load("--teacher-block", "3", "--teacher-drop-path", "0.1")[0]
    assert net.training and [block.drop_path for block in net.blocks] == [0.1, 0.1, 0.0, 0.0]
    write(image_size=24)
    assert load()[0].grid == (4, 4)


def test_target_block_is_18_of_24_or_the_last_or_the_one_given(write):
    for depth, flags, number in ((12, [], 12), (24, [], 18), (24, ["--teacher-block", "21"], 21)):
        write(depth=depth)
        assert load(*flags)[1] == number


@pytest.mark.parametrize("flags, heads", [
    ([], 8), (["--teacher-block", "3"], 2), (["--teacher-last-heads", "4"], 4), (["--target", "block"], 4)])
def test_student_gets_the_heads_of_the_block_that_it_imitates_if_heads_are_compared(write, flags, heads):
    write(heads=2, last_heads=8)  # as a distilled student is
    model = build(arguments(*flags), *load(*flags)[:2])
    assert type(model) is (TinyMIMStudy if "--target" in flags else TinyMIM)
    assert [block.attn.heads for block in model.encoder.blocks] == [4, 4, 4, heads]
    assert model.encoder.config["last_heads"] == heads


@pytest.mark.parametrize("recipe, model, heads", [
    ("imagenet", "tiny", 6), ("imagenet", "small", 6), ("imagenet", "base", 12), ("cifar", "tiny", 12)])
def test_students_and_recipe_are_those_of_the_authors(recipe, model, heads):
    args, net = arguments("--model", model, recipe=recipe), teacher(width=48, heads=16 if model != "tiny" else 12)
    encoder = build(args, net, 4).encoder
    assert [block.attn.heads for block in encoder.blocks] == [heads] * 11 + [net.config["heads"]]
    assert [block.drop_path for block in encoder.blocks] == [0.1] * 11 + [0.0]
    assert (args.epochs, args.warmup_epochs, args.weight_decay, args.min_lr) == (300, 15, 0.05, 0)
    if recipe == "imagenet":
        assert args.blr * args.batch_size / 256 == pytest.approx(2.4e-3) and args.target == ["qk", "vv"]
        assert (args.crop_min, args.jitter, args.drop_path) == (0.2, 0.4, 0.1) and not encoder.pos_embed.requires_grad
    assert model != "base" or sum(p.numel() for p in encoder.parameters()) == 85_798_656


def test_an_official_file_teaches_and_its_heads_have_to_be_said(write):
    torch.save(dict(model={"module." + name: x for name, x in teacher().state_dict().items()}), "t.pth")
    with pytest.raises(InputError, match="--teacher-heads"):
        load()
    net, _ = load("--teacher-heads", "2", "--teacher-last-heads", "4")
    assert [block.attn.heads for block in net.blocks] == [2, 2, 2, 4]
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    torch.testing.assert_close(net.normalize(mean + std * torch.ones(2, 3, 16, 16)), torch.ones(2, 3, 16, 16))


def test_a_file_without_final_norm_teaches_relations_but_not_outputs(write):
    write()
    file = torch.load("t.pth")
    del file["model"]["norm.weight"], file["model"]["norm.bias"]
    torch.save(file, "t.pth")
    load()
    with pytest.raises(InputError, match="norm.weight"):
        load("--target", "class")


@pytest.mark.parametrize("flags, message", [
    ("", r"mae.py --width 128 --heads 8 --blr 6e-3 --out runs/teacher\nand give --teacher runs/teacher/encoder.pth"),
    ("--teacher none.pth", "none.pth: no such file"),
    ("--teacher t.pth --patch-size 8", "patches of 4 pixels, the student into ones of 8"),
    ("--teacher t.pth --teacher-block 5", "blocks 1 to 4"),
    ("--teacher t.pth --target qk vv qk", "targets qk vv qk: expected different ones"),
    ("--teacher t.pth --mim-weight 1", "mask ratio"),
    ("--teacher t.pth --mask-ratio 1", "mask ratio"),
    ("--teacher t.pth --teacher-heads 3", "--teacher-heads 3: .* was trained with 4 heads"),
    ("--teacher t.pth --width 20 --teacher-last-heads 8", "20 cannot .* among 8 heads"),
])
def test_faults_of_the_user_are_one_clear_line_and_leave_no_folder(write, flags, message):
    write()
    with pytest.raises(InputError, match=message):
        main(["--recipe", "demo", "--image-size", "16", "--out", "run", "--device", "cpu", *flags.split()])
    assert not Path("run").exists()


def test_a_target_that_does_not_exist_ends_with_status_2(capsys):
    with pytest.raises(SystemExit) as stopped:
        arguments("--target", "qk+vv")
    assert stopped.value.code == 2 and "invalid choice: 'qk+vv'" in capsys.readouterr().err


# ---- runs

SHORT = ("--image-size 16 --teacher t.pth --width 16 --depth 3 --heads 2 --batch-size 8 --epochs 1 --warmup-epochs 0.5 "
         "--log-every 1 --device cpu --workers 0").split()


@pytest.fixture
def train(write, monkeypatch):
    """A run of 6 steps on 48 images, that ends with its --out -> its losses."""
    def run(flags: str) -> list[float]:
        main([*SHORT, *flags.split()])
        return [json.loads(line)["loss"] for line in Path(flags.split()[-1], "log.jsonl").read_text().splitlines()]
    write()
    monkeypatch.setattr(vit, "shapes", lambda total, seed, draw=vit.shapes: draw(48 if total == 20000 else 8, seed))
    return run


def test_both_see_the_same_crop_and_patches_and_the_student_other_colours(train, monkeypatch):
    seen, embed = [], ViT.embed

    def recorded(net, images, keep=None):
        mean, std = (0.4, 0.3) if net.width == 24 else (0.5, 0.5)
        seen.append((images * std + mean, keep))
        return embed(net, images, keep)

    def each_step(flags: str):
        seen.clear()
        train(flags)
        return [(*theirs, *ours) for theirs, ours in zip(seen[::2], seen[1::2], strict=True)]
    monkeypatch.setattr(ViT, "embed", recorded)
    for theirs, _, ours, _ in each_step("--jitter 0 --out same"):
        torch.testing.assert_close(theirs, ours)
    masked = each_step("--mask-ratio 0.75 --out masked")
    for theirs, teachers_patches, ours, patches in masked:
        assert torch.equal(teachers_patches, patches)
        assert all(0.01 < (a - b).abs().mean() < 0.3 for a, b in zip(theirs, ours, strict=True))
    assert len({tuple(sorted(row)) for *_, patches in masked for row in patches.tolist()}) > 40  # of 48 images

    def with_another_mask(self, net, images, number, noise, observe=TinyMIMStudy.observe):
        return observe(self, net, images, number, noise.flip(1))
    monkeypatch.setattr(TinyMIMStudy, "observe", with_another_mask)
    assert not any(torch.equal(theirs, ours) for _, theirs, _, ours in each_step("--mask-ratio 0.75 --out mistake"))


@pytest.mark.parametrize("flags", [
    "--target qq kk vv --no-softmax", "--target q k v", "--target attention ffn block --teacher-drop-path 0.1",
    "--target class --mask-ratio 0.75 --mim-weight 0.5", "--target output --teacher-block 2"])
def test_the_study_runs_from_the_command_line(train, flags):
    curve = train(f"{flags} --out study")
    assert len(curve) == 6 and np.isfinite(curve).all()
    state, config = read_encoder("study/encoder.pth")
    assert state.keys() - {"last_heads"} == student().state_dict().keys() and config["mean"] == [0.5, 0.5, 0.5]
    assert ("last_heads" in state) == (config["last_heads"] != config["heads"])


def test_distilled_students_teach_and_are_fine_tuned(train, capsys):
    train("--out first")
    said = capsys.readouterr().err
    assert ("qk+vv of block 4 of 4 of the teacher (24 wide, 4 heads) in block 3 of the student (16 wide, 4 heads, "
            "elsewhere 2)") in said
    assert "next:  python finetune.py --init first/encoder.pth --data " in said
    train("--teacher first/encoder.pth --width 8 --out second")
    file = torch.load("second/encoder.pth")
    assert file["config"]["last_heads"] == 4 and file["config"]["heads"] == 2
    assert set(torch.load("second/last.pth")["model"]) == {"encoder." + name for name in file["model"].keys() - {"last_heads"}}
    finetune.main("--init second/encoder.pth --labels 16 --batch-size 8 --epochs 1 --device cpu --workers 0 --out tuned"
                  .split())
    assert "top1" in capsys.readouterr().out


def test_a_checkpoint_teaches_like_the_encoder_of_its_run(train):
    train("--out run")
    assert train("--teacher run/last.pth --out by-last") == train("--teacher run/encoder.pth --out by-encoder")


def test_loss_falls_and_the_untaught_parts_stay_as_they_were(train):
    curve = train("--epochs 10 --blr 0.1 --out falls")
    assert np.mean(curve[-6:]) < 0.7 * np.mean(curve[:6])
    fresh = build(arguments(*SHORT), teacher(), 4).encoder.state_dict()
    trained = torch.load("falls/encoder.pth")["model"]
    same = {name for name in fresh if torch.equal(fresh[name], trained[name])}
    untaught = {name.replace("blocks.11", "blocks.2") for name in TINY["parameters_without_gradient"]}
    assert same == {"pos_embed"} | untaught

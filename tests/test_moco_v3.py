"""MoCo v3 against the values of the official code, the mistakes that these values exclude, its views, its files."""
import itertools
import json
import math
import pickle
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter, ImageOps
from torch import nn
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as per_image

import finetune
import moco_v3
import vit
from moco_v3 import BLUR, NUMBERS, SOLARIZE, Colours, MoCo, TwoViews, draw_colours, momentum_at, recolour, recolour_views, spread, start_weights
from tests.reference import assert_meets, evaluate
from tests.reference_moco import build_moco, momentum_of, several_processes, two_views

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = {name: json.loads((Path(__file__).parent / f"golden/moco_{name}.json").read_text())
          for name in ("tiny", "2proc", "schedules", "pos_embed", "init")}
TINY = GOLDEN["tiny"]["config"]
ABSENT = {"loss_if_pos_embed_computed_in_float64", "equivalent_variants_loss", "wrong_variants_loss", "wrong_variants",
          "grad_is_mathematically_zero", "optimizer", "left_out"}  # facts about other computations than ours, and remarks


# ---- the official values

def test_reference_values_are_met():
    ours, expected = evaluate(GOLDEN["tiny"]), GOLDEN["tiny"]["expected"]
    assert ours["loss"] == pytest.approx(expected["loss"], rel=1e-10)
    assert ours["loss_second_iteration"] == pytest.approx(expected["loss_second_iteration"], rel=1e-10)
    assert_meets(ours, expected, absent=ABSENT)
    assert ours["grad_norm"].keys() == expected["grad_norm"].keys()
    shapes = {name: list(value.shape) for name, value in build_moco(TINY).state_dict().items()}
    assert shapes == GOLDEN["tiny"]["state_dict_shapes"]


def test_momentum_and_learning_rate_follow_the_official_schedules():
    ours = evaluate(GOLDEN["schedules"])["schedules"]
    for name, given in GOLDEN["schedules"]["schedules"].items():
        for point, expected in zip(ours[name]["at"], given["at"], strict=True):
            assert point["m"] == pytest.approx(expected["m"], abs=1e-11), (name, expected)
            if "lr" in point:
                assert point["lr"] == pytest.approx(expected["lr"], rel=1e-9, abs=1e-12), (name, expected)


def test_positions_name_the_row_first():
    for ours, expected in zip(evaluate(GOLDEN["pos_embed"])["tables"], GOLDEN["pos_embed"]["tables"], strict=True):
        assert ours["cls_row_all_zero"] and ours["shape"] == expected["shape"]
        for name in ours.keys() - {"cls_row_all_zero", "shape"}:
            assert_meets(ours[name], expected[name], rtol=2e-6, where=f"{expected['grid']} {name}")
    table = start_weights(vit.ViT((16, 32), 8, width=32, depth=1, heads=1)).pos_embed[0, 1:]
    rows = torch.arange(2.0).repeat_interleave(4)  # the official code mixes rows and columns up here, ours does not
    torch.testing.assert_close(table[:, 0], rows.sin())


def test_the_start_is_the_official_one():
    ours, golden = evaluate(GOLDEN["init"]), GOLDEN["init"]
    for name, rule in golden["rule"].items():
        seen = ours["observed_seed0"][name]
        assert seen["max_abs"] <= rule["a"] * (1 + 1e-6) and seen["max_abs"] > 0.999 * rule["a"], name
        assert seen["std"] == pytest.approx(rule["std"], rel=0.01), name
    assert ours["cls_token_std_observed"] == pytest.approx(1e-6, rel=0.3)
    assert ours["backbone_keys"] == golden["backbone_keys"]
    torch.manual_seed(0)
    model = MoCo(start_weights(vit.ViT(32, 8, width=32, depth=1, heads=1)), 64, 16)
    assert all((p == name.endswith("weight")).all() for name, p in model.named_parameters() if p.ndim == 1)
    assert all(map(torch.equal, model.base_encoder.state_dict().values(), model.momentum_encoder.state_dict().values()))


# ---- mistakes

def make(mistake: str, model: MoCo, patch: pytest.MonkeyPatch) -> None:
    fast, slow, right, right_loss = model.base_encoder, model.momentum_encoder, moco_v3.features, moco_v3.info_nce
    projector = [p.clone() for p in slow.head.parameters()]

    def heads_on_both(network, *views):
        z = nn.Sequential.forward(network.head, network.features(torch.cat(views)))
        return (nn.Sequential.forward(model.predictor, z) if network is fast else z).chunk(2)

    def follow_but_for_the_projector(momentum):
        MoCo.follow(model, momentum)
        for p, kept in zip(slow.head.parameters(), projector, strict=True):
            p.copy_(kept)

    match mistake:
        case "heads_on_both_views_at_once":
            patch.setattr(moco_v3, "features", heads_on_both)
            for head in (fast.head, slow.head, model.predictor):
                patch.setattr(head, "forward", lambda z: z)
        case "projector_left_out_of_EMA":
            patch.setattr(model, "follow", follow_but_for_the_projector)
        case "m_and_1-m_exchanged":
            patch.setattr(model, "follow", lambda momentum: MoCo.follow(model, 1 - momentum))
        case "keys_before_EMA_update":
            patch.setattr(model, "follow", lambda momentum: None)
        case "momentum_encoder_in_eval":
            slow.eval()
        case "positives_from_same_view":
            patch.setattr(moco_v3, "features", lambda network, *views: right(network, *(views if network is fast else views[::-1])))
        case "no_predictor":
            patch.setattr(model.predictor, "forward", lambda z: z)
        case "no_2T_factor":
            patch.setattr(moco_v3, "info_nce", lambda q, k, tau: (right_loss(q, k, tau)[0] / (2 * tau), right_loss(q, k, tau)[1]))
        case "pos_embed_in_MAE_order":
            for network in (fast, slow):
                network.pos_embed.data = network.pos_embed.data.roll(16, dims=2)
        case "layernorm_eps_1e-5":
            for norm in (module for module in model.modules() if isinstance(module, nn.LayerNorm)):
                norm.eps = 1e-5
        case "mean_pool_instead_of_cls":
            fast.pool = slow.pool = "mean"


@pytest.mark.parametrize("mistake", [
    "heads_on_both_views_at_once", "projector_left_out_of_EMA", "m_and_1-m_exchanged", "keys_before_EMA_update", "momentum_encoder_in_eval",
    "positives_from_same_view", "no_predictor", "no_2T_factor", "pos_embed_in_MAE_order", "layernorm_eps_1e-5", "mean_pool_instead_of_cls"])
def test_a_mistake_gives_the_value_that_the_official_code_gives_with_it(mistake, monkeypatch):
    model = build_moco(TINY)
    make(mistake, model, monkeypatch)
    loss = model(*two_views(TINY), momentum_of(TINY))["loss"].item()
    assert loss == pytest.approx(GOLDEN["tiny"]["expected"]["wrong_variants_loss"][mistake], rel=1e-8)
    assert abs(loss / GOLDEN["tiny"]["expected"]["loss"] - 1) > 1e-6


def without_offset(right=moco_v3.gather) -> None:
    moco_v3.gather = lambda k: (right(k)[0], 0)


def without_gathering() -> None:
    moco_v3.gather = lambda k: (k, 0)


def test_two_processes_meet_the_reference_and_with_a_mistake_the_value_that_the_official_code_gives_with_it():
    """By BatchNorm of all rows, which is what `evaluate` gives, and by one of each process for itself."""
    right, *wrong = several_processes(GOLDEN["2proc"]["config"], (None, without_offset, without_gathering))
    for way, expected in GOLDEN["2proc"]["expected"].items():
        assert_meets(right[way], expected, absent=ABSENT, where=way)
        for rank in (0, 1):
            assert right[way][f"loss_rank{rank}"] == pytest.approx(expected[f"loss_rank{rank}"], rel=1e-10)
            for mistake, ours in zip(("labels_without_rank_offset", "keys_not_gathered"), wrong, strict=True):
                value = expected["wrong_variants"][f"rank{rank}"][mistake]
                assert ours[way][f"loss_rank{rank}"] == pytest.approx(value, rel=1e-8), mistake


# ---- what must hold of the model

def test_only_the_fast_side_learns_and_all_of_it():
    model = build_moco(dict(TINY, stop_grad_conv1=False))
    model(*two_views(TINY), momentum_of(TINY))["loss"].backward()
    without = {name for name, p in model.named_parameters() if p.grad is None or p.grad.norm() < 1e-12}
    fixed = {"base_encoder.pos_embed", "base_encoder.norm.bias"}  # BatchNorm takes the mean, so this bias, out again
    assert without == fixed | {name for name, _ in model.named_parameters() if name.startswith("momentum_encoder.")}


def test_a_frozen_patch_projection_stays_as_it_was_drawn_in_both_networks():
    model = build_moco(dict(TINY, stop_grad_conv1=True))
    model.momentum_encoder.load_state_dict(model.base_encoder.state_dict())
    before = model.base_encoder.patch_embed.proj.weight.clone()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.1)  # as `main` does
    for _ in range(2):
        model(*two_views(TINY), momentum_of(TINY))["loss"].backward()
        optimizer.step()
    for network in (model.base_encoder, model.momentum_encoder):
        assert torch.equal(network.patch_embed.proj.weight, before)
    assert not torch.equal(model.base_encoder.cls_token, model.momentum_encoder.cls_token)


def test_a_collapsed_network_shows_in_its_loss_and_in_the_spread_of_its_features():
    q = torch.ones(16, 8)
    loss, _ = moco_v3.info_nce(q, q, 0.2)
    assert 2 * loss.item() == pytest.approx(4 * 0.2 * math.log(16), rel=1e-5)
    assert spread(q).item() == pytest.approx(0, abs=1e-6)
    torch.manual_seed(0)
    assert spread(torch.randn(512, 64)).item() == pytest.approx(1, rel=0.02)


def test_the_loss_is_in_float32_under_autocast():
    model = build_moco(TINY).float()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(*(view.float() for view in two_views(TINY)), momentum_of(TINY))["loss"]
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(GOLDEN["tiny"]["expected"]["loss"], rel=0.05)


# ---- the views

def pictures(total: int = 64, side: int = 32) -> torch.Tensor:
    """uint8: shapes, and noise, in which every colour occurs."""
    noise = np.random.RandomState(0).randint(0, 256, (total // 2, side, side, 3), np.uint8)
    return torch.from_numpy(np.concatenate([vit.shapes(total // 2, 0, side).items, noise])).permute(0, 3, 1, 2)


def plan(total: int, **given) -> Colours:
    """Nothing is done but what is given."""
    nothing = dict(order=np.full((total, 4), -1), factor=np.tile(np.float32([1, 1, 1, 0]), (total, 1)), grey=np.zeros(total, bool),
                   sigma=np.zeros(total, np.float32), solarize=np.zeros(total, bool))
    return Colours(**{**nothing, **given})


def one_by_one(x: torch.Tensor, colours: Colours) -> torch.Tensor:
    """The same by torchvision, without blur."""
    adjust, changed = (per_image.adjust_brightness, per_image.adjust_contrast, per_image.adjust_saturation, per_image.adjust_hue), []
    for row, picture in enumerate(x):
        for number in colours.order[row][colours.order[row] >= 0]:
            picture = adjust[number](picture, float(colours.factor[row, number]))
        if colours.grey[row]:
            picture = per_image.rgb_to_grayscale(picture, 3)
        if colours.solarize[row]:
            picture = per_image.solarize(picture, 127.5 / 255 if picture.is_floating_point() else 128)
        changed.append(picture)
    return torch.stack(changed)


def drawn(total: int, view: int, blur: float) -> Colours:
    return draw_colours(np.random.default_rng(0).random((total, NUMBERS), np.float32), view, blur)


@pytest.mark.parametrize("view", [0, 1])
def test_colours_are_torchvisions_with_the_same_numbers_for_every_picture(view):
    x, colours = pictures(256).float() / 255, drawn(256, view, 0.0)
    assert len({tuple(order) for order in colours.order}) == 25  # 24 orders, and none
    close = (recolour(x.clone(), colours) - one_by_one(x, colours)).abs() < 1 / 255
    # Solarization jumps: a value next to one half may fall on either side of it.
    assert close[~colours.solarize].all() and close.float().mean() > 0.9999


@pytest.mark.parametrize("name, how", [
    ("grey", lambda image: image.convert("L").convert("RGB")), ("solarize", lambda image: ImageOps.solarize(image, 128))])
def test_grey_and_solarize_are_pillows_to_rounding(name, how):
    x = pictures()
    wanted = torch.stack([per_image.pil_to_tensor(how(per_image.to_pil_image(picture))) for picture in x])
    assert (recolour(x.float() / 255, plan(64, **{name: np.ones(64, bool)})) * 255 - wanted).abs().max() <= 1.01


def test_blur_is_a_gaussian_of_each_pictures_own_width_and_near_pillows():
    x = pictures(32, 48).float() / 255
    sigma = np.linspace(0.1, 2.0, 32, dtype=np.float32)
    ours = recolour(x.clone(), plan(32, sigma=sigma))
    for row, s in enumerate(sigma):
        wanted = per_image.gaussian_blur(x[row], [17, 17], [float(s)] * 2)
        assert (ours[row] - wanted)[:, 8:-8, 8:-8].abs().max() < 1e-5  # at the border torchvision mirrors, Pillow repeats
    # Pillow adds up boxes. On smooth pictures the two agree to 1/255; noise shows the difference, here in the mean.
    smooth = recolour(pictures(64, 48)[:32].float() / 255, plan(32, sigma=np.full(32, 2, np.float32)))
    x = (smooth * 255).round().byte()
    ours = recolour(x.float() / 255, plan(32, sigma=sigma)) * 255
    for row, s in enumerate(sigma):
        image = per_image.to_pil_image(x[row]).filter(ImageFilter.GaussianBlur(float(s)))
        assert (ours[row] - per_image.pil_to_tensor(image)).abs().mean() < 1


@pytest.mark.parametrize("view", [0, 1])
def test_the_two_views_are_drawn_by_the_official_table(view):
    c = drawn(20000, view, 2.0)
    assert (c.order[:, 0] >= 0).mean() == pytest.approx(0.8, abs=0.01) and c.grey.mean() == pytest.approx(0.2, abs=0.01)
    assert (c.sigma > 0).mean() == pytest.approx((1.0, 0.1)[view], abs=0.01)
    assert c.solarize.mean() == pytest.approx((0.0, 0.2)[view], abs=0.01)
    assert 0.1 <= c.sigma[c.sigma > 0].min() < 0.11 and 1.99 < c.sigma.max() <= 2 and not drawn(20000, view, 0.0).sigma.any()
    for column, bounds in zip(c.factor.T, [(0.6, 1.4), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1)], strict=True):
        assert (column.min(), column.max()) == pytest.approx(bounds, abs=1e-3)
    assert all((np.sort(order) == np.arange(4)).all() for order in c.order[c.order[:, 0] >= 0][:100])


def test_an_image_gives_two_crops_by_one_seed_of_its_own():
    views = vit.Views(vit.shapes(64, 0), TwoViews(vit.random_crop((16, 16), 0.2)), 0, 2 * NUMBERS)
    (pixels, numbers, *_), (again, same, *_), (later, others, *_) = views[0, 5], pickle.loads(pickle.dumps(views))[0, 5], views[1, 5]
    assert pixels.shape == (2, 16, 16, 3) and pixels.dtype == torch.uint8 and not torch.equal(*pixels)
    assert torch.equal(pixels, again) and torch.equal(numbers, same)
    assert not torch.equal(pixels, later) and not (numbers == others).any()


def test_each_view_has_its_own_half_of_the_numbers_whatever_else_is_in_the_batch():
    torch.manual_seed(0)
    x, numbers = torch.rand(70, 2, 3, 8, 8), torch.rand(70, 2 * NUMBERS)  # more images than are changed at once
    both = recolour_views(x.clone(), numbers, 2.0)
    for row in range(0, 70, 3):
        for view, own in enumerate(numbers[row:row + 1].chunk(2, dim=1)):
            alone = recolour(x[row:row + 1, view].clone(), draw_colours(own.numpy(), view, 2.0))
            torch.testing.assert_close(both[view][row:row + 1], alone)


@pytest.mark.slow
@pytest.mark.parametrize("side", [32, 36, 64])
def test_crops_with_batched_colours_are_faster_than_pillow_picture_by_picture(side):
    """One thread, from pictures in memory to two normalised views of each. The arithmetic of a pixel costs the same on both
    ways, the call of an operation is saved: the larger the pictures, the smaller the gain on a CPU."""
    items, threads, seconds = pictures(256, side).permute(0, 2, 3, 1).numpy(), torch.get_num_threads(), {}
    torch.set_num_threads(1)
    normalize, images = vit.ViT(side, 4, mean=(0.5,) * 3, std=(0.5,) * 3).normalize, [Image.fromarray(picture) for picture in items]
    views = vit.Views(vit.Images(items), TwoViews(vit.random_crop((side, side), 0.08)), 0, 2 * NUMBERS)
    blur = v2.Lambda(lambda image: image.filter(ImageFilter.GaussianBlur(np.random.uniform(0.1, 2))))
    textbook = [v2.Compose([
        v2.RandomResizedCrop(side, (0.08, 1.0)), v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], 0.8), v2.RandomGrayscale(0.2),
        v2.RandomApply([blur], BLUR[i]), v2.RandomSolarize(128, SOLARIZE[i]), v2.RandomHorizontalFlip(), v2.PILToTensor(),
        v2.ToDtype(torch.float32, scale=True), v2.Normalize((0.5,) * 3, (0.5,) * 3)]) for i in (0, 1)]

    def crops(epoch):
        pixels, numbers, *_ = zip(*(views[epoch, i] for i in range(256)), strict=True)
        return torch.stack(pixels).float().div_(255), torch.stack(numbers)
    ways = {"crops": crops, "crops and colours": lambda epoch: [*map(normalize, recolour_views(*crops(epoch), 2.0))],
            "Pillow": lambda epoch: [torch.stack([textbook[i](image) for image in images]) for i in (0, 1)]}
    for epoch, (name, way) in itertools.product(range(10), ways.items()):
        start = time.process_time()
        way(epoch)
        seconds[name] = min(seconds.get(name, math.inf), time.process_time() - start)
    torch.set_num_threads(threads)
    print(f"{side} px, one core:", ", ".join(f"{name} {512 / value:.0f} views/s" for name, value in seconds.items()))
    assert 2.1 * seconds["crops and colours"] < seconds["Pillow"]


# ---- in and out

SMALL = "--device cpu --width 16 --heads 2 --depth 2 --hidden 32 --projection 8 --batch-size 16 --log-every 1 --workers 0".split()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(*words: str) -> None:
    moco_v3.main([*SMALL, *" ".join(words).split()])


def records(out: str) -> list[dict]:
    return [json.loads(line) for line in Path(out, "log.jsonl").read_text().splitlines()]


def test_what_a_run_writes(folder):
    run("--epochs 0.01 --out a")
    assert {file.name for file in Path("a").iterdir()} == {"args.json", "log.jsonl", "last.pth", "encoder.pth", "views.png", "lock"}
    assert Image.open("a/views.png").size == (8 * 34 + 2, 4 * 34 + 2)  # 16 pairs, eight pictures in a row
    for record in records("a"):
        assert record.keys() >= {"loss", "top1", "feature_std", "uniform_loss", "momentum", "lr", "images_per_s"}
        assert record["uniform_loss"] == pytest.approx(0.8 * math.log(16), rel=1e-6)
        assert record["momentum"] == pytest.approx(momentum_at((record["step"] - 1) / 1250, 0.9, 0.01), rel=1e-12)


def test_the_encoder_of_a_run_goes_through_finetune_and_so_do_official_files(folder, capsys):
    run("--epochs 0.01 --out a")
    assert not any(name.startswith("head.") for name in torch.load("a/encoder.pth", weights_only=True)["model"])
    last = torch.load("a/last.pth", weights_only=True)["model"]
    official = {f"module.{name}": value for name, value in last.items()}
    torch.save(dict(epoch=1, arch="vit", state_dict=official), "official.pth.tar")
    torch.save(dict(start_epoch=1, model=official), "lite.pth.tar")
    for file, heads in (("a/encoder.pth", ""), ("a/last.pth", ""), ("official.pth.tar", "--heads 2"), ("lite.pth.tar", "--heads 2")):
        state, config = vit.read_encoder(file, 2)
        network = vit.ViT(32, 8, width=16, depth=2, heads=2, mlp_ratio=2)
        assert vit.load_encoder(network, state, config) == []
        assert all(torch.equal(value, last[f"base_encoder.{name}"]) for name, value in network.state_dict().items())
        capsys.readouterr()
        finetune.main(f"--device cpu --workers 0 --protocol knn --labels 100 --pool cls --init {file} {heads}".split())
        assert capsys.readouterr().out.startswith("top1")


@pytest.mark.parametrize("words, message", [
    ("--micro-batch 8", "must hold its share at once: raise --micro-batch to 16"), ("--batch-size 1 --micro-batch 1", "BatchNorm needs two"),
    ("--image-size 34", "multiple of the patch size"), ("--batch-size 50000 --micro-batch 50000", "less than one batch")])
def test_bad_input_is_one_clear_line(words, message, folder):
    with pytest.raises(vit.InputError, match=message):
        run("--epochs 0.01 --out a", words)
    assert not Path("a").exists()


@pytest.mark.parametrize("words", ["--temperature 0", "--momentum 1.5", "--blur 3", "--hidden 0", "--projection 2.5", "--crop-min 2"])
def test_options_that_make_no_sense_end_with_status_2(words, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(words)
    assert stopped.value.code == 2 and words.split()[0] in capsys.readouterr().err

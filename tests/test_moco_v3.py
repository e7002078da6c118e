"""MoCo v3 against the values of the official code, the mistakes that these values exclude, its views, and whole runs."""
import functools
import inspect
import json
import math
import os
import shutil
import signal
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
from moco_v3 import BLUR, NUMBERS, SOLARIZE, Colours, MoCo, draw_colours, recolour, spread, start_weights
from tests.reference import evaluate
from tests.reference_moco import build_moco, momentum_of, several_processes, two_views

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = {name: json.loads((Path(__file__).parent / f"golden/moco_{name}.json").read_text())
          for name in ("tiny", "2proc", "schedules", "pos_embed", "init")}
TINY = GOLDEN["tiny"]["config"]
ABSENT = {"loss_if_pos_embed_computed_in_float64", "equivalent_variants_loss", "wrong_variants_loss", "wrong_variants",
          "grad_is_mathematically_zero", "optimizer", "left_out"}  # facts about other computations than ours, and remarks


def assert_meets(ours, expected, rtol: float = 1e-6, where: str = "") -> None:
    """Every value of the golden file is there and equal."""
    if isinstance(expected, dict):
        for key in expected.keys() - ABSENT:
            assert key in ours, f"{where}/{key} is missing"
            assert_meets(ours[key], expected[key], rtol, f"{where}/{key}")
    elif isinstance(expected, list) and expected and isinstance(expected[0], (str, dict)):
        assert len(ours) == len(expected), where
        for i, (a, b) in enumerate(zip(ours, expected, strict=True)):
            assert_meets(a, b, rtol, f"{where}/{i}")
    elif isinstance(expected, (str, bool)):
        assert ours == expected, where
    else:
        ours, expected = torch.tensor(ours, dtype=torch.float64), torch.tensor(expected, dtype=torch.float64)
        torch.testing.assert_close(ours, expected, rtol=rtol, atol=1e-9, msg=lambda m: f"{where}: {m}")


# ---- the official values

def test_reference_values_are_met():
    ours, expected = evaluate(GOLDEN["tiny"]), GOLDEN["tiny"]["expected"]
    assert ours["loss"] == pytest.approx(expected["loss"], rel=1e-10)
    assert ours["loss_second_iteration"] == pytest.approx(expected["loss_second_iteration"], rel=1e-10)
    assert_meets(ours, expected)
    assert ours["grad_norm"].keys() == expected["grad_norm"].keys()


@pytest.fixture(scope="module")
def on_two_processes() -> list[dict]:
    """What two processes compute: as it is, and with two mistakes (the first is what `evaluate` gives)."""
    return several_processes(GOLDEN["2proc"]["config"], (None, without_offset, without_gathering))


def test_two_processes_meet_the_reference_with_local_and_with_shared_batchnorm(on_two_processes):
    ours = on_two_processes[0]
    for way, expected in GOLDEN["2proc"]["expected"].items():
        for rank in (0, 1):
            assert ours[way][f"loss_rank{rank}"] == pytest.approx(expected[f"loss_rank{rank}"], rel=1e-10)
        assert_meets(ours[way], expected, where=way)


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
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert (p == 0).all(), name
        if p.ndim == 1 and name.endswith("weight"):
            assert (p == 1).all(), name
    fast, slow = model.base_encoder.state_dict(), model.momentum_encoder.state_dict()
    assert all(torch.equal(fast[name], slow[name]) for name in fast)


def test_names_and_shapes_are_the_official_ones():
    ours = {name: list(value.shape) for name, value in build_moco(TINY).state_dict().items()}
    assert ours == GOLDEN["tiny"]["state_dict_shapes"]


# ---- mistakes

def identity(x):
    return x


def heads_on_both_views(model, patch):
    fast, slow = model.base_encoder, model.momentum_encoder

    def features(network, *views):
        z = nn.Sequential.forward(network.head, network.features(torch.cat(views)))
        return (nn.Sequential.forward(model.predictor, z) if network is fast else z).chunk(2)
    patch.setattr(moco_v3, "features", features)
    for head in (fast.head, slow.head, model.predictor):
        patch.setattr(head, "forward", identity)


def projector_not_averaged(model, patch):
    @torch.no_grad()
    def follow(momentum):
        for (name, slow), fast in zip(model.momentum_encoder.named_parameters(), model.base_encoder.parameters(), strict=True):
            if not name.startswith("head."):
                slow.lerp_(fast, 1 - momentum)
    patch.setattr(model, "follow", follow)


def same_view(model, patch):
    right = moco_v3.features
    patch.setattr(moco_v3, "features", lambda network, *views:
                  right(network, *(views if network is model.base_encoder else views[::-1])))


def no_factor(model, patch):
    right = moco_v3.info_nce
    patch.setattr(moco_v3, "info_nce", lambda q, k, tau: (right(q, k, tau)[0] / (2 * tau), right(q, k, tau)[1]))


def mae_order(model, patch):
    for network in (model.base_encoder, model.momentum_encoder):
        network.pos_embed.data = network.pos_embed.data.roll(16, dims=2)


def other_eps(model, patch):
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-5


def mean_pool(model, patch):
    model.base_encoder.pool = model.momentum_encoder.pool = "mean"


MISTAKES = {
    "heads_on_both_views_at_once": heads_on_both_views,
    "projector_left_out_of_EMA": projector_not_averaged,
    "m_and_1-m_exchanged": lambda model, patch: patch.setattr(model, "follow", lambda m: MoCo.follow(model, 1 - m)),
    "keys_before_EMA_update": lambda model, patch: patch.setattr(model, "follow", identity),
    "momentum_encoder_in_eval": lambda model, patch: model.momentum_encoder.eval(),
    "positives_from_same_view": same_view,
    "no_predictor": lambda model, patch: patch.setattr(model.predictor, "forward", identity),
    "no_2T_factor": no_factor,
    "pos_embed_in_MAE_order": mae_order,
    "layernorm_eps_1e-5": other_eps,
    "mean_pool_instead_of_cls": mean_pool,
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_gives_the_value_that_the_official_code_gives_with_it(name, monkeypatch):
    model = build_moco(TINY)
    MISTAKES[name](model, monkeypatch)
    loss = model(*two_views(TINY), momentum_of(TINY))["loss"].item()
    assert loss == pytest.approx(GOLDEN["tiny"]["expected"]["wrong_variants_loss"][name], rel=1e-8)
    assert abs(loss / GOLDEN["tiny"]["expected"]["loss"] - 1) > 1e-6


def without_offset() -> None:
    source = inspect.getsource(moco_v3.info_nce)
    offset = " + len(q) * (dist.get_rank() if dist.is_initialized() else 0)"
    assert offset in source
    exec(source.replace(offset, ""), moco_v3.__dict__)


def without_gathering() -> None:  # comes after `without_offset`
    moco_v3.gather = identity


@pytest.mark.parametrize("name, number", [("labels_without_rank_offset", 1), ("keys_not_gathered", 2)])
def test_a_mistake_between_processes_gives_the_value_that_the_official_code_gives_with_it(name, number, on_two_processes):
    for way, expected in GOLDEN["2proc"]["expected"].items():
        for rank in (0, 1):
            value = expected["wrong_variants"][f"rank{rank}"][name]
            assert on_two_processes[number][way][f"loss_rank{rank}"] == pytest.approx(value, rel=1e-8)


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
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2, weight_decay=0.1)
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

def pictures(count: int = 64, side: int = 32) -> torch.Tensor:
    """uint8: shapes, and noise, in which every colour occurs."""
    noise = torch.from_numpy(np.random.RandomState(0).randint(0, 256, (count // 2, 3, side, side), np.uint8))
    return torch.cat([vit.shapes(count // 2, 0, side).items, noise])


def plan(count: int, **given) -> Colours:
    """Nothing is done but what is given."""
    nothing = dict(order=np.full((count, 4), -1), factor=np.tile([1.0, 1.0, 1.0, 0.0], (count, 1)), grey=np.zeros(count, bool),
                   sigma=np.zeros(count), solarize=np.zeros(count, bool))
    return Colours(**{**nothing, **given})


def one_by_one(picture: torch.Tensor, colours: Colours, row: int) -> torch.Tensor:
    """The same by torchvision, without blur."""
    adjust = (per_image.adjust_brightness, per_image.adjust_contrast, per_image.adjust_saturation, per_image.adjust_hue)
    for number in colours.order[row]:
        if number >= 0:
            picture = adjust[number](picture, float(colours.factor[row, number]))
    if colours.grey[row]:
        picture = per_image.rgb_to_grayscale(picture, 3)
    if colours.solarize[row]:
        picture = per_image.solarize(picture, 127.5 / 255 if picture.is_floating_point() else 128)
    return picture


@pytest.mark.parametrize("view", [0, 1])
def test_colours_are_torchvisions_with_the_same_numbers_for_every_picture(view):
    x = pictures(256).float() / 255
    colours = draw_colours(vit.uniform((256, NUMBERS), 0, moco_v3.COLOURS, 1), view, 0.0)
    assert len({tuple(order) for order in colours.order}) == 25  # 24 orders, and none
    wanted = torch.stack([one_by_one(picture, colours, row) for row, picture in enumerate(x)])
    close = (recolour(x.clone(), colours) - wanted).abs() < 1 / 255
    # Solarization jumps: a value next to one half may fall on either side of it.
    assert close[~colours.solarize].all() and close.float().mean() > 0.9999


@pytest.mark.parametrize("number, values, most", [  # contrast and saturation of bytes round the grey picture first
    (0, (0.6, 1.4), 1.01), (1, (0.6, 1.4), 1.5), (2, (0.8, 1.2), 1.5), (3, (-0.1, 0.1), 1.01)])
def test_one_operation_on_bytes_differs_from_torchvisions_by_rounding_alone(number, values, most):
    x = pictures()
    factor = np.tile([1.0, 1.0, 1.0, 0.0], (64, 1))
    factor[:, number] = np.linspace(*values, 64)
    order = np.full((64, 4), -1)
    order[:, 2] = number
    colours = plan(64, order=order, factor=factor)
    wanted = torch.stack([one_by_one(picture, colours, row) for row, picture in enumerate(x)])
    assert (recolour(x.float() / 255, colours) * 255 - wanted).abs().max() <= most


def test_grey_and_solarize_are_pillows_to_rounding():
    x, yes = pictures(), np.ones(64, bool)
    images = [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in x]
    for colours, how in ((plan(64, grey=yes), lambda image: image.convert("L").convert("RGB")),
                         (plan(64, solarize=yes), lambda image: ImageOps.solarize(image, 128))):
        wanted = torch.stack([torch.from_numpy(np.array(how(image))).permute(2, 0, 1) for image in images])
        assert (recolour(x.float() / 255, colours) * 255 - wanted).abs().max() <= 1.01


def test_blur_is_a_gaussian_of_each_pictures_own_width_and_near_pillows():
    x = pictures(32, 48).float() / 255
    sigma = np.linspace(0.1, 2.0, 32)
    ours = recolour(x.clone(), plan(32, sigma=sigma))
    for row, s in enumerate(sigma):
        wanted = per_image.gaussian_blur(x[row], [17, 17], [float(s)] * 2)
        assert (ours[row] - wanted)[:, 8:-8, 8:-8].abs().max() < 1e-5  # at the border torchvision mirrors, Pillow repeats
    # Pillow adds up boxes. On smooth pictures the two agree to 1/255; noise shows the difference, here in the mean.
    smooth = recolour(vit.shapes(32, 0, 48).items.float() / 255, plan(32, sigma=np.full(32, 2.0)))
    bytes_ = (smooth * 255).round().byte()
    ours = recolour(bytes_.float() / 255, plan(32, sigma=sigma)) * 255
    for row, s in enumerate(sigma):
        image = Image.fromarray(bytes_[row].permute(1, 2, 0).numpy()).filter(ImageFilter.GaussianBlur(float(s)))
        assert (ours[row] - torch.from_numpy(np.array(image)).permute(2, 0, 1)).abs().mean() < 1


def test_the_two_views_are_drawn_by_the_official_table():
    numbers = np.random.default_rng(0).random((2, 20000, NUMBERS), dtype=np.float32)
    for view in (0, 1):
        c = draw_colours(numbers[view], view, 2.0)
        assert (c.order[:, 0] >= 0).mean() == pytest.approx(0.8, abs=0.01) and c.grey.mean() == pytest.approx(0.2, abs=0.01)
        assert (c.sigma > 0).mean() == pytest.approx(BLUR[view], abs=0.01) and c.solarize.mean() == pytest.approx(SOLARIZE[view], abs=0.01)
        assert 0.1 <= c.sigma[c.sigma > 0].min() < 0.11 and 1.99 < c.sigma.max() <= 2
        for column, (low, high) in enumerate([(0.6, 1.4), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1)]):
            assert c.factor[:, column].min() == pytest.approx(low, abs=1e-3) and c.factor[:, column].max() == pytest.approx(high, abs=1e-3)
        assert all((np.sort(order) == np.arange(4)).all() for order in c.order[c.order[:, 0] >= 0][:100])
    assert (BLUR, SOLARIZE) == ((1.0, 0.1), (0.0, 0.2))
    assert (draw_colours(numbers[0], 0, 0.0).sigma == 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("side, times", [(32, 5), (36, 4), (64, 1.5)])
def test_batched_views_are_faster_than_pillow_picture_by_picture(side, times):
    """One thread; crop, flip, colours, to normalised tensors. The arithmetic of a pixel costs the same on both ways, the
    call of an operation is saved: the larger the pictures, the smaller the gain on a CPU."""
    x, threads, rate = pictures(256, side), torch.get_num_threads(), {}
    torch.set_num_threads(1)
    packed, view = vit.Packed(x, None, None), vit.View((side, side), (0.08, 1.0))
    normalize = vit.normalizer((0.5,) * 3, (0.5,) * 3, torch.device("cpu"))
    images = [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in x]
    blur = v2.Lambda(lambda image: image.filter(ImageFilter.GaussianBlur(np.random.uniform(0.1, 2))))
    textbook = [v2.Compose([
        v2.RandomResizedCrop(side, (0.08, 1.0)), v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], 0.8), v2.RandomGrayscale(0.2),
        v2.RandomApply([blur], BLUR[i]), v2.RandomSolarize(128, SOLARIZE[i]), v2.RandomHorizontalFlip(), v2.PILToTensor(),
        v2.ToDtype(torch.float32, scale=True), v2.Normalize((0.5,) * 3, (0.5,) * 3)]) for i in (0, 1)]

    def ours(step):
        for i in (0, 1):
            seen = packed.look(np.arange(256), vit.uniform((256, vit.View.NUMBERS), i, vit.CROPS, step), view)
            normalize(recolour(seen, draw_colours(vit.uniform((256, NUMBERS), i, moco_v3.COLOURS, step), i, 2.0)))

    def theirs(step):
        for i in (0, 1):
            torch.stack([textbook[i](image) for image in images])
    for name, work in (("ours", ours), ("theirs", theirs)):
        work(0)
        seconds = []
        for step in range(1, 6):
            start = time.process_time()
            work(step)
            seconds.append(time.process_time() - start)
        rate[name] = 512 / min(seconds)
    torch.set_num_threads(threads)
    print(f"{side} px, one core: batched {rate['ours']:.0f} views/s, picture by picture {rate['theirs']:.0f}")
    assert rate["ours"] > times * rate["theirs"]


# ---- whole runs

SMALL = "--device cpu --width 16 --heads 2 --depth 2 --hidden 32 --projection 8 --batch-size 16 --log-every 1 --workers 0".split()


generated = functools.cache(vit.shapes)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder to run in, with 64 small pictures in `small`; the signals are given back afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(vit, "shapes", generated)  # they take seconds, and are always the same
    save(generated(2000, seed=1).items[:64], tmp_path / "small")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield tmp_path
    for number, handler in handlers.items():
        signal.signal(number, handler)


def save(x: torch.Tensor, path: Path) -> None:
    path.mkdir()
    for i, picture in enumerate(x):
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(path / f"{i}.png")


def run(*words: str) -> None:
    moco_v3.main([*SMALL, *" ".join(words).split()])


def records(out: str) -> list[dict]:
    return [json.loads(line) for line in Path(out, "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kind", ["shapes", "photos"])
def test_a_run_stopped_in_mid_epoch_and_resumed_equals_an_unbroken_one(kind, folder, monkeypatch):
    words = "--epochs 0.01 --blur 0.8" if kind == "shapes" else "--data photos --recipe demo --epochs 4 --blur 2 --image-size 16"
    if kind == "photos":
        save(pictures(50, 72), Path("photos"))  # too large to be packed
    run(words, "--out whole")
    rate, steps = moco_v3.set_lr, []

    def set_lr(*arguments):
        steps.append(0)
        if len(steps) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        rate(*arguments)
    with monkeypatch.context() as patch:
        patch.setattr(moco_v3, "set_lr", set_lr)
        with pytest.raises(SystemExit) as stopped:
            run(words, "--out parts")
    assert stopped.value.code == 128 + signal.SIGTERM
    assert 5 <= torch.load("parts/last.pth", weights_only=True)["step"] <= 6
    run(words, "--out parts --resume")
    whole, parts = (torch.load(f"{out}/last.pth", weights_only=True) for out in ("whole", "parts"))
    assert whole["step"] == parts["step"] == 12
    for name, value in whole["model"].items():  # the buffers of BatchNorm included
        assert torch.equal(value, parts["model"][name]), name
    for i, state in whole["optimizer"]["state"].items():
        assert all(torch.equal(value, parts["optimizer"]["state"][i][name]) for name, value in state.items())
    assert [record["loss"] for record in records("whole")] == [record["loss"] for record in records("parts")]


def test_the_encoder_of_a_run_goes_through_finetune_and_so_do_official_files(folder, capsys):
    run("--epochs 0.01 --out a")
    assert {file.name for file in Path("a").iterdir()} == {"args.json", "log.jsonl", "last.pth", "encoder.pth", "views.png"}
    assert records("a")[-1].keys() >= {"loss", "uniform_loss", "top1", "feature_std", "momentum", "lr", "images_per_s"}
    assert records("a")[0]["uniform_loss"] == pytest.approx(0.8 * math.log(16), rel=1e-6)
    ours = torch.load("a/encoder.pth", weights_only=True)
    assert ours["config"]["heads"] == 2 and not any(name.startswith("head.") for name in ours["model"])
    last = torch.load("a/last.pth", weights_only=True)["model"]
    torch.save(dict(epoch=1, arch="vit", state_dict={f"module.{name}": value for name, value in last.items()}), "official.pth.tar")
    torch.save(dict(start_epoch=1, model={f"module.{name}": value for name, value in last.items()}), "lite.pth.tar")
    told = []
    for file, heads in (("a/encoder.pth", None), ("a/last.pth", None), ("official.pth.tar", 2), ("lite.pth.tar", 2)):
        state, config = vit.read_encoder(file, heads)
        network = vit.ViT(32, 8, width=16, depth=2, heads=2, mlp_ratio=2)
        assert vit.load_encoder(network, state, config) == []
        assert all(torch.equal(value, last[f"base_encoder.{name}"]) for name, value in network.state_dict().items())
        capsys.readouterr()
        finetune.main(f"--device cpu --protocol knn --labels 100 --pool cls --init {file}".split() + ["--heads", "2"] * bool(heads))
        told.append(capsys.readouterr().out)
    assert told[0].startswith("top1") and len(set(told[:2])) == 1  # official files bring another mean and deviation
    finetune.main("--device cpu --labels 64 --epochs 1 --init official.pth.tar --heads 2 --out b".split())
    assert Path("b/model.pth").exists()


def test_two_processes_run_and_say_what_is_missing(folder):
    command = [str(ROOT / "moco_v3.py"), *SMALL, *"--data small --recipe demo --epochs 2 --out".split()]
    one = subprocess.run([sys.executable, *command, "one"], capture_output=True, text=True)
    two = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *command, "two"],
                         capture_output=True, text=True)
    assert one.returncode == two.returncode == 0, one.stderr + two.stderr
    assert two.stderr.count("each process normalises over its own 8 images") == 1 and "SyncBatchNorm" not in one.stderr
    a, b = ([record["loss"] for record in records(out)] for out in ("one", "two"))
    assert len(a) == len(b) == 8 and a != b
    assert a[0] == pytest.approx(b[0], rel=0.3)  # the same pictures, views and weights; other batch statistics


@pytest.mark.parametrize("words, message", [
    ("--micro-batch 8", "would come in 2 parts"), ("--batch-size 1 --micro-batch 1", "BatchNorm needs two"),
    ("--image-size 34", "multiple of the patch size"), ("--batch-size 50000 --micro-batch 50000", "less than one batch")])
def test_bad_input_is_one_clear_line(words, message, folder):
    with pytest.raises(vit.InputError, match=message):
        run("--epochs 0.01 --out a", words)


def test_the_script_and_vit_alone_in_a_folder_work_without_a_warning(folder):
    for name in ("moco_v3.py", "vit.py"):
        shutil.copy(ROOT / name, folder)
    strict = [sys.executable, "-W", "error::DeprecationWarning:__main__", "-W", "error::FutureWarning"]
    subprocess.run([*strict, "-c", "from moco_v3 import MoCo, start_weights, recolour"], check=True)
    told = subprocess.run([*strict, "moco_v3.py", "--help"], check=True, capture_output=True, text=True).stdout
    assert "--temperature" in told and "--freeze-patch" in told
    done = subprocess.run([*strict, "moco_v3.py", *SMALL, "--epochs", "0.005"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Path("runs/moco_v3-demo/encoder.pth").exists()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_a_gpu_trains_in_every_precision(precision, folder):
    moco_v3.main([*SMALL[2:], "--device", "cuda", "--out", "a", "--epochs", "0.1", "--log-every", "10", "--precision", precision])
    assert records("a")[-1]["loss"] < records("a")[0]["loss"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_syncbatchnorm_under_torchrun_on_a_gpu_has_the_losses_of_a_run_without_it(folder):
    command = [str(ROOT / "moco_v3.py"), *SMALL[2:], *"--device cuda --precision fp32 --epochs 0.02 --out".split()]
    subprocess.run([sys.executable, *command, "one"], check=True)
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1", *command, "sync"], check=True)
    one, sync = ([record["loss"] for record in records(out)] for out in ("one", "sync"))
    assert sync[:5] == pytest.approx(one[:5], rel=1e-3)

"""Classification against the values of the reference code; the optimizers, votes and augmentations of finetune.py."""
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import finetune
import vit
from finetune import LARS, RECIPES, build, knn_hits, main, parse_args, probe_head
from tests.reference import assert_meets, build_classifier, evaluate, images
from vit import SIZES, InputError, RandAugment, ViT, balanced, cosine, mixing, operation, param_groups, random_erasing, shapes

GOLDEN = json.loads((Path(__file__).parent / "golden/finetune.json").read_text())


def test_reference_values_are_met():
    ours, expected = evaluate(GOLDEN), GOLDEN["expected"]
    for pool in expected:
        assert ours[pool]["loss"] == pytest.approx(expected[pool]["loss"], rel=1e-8)
        for kind in ("mixup", "cutmix"):
            expected[pool][kind].pop("x", None)
    assert_meets(ours, expected)


@pytest.mark.parametrize("name", GOLDEN["lr_schedule"])
def test_learning_rates(name):
    case = GOLDEN["lr_schedule"][name]
    a = case["args"]
    for value in case["values"]:
        ours = cosine(value["epoch"], a["lr"], a["min_lr"], a["warmup_epochs"], a["epochs"])
        assert ours == pytest.approx(value["lr"], rel=1e-9, abs=1e-18)


def test_lars_alone():
    def array(seed, *shape):
        return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape))
    w, b, z, t = nn.Parameter(array(3, 5, 4)), nn.Parameter(array(4, 5)), nn.Parameter(torch.zeros(5, 4).double()), array(5, 5, 4)
    optimizer = LARS([dict(params=[w, b, z], weight_decay=0.1, lr_scale=1.0)], lr=0.2)
    for _ in range(4):
        optimizer.zero_grad()
        ((w - t).square().sum() + b.square().sum() + 0.1 * (z - t).square().sum()).backward()
        optimizer.step()
    for name, ours in (("w", w), ("b", b), ("z", z)):
        torch.testing.assert_close(ours.detach(), torch.tensor(GOLDEN["lars_only"][name]).double(), rtol=1e-6, atol=1e-9)


def test_three_steps_of_the_linear_probe():
    case = GOLDEN["linear_probe"]
    model = build_classifier(GOLDEN, "cls").requires_grad_(False)
    head = probe_head(model.width, 7).double()
    head[1].load_state_dict(model.head.state_dict())
    model.head = head
    x, targets = images(case["input"]["images"]), torch.tensor(case["input"]["targets"])
    optimizer = LARS(param_groups(model, 0.0), lr=0.5)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["head.1.weight", "head.1.bias"]
    for step in case["steps"]:
        model.train()
        logits = model(x)
        loss = F.cross_entropy(logits, targets)
        assert loss.item() == pytest.approx(step["loss"], rel=1e-8)
        assert logits[0].tolist() == pytest.approx(step["logits[0]"], rel=1e-6)
        optimizer.zero_grad()
        loss.backward()
        for name, norm in step["grad_norm"].items():
            assert model.get_parameter(name).grad.norm().item() == pytest.approx(norm, rel=1e-6)
        optimizer.step()
        assert model.head[1].bias.tolist() == pytest.approx(step["after"]["head.1.bias"], rel=1e-6)
        assert model.head[0].running_var.sum().item() == pytest.approx(step["after"]["head.0.running_var_sum"], rel=1e-6)
    assert model.eval()(x)[0].tolist() == pytest.approx(case["eval_logits_after_3_steps[0]"], rel=1e-6)
    assert {name: list(v.shape) for name, v in model.state_dict().items() if name.startswith("head.")} == case["state_dict_head"]


def test_evaluation_sees_as_much_as_timm():
    for side, resized in GOLDEN["eval_resize"].items():
        centre = RECIPES["imagenet"]["centre"] if int(side) <= 224 else 1.0
        assert int(int(side) / centre) == resized


def test_neighbours_vote_by_similarity():
    bank = F.normalize(torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [-1.0, 0.0]]), dim=1)
    labels = torch.tensor([0, 1, 2, 2])
    query = torch.tensor([[5.0, 0.2], [0.1, 3.0]])
    weights = (F.normalize(query, dim=1) @ bank.T / 0.07).exp()
    for k in (1, 3, 4, 9):
        by_hand = []
        for row in weights:
            near = row.topk(min(k, 4)).indices.tolist()
            votes = [sum(row[i].item() for i in near if labels[i] == c) for c in range(3)]
            by_hand.append(votes.index(max(votes)))
        assert knn_hits(query, torch.tensor(by_hand), bank, labels, 3, k=k) == 2


def test_random_erasing_keeps_its_share_and_fills_with_noise():
    torch.manual_seed(0)
    x = torch.full((4000, 1, 16, 16), 9.0)
    y = random_erasing(x, 0.25)
    erased = (y != 9).float().mean((1, 2, 3))
    assert (erased > 0).float().mean() == pytest.approx(0.25, abs=0.02)
    boxes = erased[erased > 0]
    assert 0.01 <= boxes.min() and boxes.max() < 0.36 and boxes.mean() == pytest.approx((0.02 + 1 / 3) / 2, abs=0.015)
    noise = y[y != 9]
    assert abs(noise.mean()) < 0.02 and noise.std() == pytest.approx(1, abs=0.02)
    assert torch.equal(random_erasing(x, 0.0), x)


def test_randaugment_levels_are_timms_at_magnitude_9():
    pixels = np.random.RandomState(0).randint(0, 256, (20, 30, 3), np.uint8)
    image = Image.fromarray(pixels)

    def done(number, up=True):
        return np.asarray(operation(number, image, 9.0, up)).astype(int)
    assert (done(4) == (pixels & 0b10000000)).all()                             # posterize: 4 - int(3.6) = 1 bit
    assert (done(5) == np.where(pixels < 256 - 230, pixels, 255 - pixels)).all()  # solarize above 256 - int(230.4)
    assert (done(6) == np.where(pixels < 128, pixels + 99, pixels)).all()       # solarize-add int(99.0)
    assert (done(2) == 255 - pixels).all()
    assert abs(done(9, up=False) - 0.19 * pixels).max() <= 1                    # brightness 1 - 0.81
    moved = done(13)                                                            # translate x by 0.405 of the width
    assert (moved[:, -12:] == (124, 116, 104)).all() and abs(moved[:, :15].mean() - pixels[:, 13:28].mean()) < 8


def test_randaugment_does_each_operation_half_of_the_time_and_any_level_is_valid(monkeypatch):
    image, levels = torch.randint(0, 256, (3, 8, 8), dtype=torch.uint8), []
    torch.manual_seed(0)
    same = 0
    for _ in range(1000):
        result = RandAugment(9.0)(image)
        same += result is image
        assert result.shape == image.shape and result.dtype == torch.uint8
    assert same / 1000 == pytest.approx(0.25, abs=0.06)
    for number in range(15):
        for level in (0.0, 10.0):
            for up in (True, False):
                operation(number, vit.v2.functional.to_pil_image(image), level, up)
    monkeypatch.setattr(vit, "operation", lambda number, image, level, up: levels.append((number, level, up)) or image)
    for _ in range(2000):
        RandAugment(9.0)(image)
    numbers, values, ups = zip(*levels, strict=True)
    assert set(numbers) == set(range(15)) and np.mean(ups) == pytest.approx(0.5, abs=0.05)
    assert max(values) == 10 and np.std(values) == pytest.approx(0.5, abs=0.05) and np.mean(values) == pytest.approx(9, abs=0.05)


def test_mixing_gives_soft_labels_of_sum_one():
    torch.manual_seed(0)
    x, y = torch.randn(6, 3, 8, 8), torch.arange(6) % 4
    for options in ((0.8, 0.0), (0.0, 1.0), (0.8, 1.0)):
        mixed, soft = mixing(*options, classes=4)(x, y)
        assert mixed.shape == x.shape and soft.shape == (6, 4)
        torch.testing.assert_close(soft.sum(1), torch.ones(6))
    assert mixing(0.0, 0.0, 4) is None


def test_balanced_labels():
    chosen = balanced(shapes(300, seed=0), 50, seed=1)
    assert np.bincount(chosen.labels).tolist() == [5] * 10
    other = balanced(shapes(300, seed=0), 50, seed=2)
    assert not np.array_equal(chosen.items, other.items)


def arguments(words: str = ""):
    """As on the command line, with a file of `source`'s network."""
    torch.save(dict(model=source()[0], config=source()[1]), "encoder.pth")
    return parse_args(["--init", "encoder.pth", *words.split()])


def source() -> tuple[dict, dict]:
    torch.manual_seed(3)
    vit = ViT(image_size=16, patch_size=4, width=16, depth=3, heads=4, last_heads=2, mean=(0.5,) * 3, std=(0.5,) * 3)
    nn.init.normal_(vit.blocks[0].mlp.fc1.bias), nn.init.normal_(vit.blocks[2].mlp.fc1.bias)  # as if it had been trained
    return vit.state_dict(), vit.config


def test_a_fine_tuned_network_starts_from_the_file_with_a_faint_head_and_one_number_of_heads(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = source()[0]
    model, changes = build(*arguments("--reuse 2"), 5)
    assert {block.attn.heads for block in model.blocks} == {4}
    assert model.pos_embed.requires_grad and model.head.weight.abs().max() < 2e-4
    assert torch.equal(model.blocks[1].attn.qkv.weight, state["blocks.1.attn.qkv.weight"])
    assert not torch.equal(model.blocks[2].attn.qkv.weight, state["blocks.2.attn.qkv.weight"])
    assert model.blocks[2].mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.1)  # as from scratch
    assert changes == ["new blocks from 3 on", "new fc_norm", "new head"]


def test_frozen_features_are_the_files_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state, config = source()
    original = ViT(**config)
    original.load_state_dict(state)
    x = torch.randn(2, 3, 16, 16)
    for pool in ("cls", "mean"):
        model, _ = build(*arguments(f"--protocol linear --pool {pool}"), 5)
        assert [name for name, p in model.named_parameters() if p.requires_grad] == ["head.1.weight", "head.1.bias"]
        tokens = original.through(original.embed(x))
        pooled = tokens[:, 0] if pool == "cls" else tokens[:, 1:].mean(1)
        torch.testing.assert_close(model.features(x), original.norm(pooled))


def test_evaluation_of_a_written_classifier_repeats_its_result(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(dict(model=source()[0], config=source()[1]), "encoder.pth")
    results = []
    for command in ("--init encoder.pth --epochs 1 --labels 64 --out a", "--init a/model.pth --eval",
                    "--init encoder.pth --epochs 1 --protocol linear --labels 100 --out b", "--init b/model.pth --eval"):
        main([*command.split(), "--device", "cpu"])
        results.append(capsys.readouterr().out)
    assert results[0] == results[1] and results[2] == results[3] and "top1" in results[0]
    records = [json.loads(line) for line in Path("a/log.jsonl").read_text().splitlines()]
    assert records[-1]["val_images"] == 2000 and math.isfinite(records[-1]["top1"])


@pytest.mark.parametrize("words, width, recipe", [
    ("--data d", 192, "imagenet"), ("--data d", 384, "imagenet-small"), ("--data d", 768, "imagenet-base"),
    ("--data d", 1024, "imagenet-large"), ("--data d", 1280, "imagenet-huge"), ("--data d", 100, "imagenet"),
    ("--data d --recipe transfer", 384, "transfer"), ("--data cifar10", 384, "cifar"), ("", 384, "demo"),
    ("--data d --protocol linear", 384, "imagenet-linear"), ("--data cifar100 --protocol linear", 192, "cifar-linear"),
    ("--protocol linear", 192, "demo-linear"), ("--data d --recipe transfer --protocol linear", 192, "imagenet-linear"),
    ("--data d --protocol knn", 768, "imagenet-base")])
def test_the_recipe_follows_data_protocol_and_width(words, width, recipe):
    parser = vit.common_options("", RECIPES)
    parser.add_argument("--protocol", default="finetune")
    assert finetune.choose_recipe(parser.parse_args(words.split()), width) == recipe


def test_what_the_file_says_is_a_default_and_a_flag_that_contradicts_it_is_an_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args, (_, config) = arguments()
    assert (args.image_size, args.mean, args.recipe, args.centre) == ([16, 16], [0.5] * 3, "demo", 1.0)
    assert arguments("--image-size 32")[0].image_size == [32, 32] and arguments("--image-size 8 16")[0].image_size == [8, 16]
    assert arguments("--layer-decay 0.5")[0].layer_decay == 0.5
    assert arguments("--data d --image-size 224")[0].centre == 0.875 and arguments("--data d --image-size 384")[0].centre == 1.0
    assert parse_args([])[0].layer_decay == 1.0  # from scratch
    assert arguments("--protocol linear --recipe demo")[0].recipe == "demo-linear"  # as it is named in --out and on resume
    for words, match in (("--width 32", "has 16"), ("--model tiny", "is 16 wide"), ("--heads 2 --protocol knn", "trained with 4 heads")):
        with pytest.raises(InputError, match=match):
            arguments(words)
    assert {size["width"] for size in SIZES.values()} >= finetune.OF_WIDTH.keys()

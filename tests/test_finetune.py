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

from finetune import LARS, RECIPES, build, knn_hits, main, probe_head, reused
from tests.reference import build_classifier, evaluate, images
from tests.test_mae import assert_meets
from vit import ViT, balanced, cosine, mixing, param_groups, random_erasing, randaugment, shapes

GOLDEN = json.loads((Path(__file__).parent / "golden/finetune.json").read_text())


def test_reference_values_are_met():
    ours, expected = evaluate(GOLDEN), GOLDEN["expected"]
    for pool in expected:
        assert ours[pool]["loss"] == pytest.approx(expected[pool]["loss"], rel=1e-8)
        for kind in ("mixup", "cutmix"):
            expected[pool][kind].pop("x", None)
    assert_meets(ours, expected, rtol=1e-6)


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


def numbers(operation: int, level: float = 0.5, sign: float = 0.0) -> np.ndarray:
    """One operation of RandAugment, done; the second one not."""
    return np.array([(operation + 0.5) / 15, 0.0, level, sign, 0.0, 0.9, 0.0, 0.0])


def test_randaugment_levels_are_timms_at_magnitude_9():
    picture = np.random.RandomState(0).randint(0, 256, (20, 30, 3), np.uint8)
    image = Image.fromarray(picture)

    def done(operation, **where):
        return np.asarray(randaugment(image, numbers(operation, **where), 9)).astype(int)
    assert (done(4) == (picture & 0b10000000)).all()                             # posterize: 4 - int(3.6) = 1 bit
    assert (done(5) == np.where(picture < 256 - 230, picture, 255 - picture)).all()  # solarize above 256 - int(230.4)
    assert (done(6) == np.where(picture < 128, picture + 99, picture)).all()     # solarize-add int(99.0)
    assert (done(2) == 255 - picture).all()
    dark = done(9, sign=0.9)                                                     # brightness 1 - 0.81
    assert abs(dark - 0.19 * picture).max() <= 1
    moved = done(13)                                                             # translate x by 0.405 of the width
    assert (moved[:, -12:] == (124, 116, 104)).all() and abs(moved[:, :15].mean() - picture[:, 13:28].mean()) < 8


def test_randaugment_does_each_operation_half_of_the_time_and_any_level_is_valid():
    image, rng = Image.fromarray(np.random.RandomState(0).randint(0, 256, (8, 8, 3), np.uint8)), np.random.default_rng(0)
    same = 0
    for row in rng.random((400, 8), dtype=np.float32):
        result = randaugment(image, row, 10)
        same += result is image
        assert result.size == (8, 8) and result.mode == "RGB"
    assert same / 400 == pytest.approx(0.25, abs=0.06)
    for extreme in (0.0, np.float32(1 - 2 ** -24)):
        for operation in range(15):
            randaugment(image, numbers(operation, level=float(extreme)), 10)


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


def test_reuse_keeps_the_first_blocks_and_the_embeddings():
    names = ["cls_token", "blocks.0.norm1.bias", "blocks.1.norm1.bias", "blocks.11.norm1.bias", "norm.bias"]
    assert [name for name in names if reused(name, 1)] == ["cls_token", "blocks.0.norm1.bias", "norm.bias"]
    assert [name for name in names if reused(name, None)] == names


def arguments(**changes):
    import argparse
    return argparse.Namespace(**{**dict(protocol="finetune", seed=0, pool="mean", drop_path=0.0, reuse=None, image_size=16), **changes})


def source() -> tuple[dict, dict]:
    torch.manual_seed(3)
    vit = ViT(image_size=16, patch_size=4, width=16, depth=3, heads=4, last_heads=2)
    return vit.state_dict(), dict(vit.config, mean=[0.5] * 3, std=[0.5] * 3)


def test_a_fine_tuned_network_starts_from_the_file_with_a_faint_head_and_one_number_of_heads():
    state, config = source()
    model, fresh = build(arguments(reuse=2), (state, config), 5)
    assert {block.attn.heads for block in model.blocks} == {4}
    assert model.pos_embed.requires_grad and model.head.weight.abs().max() < 2e-4
    assert torch.equal(model.blocks[1].attn.qkv.weight, state["blocks.1.attn.qkv.weight"])
    assert not torch.equal(model.blocks[2].attn.qkv.weight, state["blocks.2.attn.qkv.weight"])
    assert any(name.startswith("blocks.2.") for name in fresh) and not any(name.startswith("blocks.1.") for name in fresh)


def test_frozen_features_are_the_files_own():
    state, config = source()
    original = ViT(**{k: v for k, v in config.items() if k not in ("mean", "std")})
    original.load_state_dict(state)
    x = torch.randn(2, 3, 16, 16)
    for pool in ("cls", "mean"):
        model, _ = build(arguments(protocol="linear", pool=pool), (state, config), 5)
        assert [name for name, p in model.named_parameters() if p.requires_grad] == ["head.1.weight", "head.1.bias"]
        tokens = original.embed(x)
        for block in original.blocks:
            tokens = block(tokens)
        pooled = tokens[:, 0] if pool == "cls" else tokens[:, 1:].mean(1)
        torch.testing.assert_close(model.features(x), original.norm(pooled))


def test_evaluation_of_a_written_classifier_repeats_its_result(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(dict(model=source()[0], config=dict(source()[1], image_size=[16, 16])), "encoder.pth")
    results = []
    for command in ("--init encoder.pth --epochs 1 --labels 64 --out a", "--init a/model.pth --eval",
                    "--init encoder.pth --epochs 1 --protocol linear --labels 100 --out b", "--init b/model.pth --eval"):
        main([*command.split(), "--device", "cpu"])
        results.append(capsys.readouterr().out)
    assert results[0] == results[1] and results[2] == results[3] and "top1" in results[0]
    records = [json.loads(line) for line in Path("a/log.jsonl").read_text().splitlines()]
    assert records[-1]["val_images"] == 2000 and math.isfinite(records[-1]["top1"])

"""The network: positions, sizes, parameter groups, and the weights of every format of the field."""
import argparse
import json
import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tests.reference import evaluate
from tests.test_runs import ROOT, TORCHRUN
from vit import SIZES, InputError, ViT, layer_of, load_encoder, param_groups, read_encoder, relation, resize_positions, sincos_2d

GOLDEN = json.loads((Path(__file__).parent / "golden/sincos.json").read_text())
FINETUNE = json.loads((Path(__file__).parent / "golden/finetune.json").read_text())


OURS = evaluate(GOLDEN)


@pytest.mark.parametrize("kind, number", [("cases", i) for i in range(len(GOLDEN["cases"]))]
                         + [("interpolation", i) for i in range(len(GOLDEN["interpolation"]))])
def test_positions_and_stretched_positions_are_maes(kind, number):
    """Tables agree to float32 rounding, in which both are kept."""
    case, ours = GOLDEN[kind][number], OURS[kind][number]
    assert ours["shape"] == case["shape"]
    for key in ("sum", "abs_sum", "sq_sum"):
        if key in case:
            assert ours[key] == pytest.approx(case[key], rel=1e-6)
    for mine, entry in zip(ours["entries"], case["entries"], strict=True):
        assert mine["value"] == pytest.approx(entry["value"], abs=2e-6)


def test_positions_of_an_oblong_grid_have_columns_first():
    ours = sincos_2d(8, (2, 3))
    assert torch.equal(ours[:3, :4], ours[3:, :4])                       # the same columns in both rows
    assert torch.equal(ours[0::3, 4:], ours[1::3, 4:])                   # the same rows in all columns
    assert ours[1, 0] == pytest.approx(torch.tensor(1.0).sin().item())


@pytest.mark.parametrize("name, millions", [("tiny", 5.717416), ("small", 22.050664), ("base", 86.567656)])
def test_classifiers_have_the_known_numbers_of_parameters(name, millions):
    with torch.device("meta"):
        model = ViT(**SIZES[name], classes=1000, pool="mean")
    assert sum(p.numel() for p in model.parameters()) == round(millions * 1e6)


def test_fused_attention_is_softmax_of_the_raw_scores():
    torch.manual_seed(0)
    block = ViT(image_size=8, patch_size=4, width=16, depth=1, heads=4).double().blocks[0]
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    q, k, v = block.qkv(x)
    by_hand = (relation(q, k).softmax(-1) @ v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(block.attn(block.norm1(x)), block.attn.proj(by_hand))


def test_through_runs_the_blocks_that_are_named_and_no_others():
    torch.manual_seed(0)
    model = net(depth=4)
    x = model.embed(torch.randn(2, 3, 32, 32))
    by_hand = [x]
    for block in model.blocks:
        by_hand.append(block(by_hand[-1]))
    for first, last in ((1, 4), (1, 1), (2, 3), (4, 4)):
        assert torch.equal(model.through(by_hand[first - 1], first, last), by_hand[last])
    assert torch.equal(model.through(by_hand[2], first=3), by_hand[4])
    assert torch.equal(model.through(x, last=0), x) and torch.equal(model.through(x, first=5), x)


def test_relations_are_float32_in_half_precision_and_stay_float64():
    q = torch.full((1, 1, 2, 4), 300.0)
    with torch.autocast("cpu", torch.bfloat16):
        assert relation(q.bfloat16(), q.bfloat16()).dtype == torch.float32
    assert relation(q.double(), q.double()).dtype == torch.float64
    assert relation(q.half(), q.half()).isfinite().all()


def test_stochastic_depth_grows_linearly_and_drops_whole_samples():
    for key, (depth, rate) in {"depth 12, rate 0.1": (12, 0.1), "depth 24, rate 0.2": (24, 0.2)}.items():
        model = ViT(image_size=8, patch_size=4, width=8, depth=depth, heads=1, drop_path=rate)
        assert [block.drop_path for block in model.blocks] == pytest.approx(FINETUNE["drop_path_rates"][key], rel=1e-6)
    model = ViT(image_size=8, patch_size=4, width=8, depth=1, heads=1, drop_path=[1.0]).train()
    x = torch.randn(3, 5, 8)
    assert torch.equal(model.blocks[0](x), x)
    assert not torch.equal(model.eval().blocks[0](x), x)


@pytest.mark.parametrize("setting", FINETUNE["layer_decay_12_layers"])
def test_layer_decay_of_every_parameter(setting):
    expected, decay = FINETUNE["layer_decay_12_layers"][setting], float(setting.split()[-1])
    model = ViT(**SIZES["tiny"], image_size=32, classes=10, pool="mean" if "global" in setting else "cls")
    model.pos_embed.requires_grad_(True)
    groups = param_groups(model, 0.05, ("cls_token", "pos_embed"), decay)
    assert len(groups) == expected["num_groups"]
    names = {id(p): name for name, p in model.named_parameters()}
    ours = {names[id(p)]: group for group in groups for p in group["params"]}
    assert ours.keys() == expected["params"].keys()
    for name, values in expected["params"].items():
        assert layer_of(name, 12) == values["layer_id"]
        assert ours[name]["lr_scale"] == pytest.approx(values["lr_scale"], rel=1e-10)
        assert ours[name]["weight_decay"] == values["weight_decay"]


# ---- weights

def net(**changes) -> ViT:
    torch.manual_seed(1)
    return ViT(**{**dict(image_size=32, patch_size=16, width=24, depth=2, heads=4), **changes})


def saved(tmp_path, content) -> str:
    torch.save(content, tmp_path / "file.pth")
    return str(tmp_path / "file.pth")


def plain(model: ViT) -> dict:
    return {name: value.clone() for name, value in model.state_dict().items()}


def with_prefix(prefix: str, state: dict) -> dict:
    return {prefix + name: value for name, value in state.items()}


DECODER = {"mask_token": torch.zeros(1, 1, 8), "decoder_pos_embed": torch.zeros(1, 5, 8), "decoder_embed.weight": torch.zeros(8, 24),
           "decoder_blocks.0.norm1.weight": torch.zeros(8), "decoder_norm.weight": torch.zeros(8), "decoder_pred.bias": torch.zeros(8)}
FORMATS = {
    "MAE, encoder only": lambda s: {"model": s},
    "MAE, full": lambda s: {"model": {**s, **DECODER}, "args": argparse.Namespace(epochs=1)},
    "MAE-Lite": lambda s: {"model": with_prefix("module.model.", {**s, **DECODER}), "start_epoch": 400},
    "MAE-Lite, D-MAE": lambda s: {"model": {**with_prefix("module.model.", s), **with_prefix("module.tch_model.", s),
                                           "module.attn_adapter.adapter1.weight": torch.zeros(1)}},
    "DeiT": lambda s: {"model": {**s, "head.weight": torch.zeros(10, 24), "head.bias": torch.zeros(10)}},
    "MoCo v3": lambda s: {"state_dict": {**with_prefix("module.base_encoder.", {**s, "head.0.weight": torch.zeros(8, 24)}),
                                         **with_prefix("module.momentum_encoder.", s), "module.predictor.0.weight": torch.zeros(8)},
                          "epoch": 300, "arch": "vit_small"},
    "G2SD": lambda s: {"model": {**s, **DECODER, "encoderfeature_pred.fc1.weight": torch.zeros(8), "decoderfeature_pred.fc1.bias": torch.zeros(8)}},
    "timm": lambda s: {**s, "head.weight": torch.zeros(10, 24), "head.bias": torch.zeros(10)},
    "compiled, in DDP": lambda s: {"model": with_prefix("module._orig_mod.encoder.", s)},
}


@pytest.mark.parametrize("name", FORMATS)
def test_files_of_the_field_load_whole(name, tmp_path):
    source, target = net(), net()
    with torch.no_grad():
        for p in source.parameters():
            p.normal_()
    state, config = read_encoder(saved(tmp_path, FORMATS[name](plain(source))), heads=4)
    assert (config["width"], config["depth"]) == (24, 2)
    assert load_encoder(target, state, config) == []
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(target(x), source(x))


def test_our_file_brings_its_config_and_contradiction_is_refused(tmp_path):
    source = net(last_heads=2, act="relu")
    path = saved(tmp_path, {"model": source.state_dict(), "config": source.config})
    state, config = read_encoder(path)
    assert config == source.config
    assert load_encoder(ViT(**config), state, config) == []
    with pytest.raises(InputError, match="trained with 4 heads"):
        read_encoder(path, heads=3)


def test_heads_must_be_said_where_the_file_cannot(tmp_path):
    with pytest.raises(InputError, match="--heads"):
        read_encoder(saved(tmp_path, plain(net())))


def test_nothing_is_loaded_in_part(tmp_path):
    state = plain(net())
    config = net().config
    with pytest.raises(InputError, match="missing: blocks.1.norm1.bias"):
        load_encoder(net(), {k: v for k, v in state.items() if k != "blocks.1.norm1.bias"}, config)
    with pytest.raises(InputError, match="unknown: blocks.0.ls1.gamma"):
        load_encoder(net(), {**state, "blocks.0.ls1.gamma": torch.ones(24)}, config)
    with pytest.raises(InputError, match="another shape: .*blocks.0.mlp.fc1.weight"):
        load_encoder(net(mlp_ratio=2.0), state, config)
    with pytest.raises(InputError, match="patches of 16 pixels, the network of 8"):
        load_encoder(net(patch_size=8, image_size=16), state, config)


def test_a_fresh_fc_norm_is_named_and_a_trained_one_is_taken():
    source = net()
    assert load_encoder(net(pool="mean", classes=5), plain(source), source.config) == \
        ["fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"]
    trained = net(pool="mean", classes=5)
    assert load_encoder(net(pool="mean", classes=5), plain(trained), trained.config, fresh=()) == []


def test_positions_follow_the_picture_also_an_oblong_one():
    source, target = net(image_size=(32, 48)), net(image_size=(64, 32))
    load_encoder(target, plain(source), source.config)
    expected = resize_positions(source.pos_embed, (2, 3), (4, 2))
    assert torch.equal(target.pos_embed, expected)


@pytest.mark.parametrize("content", [{"a": torch.zeros(1)}, [1, 2], {"model": {"cls_token": torch.zeros(1, 1, 8)}}])
def test_other_files_are_refused_with_their_path(content, tmp_path):
    with pytest.raises(InputError, match="file.pth"):
        read_encoder(saved(tmp_path, content), heads=2)


def test_torn_files_are_refused_with_their_path(tmp_path):
    path = Path(saved(tmp_path, plain(net())))
    for data in (path.read_bytes()[:500], b"", b"<html>not found</html>"):
        path.write_bytes(data)
        with pytest.raises(InputError, match="file.pth: not a readable checkpoint"):
            read_encoder(str(path), heads=4)
    with pytest.raises(InputError, match="no such file"):
        read_encoder(str(tmp_path / "nothing.pth"))


@pytest.mark.parametrize("changes", [dict(image_size=40), dict(width=25), dict(positions="rotary"), dict(act="swish"), dict(pool="max"),
                                     dict(width=6, heads=3), dict(image_size=8)])
def test_sizes_that_do_not_fit_are_refused(changes):
    with pytest.raises(InputError):
        net(**changes)


def test_a_picture_of_another_size_is_refused():
    with pytest.raises(InputError, match="images are"):
        net()(torch.zeros(1, 3, 32, 48))


def test_head_and_pooling():
    x = torch.randn(2, 3, 32, 32)
    for pool in ("cls", "mean"):
        model = net(pool=pool, classes=7)
        tokens = model.encode(x)
        pooled = tokens[:, 0] if pool == "cls" else F.layer_norm(tokens[:, 1:].mean(1), (24,), eps=1e-6)
        torch.testing.assert_close(model(x), model.head(pooled))


def test_batch_norm_of_two_processes_is_torchs_of_the_whole_batch(tmp_path):
    """Outputs, gradients, running statistics and their counter; also of bfloat16 rows under autocast."""
    (tmp_path / "norm.py").write_text(f"""import sys
sys.path.insert(0, {str(ROOT)!r})
import torch
from torch import distributed as dist, nn
from vit import BatchNorm
dist.init_process_group("gloo")
rank = dist.get_rank()
for kind, close in ((torch.float64, dict()), (torch.bfloat16, dict(rtol=2e-2, atol=2e-2))):
    for affine in (True, False):
        torch.manual_seed(0)
        whole, ours = nn.BatchNorm1d(5, affine=affine).to(torch.float64), BatchNorm(5, affine=affine)
        ours = ours.double() if kind is torch.float64 else ours
        for _ in range(3):
            x, weight = 3 * torch.randn(12, 5, dtype=torch.float64) + 1, torch.randn(12, 5, dtype=torch.float64)
            all_rows, rows = x.clone().requires_grad_(), x.chunk(2)[rank].to(kind).requires_grad_()
            expected = whole(all_rows)
            with torch.autocast("cpu", torch.bfloat16, enabled=kind is torch.bfloat16):
                found = ours(rows)
            (expected * weight).sum().backward()
            (found * weight.chunk(2)[rank]).sum().backward()
            assert found.dtype == kind
            torch.testing.assert_close(found.double(), expected.chunk(2)[rank], **close)
            torch.testing.assert_close(rows.grad.double(), all_rows.grad.chunk(2)[rank], **close)
        for name, value in whole.named_buffers():
            torch.testing.assert_close(getattr(ours, name).to(value.dtype), value, **close)
        ours.eval()
        torch.testing.assert_close(ours(rows).double(), whole.eval()(x).chunk(2)[rank], **close)
dist.destroy_process_group()
""")
    done = subprocess.run([*TORCHRUN, "norm.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

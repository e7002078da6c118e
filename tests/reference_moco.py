"""MoCo v3 as the reference code was run for the golden files moco_*.json; see reference.py."""
import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, multiprocessing, nn

from moco_v3 import MoCo, features, info_nce, momentum_at, start_weights
from tests.reference import grad_norms, value_for
from vit import ViT, World, cosine


def evaluate(golden: dict) -> dict:
    """The values of golden["expected"] computed by this project. The files of formulas have no such entry: there,
    the values are returned under the names at which the file holds them."""
    if "schedules" in golden:
        return dict(schedules={name: schedule(given) for name, given in golden["schedules"].items()})
    if "tables" in golden:
        return dict(tables=[position_table(given) for given in golden["tables"]])
    if "loss_at_init" in golden:
        return initialisation(golden)
    if golden["config"].get("world_size", 1) > 1:
        return several_processes(golden["config"])[0]
    return one_process(golden["config"])


# ---- models and views by the convention of the golden files

def build_moco(config: dict) -> MoCo:
    encoder = start_weights(ViT(
        config["img_size"], config["patch_size"], width=config["embed_dim"], depth=config["depth"],
        heads=config["num_heads"], mlp_ratio=config["mlp_ratio"], qkv_bias=config.get("qkv_bias", True)))
    model = MoCo(encoder, config["mlp_dim"], config["dim"], config["T"], config["stop_grad_conv1"]).double()
    table = official_positions(config["embed_dim"], encoder.grid)
    for name, parameter in model.named_parameters():
        if name.endswith("pos_embed"):
            torch.testing.assert_close(parameter.data[0, 1:], table, rtol=0, atol=1e-6)
            parameter.data[0, 1:] = table
        else:
            parameter.data.copy_(value_for(name.replace("momentum_encoder.", "m.base_encoder."), parameter))
    return model


def official_positions(width: int, grid: tuple[int, int]) -> Tensor:
    """The table as an input of the golden files: in float32 arithmetic. Ours, in float64 and then rounded, is nearer to
    the formula by 1e-7, which BatchNorm over four rows makes 3e-8 of the loss."""
    omega = 1 / 10000 ** (torch.arange(width // 4, dtype=torch.float32) / (width // 4))
    places = torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in grid), indexing="ij")
    return torch.cat([f(place.reshape(-1, 1) * omega) for place in places for f in (torch.sin, torch.cos)], dim=1).double()


def two_views(config: dict) -> list[Tensor]:
    shape = (config["batch"], 3, config["img_size"], config["img_size"])
    return [torch.from_numpy(np.random.RandomState(seed).standard_normal(shape)) for seed in (0, 1)]


def momentum_of(config: dict) -> Tensor:
    return torch.tensor(config["momentum"], dtype=torch.float64)


def sums(named) -> dict[str, float]:
    return {name: value.double().sum().item() for name, value in named}


def slow_weights(model: MoCo) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if name.startswith("momentum_encoder.")}


# ---- one process

def one_process(config: dict) -> dict:
    model, views, momentum = build_moco(config), two_views(config), momentum_of(config)
    inside = samples(build_moco(config), views, momentum)
    loss = model(*views, momentum)["loss"]
    loss.backward()
    norms, slow = grad_norms(model), slow_weights(model)
    inside["grad_base_cls_token_0_6"] = model.base_encoder.cls_token.grad.flatten()[:6].tolist()
    inside["grad_predictor_0_row0_0_6"] = model.predictor[0].weight.grad[0, :6].tolist()
    result = dict(
        loss=loss.item(), grad_norm=norms, grad_norm_total=math.hypot(*norms.values()),
        no_grad_parameters=sorted(name for name, p in model.named_parameters() if p.grad is None and name not in slow),
        momentum_param_sum_after_forward=sums(slow.items()),
        momentum_param_norm_after_forward={name: p.norm().item() for name, p in slow.items()},
        buffer_sum_after_forward=sums(model.named_buffers()), samples=inside)
    torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3, weight_decay=0.1).step()
    result["after_adamw_step"] = dict(param_sum=sums((name, p) for name, p in model.named_parameters() if name not in slow))
    result["loss_second_iteration"] = model(*views, momentum)["loss"].item()
    result["momentum_param_sum_total_after_second_forward"] = sum(sums(slow.items()).values())
    return result


@torch.no_grad()
def samples(model: MoCo, views: list[Tensor], momentum: Tensor) -> dict:
    """Values from the inside of the forward pass, by its own pieces."""
    z1, z2 = features(model.base_encoder, *views)
    q1, q2 = (model.predictor(model.base_encoder.head(z)) for z in (z1, z2))
    model.follow(momentum)
    k1, k2 = (model.momentum_encoder.head(z) for z in features(model.momentum_encoder, *views))
    (loss1, top1), (loss2, _) = info_nce(q1, k2, model.temperature), info_nce(q2, k1, model.temperature)
    q1, k2 = F.normalize(q1, dim=1), F.normalize(k2, dim=1)
    return dict(q1_k2=loss1.item(), q2_k1=loss2.item(), top1_q1_k2=top1.item() / 100, q1_unit_row0=q1[0, :6].tolist(),
                k2_unit_row0=k2[0, :6].tolist(), cos_q1_k2_diag=(q1 * k2).sum(1).tolist(), base_feature_row0=z1[0, :6].tolist())


# ---- several processes on one CPU

def several_processes(config: dict, changes: tuple[Callable[[], None] | None, ...] = (None,)) -> list[dict]:
    """Both ways of BatchNorm: `sync_bn`, ours, and `local_bn`, each process for itself.

    changes   the values are computed after each of these, called in every process one after the other, to test mistakes
    """
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(one_of_several, (config, folder, changes), nprocs=config["world_size"])
        ranks = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(config["world_size"])]
    return [{way: together([values[number][way] for values in ranks]) for way in ("sync_bn", "local_bn")}
            for number in range(len(changes))]


def together(ranks: list[dict]) -> dict:
    losses = {f"loss_rank{rank}": values["loss"] for rank, values in enumerate(ranks)}
    buffers = {f"buffer_sum_after_forward_rank{rank}": values["buffers"] for rank, values in enumerate(ranks)}
    return dict(**losses, loss_mean=sum(losses.values()) / len(ranks), **buffers,
                grad_norm_after_ddp_average=ranks[0]["grad_norm"], momentum_param_sum_total=ranks[0]["momentum_sum"])


def one_of_several(rank: int, config: dict, folder: str, changes: tuple[Callable[[], None] | None, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=config["world_size"])
    world, results = World(rank, config["world_size"], torch.device("cpu"), "fp32"), []
    for change in changes:
        if change is not None:
            change()
        results.append({way: one_step(config, way, world) for way in ("sync_bn", "local_bn")})
    Path(folder, f"{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


def one_step(config: dict, way: str, world: World) -> dict:
    model = build_moco(config)
    for module in model.modules():
        if way == "local_bn" and isinstance(module, nn.BatchNorm1d):
            module.__class__ = nn.BatchNorm1d
    rows = [view.chunk(world.size)[world.rank] for view in two_views(config)]
    wrapped = world.wrap(model, compiled=False)  # it must live until the gradients are shared
    loss = wrapped(*rows, momentum_of(config))["loss"]
    loss.backward()
    return dict(loss=loss.item(), grad_norm=grad_norms(model), buffers=sums(model.named_buffers()),
                momentum_sum=sum(sums(slow_weights(model).items()).values()))


# ---- formulas

def schedule(given: dict) -> dict:
    """Learning rate and momentum at the epochs of the file. MAE-Lite's warmup starts at 1e-6 instead of 0, so where the
    file counts iterations only the momentum is ours to give."""
    values = []
    for point in given["at"]:
        if "iter" in point:
            values.append(dict(iter=point["iter"], m=momentum_at(point["iter"] / given["iters_per_epoch"], 0.99, 400)))
        else:
            lr = cosine(point["epoch"], given["peak_lr"], 0.0, given["warmup_epochs"], given["epochs"])
            values.append(dict(epoch=point["epoch"], lr=lr, m=momentum_at(point["epoch"], given["moco_m"], given["epochs"])))
    return dict(at=values)


def position_table(given: dict) -> dict:
    vit = start_weights(ViT(given["img_size"], given["patch_size"], width=given["embed_dim"], depth=1, heads=1))
    table = vit.pos_embed.detach().double()
    patches = table[0, 1:].unflatten(0, vit.grid)                                       # rows columns D
    result = dict(
        grid=list(vit.grid), shape=list(table.shape), cls_row_all_zero=bool((table[:, 0] == 0).all()), sum=table.sum().item(),
        sum_abs=table.abs().sum().item(), sum_sq=table.square().sum().item(), last_token_sum=table[0, -1].sum().item(),
        token_row1_first6=patches[1, 0, :6].tolist(), token_col1_first6=patches[0, 1, :6].tolist(),
        token_row1_col2_at={channel: patches[1, 2, int(channel)].item() for channel in given["token_row1_col2_at"]})
    return dict(result, full_table_rows=table[0].tolist()) if "full_table_rows" in given else result


def initialisation(golden: dict) -> dict:
    """Largest value and deviation of every kind of matrix in a model drawn from seed 0."""
    torch.manual_seed(0)
    model = MoCo(start_weights(ViT()))
    state = model.state_dict()
    kinds = {kind: torch.cat([value.flatten() for name, value in state.items() if matches(name, kind)]) for kind in golden["rule"]}
    return dict(
        observed_seed0={kind: dict(max_abs=values.abs().max().item(), std=values.std().item()) for kind, values in kinds.items()},
        cls_token_std_observed=model.base_encoder.cls_token.std().item(),
        backbone_keys=[name for name in model.base_encoder.state_dict() if not name.startswith("head.")])


def matches(name: str, kind: str) -> bool:
    parts, wanted = name.split("."), kind.split(".")
    return len(parts) == len(wanted) and all(want in ("*", part) for part, want in zip(parts, wanted, strict=True))

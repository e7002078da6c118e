"""What our G2SD gives on the input of a golden file: `evaluate(golden)` -> values under the keys of golden["expected"].

It never looks at golden["expected"] or at the mutants.
"""
import re

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import g2sd
from tests.reference import no_encoder, value_for
from vit import ViT, cosine, param_groups


def evaluate(golden: dict) -> dict:
    return generic(golden) if "layer_index" in golden["config"] else specific(golden)


# ---- the convention of the golden files

def fill(named) -> None:
    """Made-up values for every (reference name, tensor)."""
    for name, tensor in named:
        tensor.data.copy_(value_for(name, tensor))


def normal(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape))


def seed_of(text: str) -> int:
    return int(re.search(r"seed\s*=?\s*(\d+)", text).group(1))


def grad_norms(model: nn.Module, names: dict[str, str]) -> dict[str, float | None]:
    """Norms of the gradients by reference name; None where a parameter has no gradient."""
    return {names[name]: None if p.grad is None else p.grad.norm().item() for name, p in model.named_parameters()}


# ---- generic stage

def reference_name(name: str) -> str:
    """The authors' name of a parameter of MaskedViT or GenericStudent."""
    name = no_encoder(name)
    return name.replace("predictor.0.", "decoderfeature_pred.fc1.").replace("predictor.2.", "decoderfeature_pred.fc2.")


def sizes(config: dict, part: str) -> tuple[ViT, tuple[int, int, int]]:
    c = config[part]
    vit = ViT(image_size=config["img_size"], patch_size=config["patch_size"], width=c["embed_dim"], depth=c["depth"],
              heads=c["num_heads"], mlp_ratio=config["mlp_ratio"])
    return vit, (c["decoder_embed_dim"], c["decoder_depth"], c["decoder_num_heads"])


def generic_models(golden: dict) -> tuple[g2sd.MaskedViT, g2sd.GenericStudent]:
    config = golden["config"]
    teacher = g2sd.MaskedViT(*sizes(config, "teacher"), mask_ratio=config["mask_ratio"]).double()
    student = g2sd.GenericStudent(*sizes(config, "student"), config["teacher"]["decoder_embed_dim"],
                                  mask_ratio=config["mask_ratio"]).double()
    for model, prefix in ((teacher, "teacher."), (student, "")):
        fill((prefix + reference_name(name), p) for name, p in model.named_parameters() if "pos_embed" not in name)
    return teacher.eval().requires_grad_(False), student


def generic_input(golden: dict) -> tuple[Tensor, Tensor]:
    config = golden["config"]
    batch, side = config["batch"], config["img_size"]
    noise = np.random.RandomState(config["noise_seed"]).uniform(size=(batch, (side // config["patch_size"]) ** 2))
    return normal((batch, 3, side, side), config["image_seed"]), torch.from_numpy(noise)


def generic(golden: dict) -> dict:
    config = golden["config"]
    teacher, student = generic_models(golden)
    images, noise = generic_input(golden)
    target = g2sd.generic_target(teacher, images, noise, config["layer_index"])
    names = {name: reference_name(name) for name, _ in student.named_parameters()}
    losses, grads = {}, {}
    for tokens in ("all", "masked", "visible"):
        student.tokens = tokens
        student.zero_grad()
        loss = student(images, noise, target)["loss"]
        loss.backward()
        losses[tokens], grads[tokens] = loss.item(), grad_norms(student, names)
        for name in golden["state_dict_shapes"]["student"]:  # modules that we leave out: unused, or weighted by 0
            grads[tokens].setdefault(name, 0.0 if name.startswith("encoderfeature_pred.") else None)
    with torch.no_grad():
        keep, order = g2sd.random_masking(noise, student.kept)
        z, _ = student.encode(images, noise)
        prediction = student.predictor(student.decode(z, order))
    n, total = student.kept, noise.shape[1]
    tables = {f"{who}.{reference_name(name)}": [p.sum().item(), p.abs().sum().item()]
              for who, model in (("teacher", teacher), ("student", student))
              for name, p in model.named_parameters() if "pos_embed" in name}
    chosen = "all" if config["supervise_all"] else "masked"
    return {
        "loss": losses[chosen],
        "loss_masked_only_option": losses["masked"],
        "loss_per_token_mean": {
            "cls": losses["all"] * (1 + total) - losses["masked"] * (total - n) - losses["visible"] * n,
            "visible_patches": losses["visible"],
            "masked_patches": losses["masked"],
        },
        "grad_norm": grads[chosen],
        "grad_norm_masked_only_option": grads["masked"],
        "samples": {
            "ids_keep": keep.tolist(),
            "mask": (order >= n).int().tolist(),
            "target[0,0,:6]": target[0, 0, :6].tolist(),
            "target[1,-1,:6]": target[1, -1, :6].tolist(),
            "target_sum": target.sum().item(),
            "target_abs_sum": target.abs().sum().item(),
            "pred[0,0,:6]": prediction[0, 0, :6].tolist(),
            "pred[1,-1,:6]": prediction[1, -1, :6].tolist(),
            "pred_sum": prediction.sum().item(),
            "pred_abs_sum": prediction.abs().sum().item(),
            "pred_shape": list(prediction.shape),
            "pos_embed_sums": tables,
        },
    }


# ---- specific stage

def vit_options(c: dict) -> dict:
    return dict(image_size=c["img_size"], patch_size=c["patch_size"], width=c["embed_dim"], depth=c["depth"],
                heads=c["num_heads"], mlp_ratio=c["mlp_ratio"], qkv_bias=c["qkv_bias"], classes=c["num_classes"])


def specific_student(golden: dict, kind: str) -> g2sd.SpecificStudent:
    options = dict(vit_options(golden["config"]["student"]), drop_path=golden["config"]["drop_path"])
    student = g2sd.SpecificStudent(options, kind == "hard").double()
    student.pos_embed.requires_grad_(True)
    fill(student.named_parameters())
    return student


def specific_teacher(golden: dict) -> ViT:
    teacher = ViT(**vit_options(golden["config"]["teacher"]), pool="mean").double()
    fill(("teacher." + name, p) for name, p in teacher.named_parameters())
    return teacher.eval().requires_grad_(False)


def specific_input(golden: dict) -> dict[str, Tensor]:
    config, given = golden["config"], golden["input"]
    shape = (config["batch"], config["classes"])
    scale, seed = re.search(r"([\d.]+) \* RandomState\((\d+)\)", given["cls_logits"]).groups()
    labels = torch.tensor(given["labels"])
    lam, smoothing = (float(re.search(f"{word} ([0-9.]+)", given["soft_targets"]).group(1)) for word in ("lam", "smoothing"))
    hot = F.one_hot(labels, config["classes"]).double()
    side = config["student"]["img_size"]
    return dict(by_class=float(scale) * normal(shape, int(seed)),
                by_token=float(scale) * normal(shape, seed_of(given["dist_logits"])),
                teacher=float(scale) * normal(shape, seed_of(given["teacher_logits"])),
                labels=labels, mixed=lam * hot + (1 - lam) * hot.flip(0), smoothing=smoothing,
                images=normal((config["batch"], 3, side, side), seed_of(given["images"])))


def parts_of(losses: dict[str, Tensor]) -> dict[str, float]:
    """The authors' two terms; for NKD both are the same value."""
    return dict(loss=losses["loss"].item(), loss_gt=losses.get("truth", losses["loss"]).item(),
                loss_dis=losses.get("verdict", losses["loss"]).item())


def specific(golden: dict) -> dict:
    x = specific_input(golden)
    nkd = dict(temperature=golden["config"]["nkd"]["temp"], alpha=golden["config"]["nkd"]["alpha"])
    cases = {  # name: kind, labels, smoothing
        "hard_token_mixup": ("hard", x["mixed"], x["smoothing"]),
        "hard_token_label_smoothing_0.1": ("hard", x["labels"], 0.1),
        "hard_token_plain_ce": ("hard", x["labels"], 0.0),
        "nkd_mixup": ("nkd", x["mixed"], x["smoothing"]),
        "nkd_integer_labels": ("nkd", x["labels"], 0.0),
    }

    def loss_of(kind, by_class, by_token, labels, teacher, smoothing):
        if kind == "nkd" and nkd != dict(temperature=1.0, alpha=1.0):  # the script's NKD has these constants
            return dict(loss=g2sd.nkd_loss(by_class, teacher, labels, **nkd))
        return g2sd.specific_loss(by_class, by_token, labels, teacher, smoothing)

    logit_cases = {}
    for name, (kind, labels, smoothing) in cases.items():
        by_class, by_token = (x[which].clone().requires_grad_() for which in ("by_class", "by_token"))
        losses = loss_of(kind, by_class, by_token if kind == "hard" else None, labels, x["teacher"], smoothing)
        losses["loss"].backward()
        unmoved = torch.zeros_like(by_token)  # NKD does not look at the token's logits
        logit_cases[name] = dict(parts_of(losses), grad_cls_logits=by_class.grad.tolist(),
                                 grad_dist_logits=(unmoved if by_token.grad is None else by_token.grad).tolist())

    teacher = specific_teacher(golden)
    with torch.no_grad():
        answers = teacher(x["images"])
        both = specific_student(golden, "hard").train()(x["images"])
    end_to_end = {}
    for name, kind in (("hard_token_mixup", "hard"), ("nkd_mixup", "nkd")):
        student = specific_student(golden, kind)
        by_class, by_token = student.train()(x["images"])
        losses = loss_of(kind, by_class, by_token, x["mixed"], answers, x["smoothing"])
        losses["loss"].backward()
        norms = grad_norms(student, {n: n for n, _ in student.named_parameters()})
        if kind == "nkd":  # our student has no second head then; the authors' gets no gradient
            norms.update({"head_dist.weight": 0.0, "head_dist.bias": 0.0})
        with torch.no_grad():
            in_use = student.eval()(x["images"])
        end_to_end[name] = dict(parts_of(losses), grad_norm=norms, samples={
            "cls_logits[0,:5]": by_class[0, :5].tolist(), "dist_logits[0,:5]": both[1][0, :5].tolist(),
            "eval_logits[0,:5]": in_use[0, :5].tolist(), "teacher_logits[0,:5]": answers[0, :5].tolist(),
            "teacher_argmax": answers.argmax(1).tolist()})

    student = specific_student(golden, "hard")
    names = {id(p): name for name, p in student.named_parameters()}
    groups = param_groups(student, 0.05, ("cls_token", "pos_embed"), 0.75)
    return {
        "logit_cases": logit_cases,
        "end_to_end": end_to_end,
        "layer_decay_0.75_and_weight_decay_0.05": {
            names[id(p)]: [group["lr_scale"], group["weight_decay"]] for group in groups for p in group["params"]},
        "lr_schedule": {stage: schedule(g2sd.RECIPES[recipe]) for stage, recipe in
                        (("generic", "imagenet"), ("specific", "imagenet-specific"))},
    }


def schedule(recipe: dict) -> dict:
    """The learning rates of a recipe of ours."""
    lr, low = recipe["blr"] * recipe["batch_size"] / 256, recipe["min_lr"]
    warmup, epochs = recipe["warmup_epochs"], recipe["epochs"]
    at = (0, 2.5, warmup, (warmup + epochs) / 2, epochs - 0.5, epochs)
    return dict(lr=lr, min_lr=low, warmup_epochs=warmup, epochs=epochs,
                at_epoch={f"{epoch:g}": cosine(epoch, lr, low, warmup, epochs) for epoch in at})

"""TinyMIM's classes, run as the reference code was run for the golden files; see reference.py."""
import json
import re
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.reference import fill, grad_norms, images, mask_noise, no_encoder, vit_arguments
from tinymim import RELATIONS, TinyMIM, TinyMIMStudy, divergence, targets_of
from vit import ViT, param_groups, relation

TINY = Path(__file__).parent / "golden/tinymim_tiny.json"


def evaluate(golden: dict) -> dict:
    return targets(golden) if "targets" in golden["method"] else tiny(golden)


# ---- the released recipe

def build_vit(config: dict, last_heads: int | None = None) -> ViT:
    """A network of the reference, filled. `last_heads` as another network reads it, else the config's own."""
    vit = ViT(**vit_arguments(config), last_heads=last_heads or config.get("last_heads")).double()
    fill(vit)
    return vit


def views(golden: dict) -> tuple[Tensor, Tensor]:
    """The teacher's picture and the student's, from what golden["input"] says of them."""
    batch, channels, size, seed = map(int, re.findall(r"\d+", golden["input"]["teacher_view"]))
    teacher = images(dict(batch=batch, channels=channels, size=size, seed=seed))
    keep, add, seed = re.findall(r"([\d.]+) \* teacher_view \+ ([\d.]+) \* images\(same shape, seed=(\d+)\)",
                                 golden["input"]["student_view"])[0]
    other = images(dict(batch=batch, channels=channels, size=size, seed=int(seed)))
    return teacher, float(keep) * teacher + float(add) * other


def tiny(golden: dict) -> dict:
    config, (teacher_view, view) = golden["config"], views(golden)
    teacher, model = build_vit(config["teacher"]), TinyMIM(build_vit(config["student"]))
    with torch.no_grad():
        theirs = model.observe(teacher, teacher_view, config["teacher"]["intermediate"])
    losses = model(view, theirs)
    losses["loss"].backward()
    norms = grad_norms(model, no_encoder)
    encoder = model.encoder
    with torch.no_grad():
        ours = model.observe(encoder, view, encoder.depth)
        x = encoder.through(encoder.embed(view), last=encoder.depth - 1)
    (teacher_qk, teacher_vv), (student_qk, student_vv) = (
        [scores[name].softmax(-1) for name in ("qk", "vv")] for scores in (theirs, ours))
    samples = {
        "teacher_qk[0,0,0,:5]": teacher_qk[0, 0, 0, :5].tolist(),
        "teacher_vv[0,1,2,:5]": teacher_vv[0, 1, 2, :5].tolist(),
        "student_qk[0,0,0,:5]": student_qk[0, 0, 0, :5].tolist(),
        "student_vv[0,1,2,:5]": student_vv[0, 1, 2, :5].tolist(),
        "relation_shape": list(teacher_qk.shape),
        "student_tokens_into_last_block[0,0,:5]": x[0, 0, :5].tolist(),
        "student_tokens_into_last_block.norm": x.norm().item(),
        "teacher_qk.square.sum": teacher_qk.square().sum().item(),
        "student_vv.square.sum": student_vv.square().sum().item(),
        "student_pos_embed[0,3,:5]": encoder.pos_embed[0, 3, :5].tolist()}
    # The reference's one step: learning rate 1e-3, betas (0.9, 0.95), weight decay 0.05 on all but vectors.
    torch.optim.AdamW(param_groups(model, 0.05), 1e-3, betas=(0.9, 0.95)).step()
    with torch.no_grad():
        after = model(view, theirs)
    fixed = [name for name, p in encoder.named_parameters() if not p.requires_grad and name != "pos_embed"]
    return dict(**named(losses), grad_norm=norms, grad_norm_total=float(np.linalg.norm(list(norms.values()))),
                parameters_without_gradient=fixed, after_one_adamw_step=named(after), samples=samples)


def named(losses: dict[str, Tensor]) -> dict[str, float]:
    return dict(qk_loss=losses["qk"].item(), vv_loss=losses["vv"].item(), loss=losses["loss"].item())


def sequential(golden: dict, narrow_student: dict, last_heads: int) -> dict:
    """The student of the file as the teacher of a narrower one, its last block read with `last_heads` heads."""
    config, (teacher_view, view) = golden["config"], views(golden)
    teacher, model = build_vit(config["student"], last_heads), TinyMIM(build_vit({"in_chans": 3, **narrow_student}))
    with torch.no_grad():
        return named(model(view, model.observe(teacher, teacher_view, teacher.depth)))


# ---- the paper's other targets

def tensor(name: str, *shape: int) -> Tensor:
    return torch.from_numpy(np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape))


def study(golden: dict, *names: str, softmax: bool = True, **adapters: str) -> TinyMIMStudy:
    """A model for these targets; adapters: for each feature the name by which its linear map is filled."""
    teacher, student = golden["config"]["D_teacher"], golden["config"]["D_student"]
    encoder = ViT(image_size=1, patch_size=1, width=student, depth=1, heads=1, positions="learned")
    model = TinyMIMStudy(encoder, teacher, list(names), softmax).double()
    for name, prefix in adapters.items():
        model.adapters[name].weight.data = 0.05 * tensor(f"{prefix}.weight", teacher, student)
        model.adapters[name].bias.data = 0.1 * tensor(f"{prefix}.bias", teacher)
    return model


def gradient(loss: Tensor, *inputs: Tensor) -> list[float]:
    return [g.norm().item() for g in torch.autograd.grad(loss, inputs)]


def targets(golden: dict) -> dict:
    c = golden["config"]
    batch, tokens, heads = c["B"], c["N (tokens, class token first)"], c["heads"]
    wide, narrow = c["D_teacher"], c["D_student"]
    theirs = 1.7 * tensor("feature_t", batch, tokens, wide) + 0.3
    ours = tensor("feature_s", batch, tokens, narrow).requires_grad_()

    model = study(golden, "block", "class", **{"block": "adapter", "class": "adapter"})
    klass, feature = model.compare("class", ours[:, 0], theirs[:, 0]), model.compare("block", ours, theirs)
    samples = {"prediction[0,0,:4]": model.adapters["block"](ours)[0, 0, :4].tolist(),
               "target[0,0,:4]": F.layer_norm(theirs, (wide,))[0, 0, :4].tolist()}

    model = study(golden, *"qkv", q="adapter_q", k="adapter_k", v="adapter_v")
    each = {name: model.compare(name, ours, tensor(f"{name}_t_feature", batch, tokens, wide)) for name in "qkv"}

    t = {name: tensor(f"{name}_t", batch, heads, tokens, wide // heads) for name in "qkv"}
    s = {name: tensor(f"{name}_s", batch, heads, tokens, narrow // heads).requires_grad_() for name in "qkv"}
    soft, raw, relations = study(golden, *RELATIONS), study(golden, *RELATIONS, softmax=False), {}
    for name in RELATIONS:
        scores = relation(s[name[0]], s[name[1]]), relation(t[name[0]], t[name[1]])
        kl, letters = soft.compare(name, *scores), sorted(set(name))
        norms = gradient(kl, *(s[letter] for letter in letters))
        relations[name] = dict(kl_softmax=kl.item(), no_softmax_smooth_l1_beta2=raw.compare(name, *scores).item(),
                               grad_norm=dict(zip(letters, norms, strict=True)))
    kl = {name: values["kl_softmax"] for name, values in relations.items()}
    large = [relation(40 * x["v"], 40 * x["v"]).detach() for x in (s, t)]
    points = ("0", "0.5", "-1", "1.999", "2", "2.001", "-3", "10")
    return dict(
        class_token=dict(kl_softmax_channels=klass.item(), grad_norm_feature_s=gradient(klass, ours)[0]),
        feature={"smooth_l1_beta2_whitened_eps1e-5": feature.item(),
                 "grad_norm_feature_s": gradient(feature, ours)[0], "samples": samples},
        smooth_l1_points={point: smooth_l1_at(raw, float(point)) for point in points},
        qkv_features=dict(each={name: loss.item() for name, loss in each.items()}, sum=sum(each.values()).item(),
                          grad_norm_feature_s_of_sum=gradient(sum(each.values()), ours)[0]),
        relations=relations,
        relations_combined={"qk+vv (default, Eq. 9)": kl["qk"] + kl["vv"],
                            "qq+kk+vv (Table 7)": kl["qq"] + kl["kk"] + kl["vv"]},
        large_logits=dict(kl_log_softmax_float64=divergence(*large).item(),
                          kl_log_softmax_float32=divergence(*(x.float() for x in large)).item(),
                          largest_logit=max(x.abs().max().item() for x in large)),
        masked_input=masked_input(), teacher_targets_block3=teacher_targets())


def smooth_l1_at(model: TinyMIMStudy, point: float) -> float:
    """The error of one score that is off by `point`."""
    return model.compare("qk", torch.tensor(point, dtype=torch.float64), torch.zeros((), dtype=torch.float64)).item()


def masked_input() -> dict:
    """The networks of tinymim_tiny.json on the quarter of the patches with the lowest noise."""
    golden = json.loads(TINY.read_text())
    config, (teacher_view, view) = golden["config"], views(golden)
    teacher, encoder = build_vit(config["teacher"]), build_vit(config["student"])
    model = TinyMIMStudy(encoder, teacher.width, ["qk", "vv"], mask_ratio=0.75)
    noise = mask_noise(dict(batch=len(view), patches=encoder.grid[0] * encoder.grid[1], seed=1))
    with torch.no_grad():
        theirs = model.observe(teacher, teacher_view, config["teacher"]["intermediate"], noise)
        losses = model(view, theirs, noise)
    return dict(ids_keep=model.seen(noise).tolist(), qk_loss=losses["qk"].item(), vv_loss=losses["vv"].item(),
                relation_shape=list(theirs["qk"].shape))


@torch.no_grad()
def teacher_targets() -> dict:
    """Every target of the teacher of tinymim_tiny.json, under its name in the golden file."""
    golden = json.loads(TINY.read_text())
    config, (view, _) = golden["config"]["teacher"], views(golden)
    teacher, number, found = build_vit(config), config["intermediate"], {}
    places = {
        "attention_before_residual (H)": ("attention", number),
        "attention_after_residual (H hat)": ("attention-residual", number),
        "ffn_before_residual (H tilde)": ("ffn", number),
        "ffn_after_residual = block feature (F)": ("block", number),
        "output_feature (last block, before final norm)": ("block", teacher.depth),
        "output_feature after final norm": ("output", number),
        "q": ("q", number), "k": ("k", number), "v": ("v", number),
    }
    for key, (name, block) in places.items():
        value = targets_of(teacher, view, block, [name], keep=None)[name]
        found[key] = {"shape": list(value.shape), "[0,0,:4]": value[0, 0, :4].tolist(), "norm": value.norm().item(),
                      "whitened.abs.sum": F.layer_norm(value, value.shape[-1:]).abs().sum().item()}
    return found

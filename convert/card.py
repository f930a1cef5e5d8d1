"""The model card beside exported weights: licence, base model, recipe, step schedule."""

from __future__ import annotations

from typing import Any

from crcm_jax.convert.models import Model
from crcm_jax.convert.sources import Source
from crcm_jax.models import registry
from crcm_jax.recipes import RECIPES

_HOW_TO_LOAD = {
    "wan-transformer": "diffusers.WanTransformer3DModel",
    "wan2.1-vae": "diffusers.AutoencoderKLWan",
    "wan2.2-vae": "diffusers.AutoencoderKLWan",
    "umt5": "transformers.UMT5EncoderModel",
    "clip-vision": "transformers.CLIPVisionModel",
}


def text(model: Model, layout: str, source: Source, name: str) -> str:
    """The card in Markdown, with the header that model hubs read. What the source did not record is said to be so."""
    part = registry.PARTS.get(model.name)
    base, licence = (None, "unknown") if part is None else (part.origin, part.licence)
    config = source.meta.get("config") or {}
    training = source.meta.get("training")
    head = ["---", f"license: {licence}"]
    head += [f"base_model: {base}"] if base else []
    if model.family.name == "wan-transformer":
        takes = "image" if model.config.in_channels > model.config.out_channels else "text"
        head += ["tags:", f"- {takes}-to-video"]
    licence = "not recorded: ask where the weights came from" if licence == "unknown" else licence
    lines = [
        *head, "---", "", f"# {name}", "",
        f"- Model: {model.name}, {_millions(model)} million parameters.",
        f"- Base model: {base or 'not a published size'}.",
        f"- Licence of the base model: {licence}. Keep its notices when you pass these weights on.",
        f"- Layout: {_layout(model, layout, name)}",
        f"- Recipe: {_recipe(training, source.meta, config)}",
        f"- Step schedule: {_schedule(training, config)}",
        f"- Written by causal-rcm-jax (`crcm convert`) from a {source.kind}.",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _millions(model: Model) -> str:
    total = 0
    for shape in model.leaves.values():
        elements = 1
        for n in shape:
            elements *= n
        total += elements
    return f"{total / 1e6:.1f}"


def _layout(model: Model, layout: str, name: str) -> str:
    if layout == "diffusers":
        return f"`{_HOW_TO_LOAD[model.family.name]}.from_pretrained({name!r})` loads it."
    names = {"native": "Wan's own tensor names.", "rcm": "the tensor names of rCM and Causal-rCM, prefixed `net.`."}
    return names.get(layout, "causal-rcm-jax's own.")


def _recipe(training: str | None, meta: dict[str, Any], config: dict[str, Any]) -> str:
    if not training:
        return "not recorded in the source; the weights are as they were there."
    chunks = config.get("chunks") or {}
    pattern = f", chunks c{chunks['first']}-{chunks['size']}" if "first" in chunks and "size" in chunks else ""
    steps = f", {meta['iteration']} iterations" if "iteration" in meta else ""
    return f"training type `{training}`{pattern}{steps}."


def _schedule(training: str | None, config: dict[str, Any]) -> str:
    rollout = config.get("rollout")
    if training in RECIPES and not RECIPES[training].distills:
        return "none: a diffusion model, sampled with many steps and guidance."
    if not training or not rollout:
        return "not recorded in the source."
    steps = ", ".join(str(n) for n in rollout["steps"])
    times = "; ".join(", ".join(f"{t:.6g}" for t in row) for row in rollout["times"])
    context = f", noisy context from chunk {rollout['context_start']}" if rollout.get("noisy_context") else ""
    counts = f"{steps} steps for each chunk in turn (the last for all later ones)"
    return f"{counts}, stopping between 1 and 0 at {times}{context}."

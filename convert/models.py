"""The models that can be converted: their layouts, how to tell their sizes from shapes, and what others call them."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from crcm_jax.convert.arrays import TRANSFORMS, Spec, shape_after
from crcm_jax.convert.tables import clip_vision, umt5, wan_transformer, wan_vae
from crcm_jax.errors import UsageError, UserError
from crcm_jax.models import registry
from crcm_jax.models.text.umt5 import UMT5Config
from crcm_jax.models.vae.config import PUBLISHED, WanVAEConfig
from crcm_jax.models.vision.clip import CLIPVisionConfig
from crcm_jax.models.wan.config import WanConfig

Entry = tuple[str, str, str]
Shapes = Mapping[str, tuple[int, ...]]
"""Our leaves' shapes, without the layer axis; `LAYERS` beside them."""

LAYERS = "layers"
STACKED = "stacked"


@dataclasses.dataclass(frozen=True)
class Model:
    """A model of known sizes. `name` is one of `KNOWN`, or the family's where its sizes are not published ones."""

    family: Family
    name: str
    config: Any

    @property
    def leaves(self) -> dict[str, tuple[int, ...]]:
        """Shapes of our leaves, by names like `blocks/ffn/up/kernel`."""
        return _leaves(self.family.network, self.config)

    @property
    def layers(self) -> int:
        return getattr(self.config, "layers", 0)


@functools.lru_cache(maxsize=32)
def _leaves(network: Callable[[Any], Any], config: Any) -> dict[str, tuple[int, ...]]:
    import jax

    from crcm_jax.saving import storage

    shapes = jax.eval_shape(network(config).init, jax.random.key(0))
    return {name: tuple(leaf.shape) for name, leaf in storage.leaves(shapes)}


@dataclasses.dataclass(frozen=True)
class Family:
    """Models that differ in size.

    layouts: name of a layout → the table of a configuration. infer: shapes and config.json → configuration fields.
    network: configuration → the object whose `init` gives our leaves. sizes: the fields that shapes decide.
    aliases: second names of tensors, `{i}` for the layer. unused: a regular expression, the names of tensors that come
    with such models and have no place in them.
    """

    name: str
    config: type
    layouts: dict[str, Callable[[Any], tuple[Entry, ...]]]
    infer: Callable[[Shapes, dict[str, Any]], dict[str, Any]]
    network: Callable[[Any], Any]
    sizes: tuple[str, ...]
    fixed: dict[str, Any] = dataclasses.field(default_factory=dict)
    aliases: dict[str, str] = dataclasses.field(default_factory=dict)
    unused: str = ""

    def passes_over(self, name: str) -> bool:
        """Whether a foreign tensor is knowingly left out: no network of the family reads it."""
        return bool(re.fullmatch(self.unused, name))

    def published(self, fields: Mapping[str, Any]) -> Any:
        """The configuration of a published model, of whose fields the registry knows those that differ."""
        fields = dict(fields)
        version = fields.pop("version", None)
        return self.config(**fields) if version is None else PUBLISHED[version](**fields)

    @property
    def all_layouts(self) -> tuple[str, ...]:
        return (*self.layouts, "ours")

    def table(self, layout: str, config: Any = None) -> tuple[Entry, ...]:
        """(pattern, our leaf, transform) of a layout; without a configuration, of all that such a model may have.

        Of our own layout too, where the transform of leaves with a layer axis is `STACKED`. UsageError for a layout
        that the family has not.
        """
        if layout not in self.all_layouts:
            raise UsageError(f"--layout={layout} is not for {self.name}: use one of {', '.join(self.all_layouts)}")
        entries = self.layouts["native" if layout == "ours" else layout](config)
        entries = [(theirs, ours.replace(".", "/"), transform) for theirs, ours, transform in entries]
        if layout == "ours":
            return tuple((leaf, leaf, STACKED if "{i}" in theirs else "same") for theirs, leaf, _ in entries)
        return tuple(entries)


def in_parts(pattern: str) -> tuple[str, int, int]:
    """(name, part, parts) of a table's pattern: `name[1/3]` is the second of three equal parts of the first axis."""
    found = re.fullmatch(r"(.*)\[(\d+)/(\d+)\]", pattern)
    return (found[1], int(found[2]), int(found[3])) if found else (pattern, 0, 1)


def _need(shapes: Shapes, leaf: str) -> tuple[int, ...]:
    if leaf not in shapes:
        raise UserError(f"the weights lack what fills {leaf}, which tells the model's size: name it with --model")
    return shapes[leaf]


# The transformer


def _transformer(shapes: Shapes, said: dict[str, Any]) -> dict[str, Any]:
    patch, head = _need(shapes, "outside/patch_embedding/kernel"), _need(shapes, "outside/head/kernel")
    image = shapes.get("outside/image_embedding/norm_in/scale")
    sizes: dict[str, Any] = {
        "dim": patch[1],
        "in_channels": patch[0] // 4,
        "out_channels": head[1] // 4,
        "ffn_dim": _need(shapes, "blocks/ffn/up/kernel")[1],
        "freq_dim": _need(shapes, "outside/time_embedding/up/kernel")[0],
        "text_dim": _need(shapes, "outside/text_embedding/up/kernel")[0],
        "image_dim": image and image[0],
        "layers": shapes[LAYERS][0],
    }
    heads = next((said[key] for key in ("heads", "num_attention_heads", "num_heads") if said.get(key)), None)
    if heads is None and sizes["dim"] % 128 == 0:
        heads = sizes["dim"] // 128  # every published Wan
    if heads is None:
        raise UsageError(f"nothing tells how many heads share the width {sizes['dim']}: give --heads")
    return sizes | {"heads": heads}


def _image(config: Any) -> bool:
    return config is None or config.image_dim is not None


def _transformer_network(config: Any) -> Any:
    from crcm_jax.models.wan.transformer import WanTransformer

    return WanTransformer(config)


TRANSFORMER = Family(
    "wan-transformer", WanConfig,
    {"native": lambda c: wan_transformer.native(_image(c)), "diffusers": lambda c: wan_transformer.diffusers(_image(c)),
     "rcm": lambda c: wan_transformer.rcm(_image(c))},
    _transformer, _transformer_network,
    ("dim", "ffn_dim", "heads", "layers", "in_channels", "out_channels", "freq_dim", "text_dim", "image_dim"),
    unused=wan_transformer.DIFFUSERS_UNUSED,
)  # fmt: skip


# The autoencoders


def _vae(published: WanVAEConfig) -> Callable[[Shapes, dict[str, Any]], dict[str, Any]]:
    def infer(shapes: Shapes, said: dict[str, Any]) -> dict[str, Any]:
        channels = _need(shapes, "decoder/post_quant_conv/bias")[0]
        mean = tuple(said.get("latents_mean") or said.get("mean") or published.mean)
        std = tuple(said.get("latents_std") or said.get("std") or published.std)
        if len(mean) != channels or len(std) != channels:
            mean, std = (0.0,) * channels, (1.0,) * channels
        sizes = {"encoder_dim": "encoder/conv_in/bias", "decoder_dim": "decoder/norm_out/scale"}
        found = {name: _need(shapes, leaf)[0] for name, leaf in sizes.items()}
        return {"channels": channels, "mean": mean, "std": std} | found

    return infer


def _vae_network(config: Any) -> Any:
    from crcm_jax.models.vae.wan import WanVAE

    return WanVAE(config)


def _vae_family(name: str, published: WanVAEConfig) -> Family:
    return Family(
        name, WanVAEConfig,
        # The names depend on the depth alone, which is the published one.
        {"native": lambda c: tuple(wan_vae.native(c or published)),
         "diffusers": lambda c: tuple(wan_vae.diffusers(c or published))},
        _vae(published), _vae_network, ("channels", "encoder_dim", "decoder_dim"),
        {"patch": published.patch, "residual": published.residual},
    )  # fmt: skip


VAE_21, VAE_22 = (_vae_family(f"wan{version}-vae", make()) for version, make in PUBLISHED.items())


# The text encoder


def _umt5(shapes: Shapes, said: dict[str, Any]) -> dict[str, Any]:
    vocabulary, dim = _need(shapes, "embedding")
    buckets, heads = _need(shapes, "layers/attention/position")
    return {
        "vocabulary": vocabulary,
        "dim": dim,
        "heads": heads,
        "head_dim": _need(shapes, "layers/attention/q/kernel")[1] // heads,
        "ffn_dim": _need(shapes, "layers/ffn/up/kernel")[1],
        "layers": shapes[LAYERS][0],
        "buckets": buckets,
        "max_distance": said.get("relative_attention_max_distance") or said.get("max_distance") or 128,
    }


def _umt5_network(config: Any) -> Any:
    from crcm_jax.models.text.umt5 import UMT5Encoder

    return UMT5Encoder(config)


UMT5 = Family(
    "umt5", UMT5Config,
    {"native": lambda c: umt5.NATIVE, "diffusers": lambda c: umt5.TRANSFORMERS},
    _umt5, _umt5_network,
    ("vocabulary", "dim", "heads", "head_dim", "ffn_dim", "layers", "buckets", "max_distance"),
    aliases=umt5.TRANSFORMERS_ALIASES,
)  # fmt: skip

# The image encoder


def _clip(shapes: Shapes, said: dict[str, Any]) -> dict[str, Any]:
    patch, _, _, dim = _need(shapes, "patch_embedding")
    projection = shapes.get("projection")
    heads = next((said[key] for key in ("heads", "num_attention_heads") if said.get(key)), None)
    if heads is None and dim != 1280:
        raise UsageError(f"nothing tells how many heads share the width {dim}: give --heads")
    return {
        "dim": dim,
        "ffn_dim": _need(shapes, "layers/mlp/up/kernel")[1],
        "heads": heads or 16,  # of ViT-H
        "layers": shapes[LAYERS][0],
        "image": patch * math.isqrt(_need(shapes, "position")[0] - 1),
        "patch": patch,
        "projection": projection and projection[1],
    }


def _clip_network(config: Any) -> Any:
    from crcm_jax.models.vision.clip import CLIPVision

    return CLIPVision(config)


def _projects(config: Any) -> bool:
    return config is None or config.projection is not None


CLIP = Family(
    "clip-vision", CLIPVisionConfig,
    {"native": lambda c: clip_vision.native(_projects(c)),
     "diffusers": lambda c: clip_vision.transformers(_projects(c))},
    _clip, _clip_network, ("dim", "ffn_dim", "heads", "layers", "image", "patch", "projection"),
    aliases=clip_vision.TRANSFORMERS_ALIASES, unused=clip_vision.UNUSED,
)  # fmt: skip

FAMILIES = (TRANSFORMER, VAE_21, VAE_22, UMT5, CLIP)

KNOWN = {name: (family, family.published(part.fields)) for name, part in registry.PARTS.items() for family in FAMILIES
         if family.name == part.kind}  # fmt: skip
"""Published models by the names that `--model` takes."""


def known(name: str) -> Model:
    """UsageError for a name that is not in `KNOWN`."""
    if name not in KNOWN:
        raise UsageError(f"--model={name} is not one of {', '.join(KNOWN)}")
    return Model(KNOWN[name][0], name, KNOWN[name][1])


def identify(specs: Mapping[str, Spec], said: dict[str, Any], model: str | None = None) -> tuple[Model, str]:
    """(model, layout) of foreign or own tensors, by their names and shapes.

    said: what a config.json or our own metadata tells; it decides only what shapes leave open, such as heads.
    A published model that differs in nothing but its number of layers is taken for that one: the rest is missing.
    UserError if the names are of no layout here, or a size cannot be told.
    """
    by_pattern: dict[str, list[str]] = {}
    for name in specs:
        by_pattern.setdefault(_NUMBER.sub(r"\1{i}", name), []).append(name)
    candidates = [
        (*_shapes(family, layout, by_pattern, specs), family, layout)
        for family in (FAMILIES if model is None else (known(model).family,))
        for layout in family.all_layouts
    ]
    shapes, layers, family, layout = max(candidates, key=lambda candidate: len(candidate[0]))
    strange = [pattern for pattern, names in by_pattern.items() if not all(map(family.passes_over, names))]
    if 2 * len(shapes) < len(strange) or not shapes:
        some = ", ".join(list(specs)[:3]) or "none at all"
        here = ", ".join(f.name for f in FAMILIES) if model is None else model
        raise UserError(f"the tensors' names ({some} …) are of no layout known here for {here}")
    if model is not None:
        return known(model), layout
    try:
        sizes = family.infer({**shapes, LAYERS: (layers,)}, said)
        for name, (of, config) in KNOWN.items():
            if of is family and all(getattr(config, field) == sizes[field] for field in sizes if field != LAYERS):
                return Model(family, name, config), layout
        return Model(family, family.name, family.config(**sizes, **family.fixed)), layout
    except UserError:
        raise
    except (ValueError, TypeError, IndexError, ZeroDivisionError) as error:
        raise UserError(
            f"the weights are of no possible {family.name} ({error}): name the model with --model"
        ) from error


_NUMBER = re.compile(r"\b((?:blocks?|layers|transformer)\.)\d+")


def _shapes(
    family: Family, layout: str, by_pattern: Mapping[str, list[str]], specs: Mapping[str, Spec]
) -> tuple[dict[str, tuple[int, ...]], int]:
    """Shapes of our leaves, without their layer axis, as far as a layout's names and ranks are found; layers seen."""
    alias = {name: other for other, name in family.aliases.items()}
    found, layers = {}, 0
    for pattern, leaf, transform in family.table(layout):
        pattern, _, parts = in_parts(pattern)
        pattern = pattern if pattern in by_pattern else alias.get(pattern, pattern)
        names = by_pattern.get(pattern, [])
        shape = specs[names[0]].shape if names else None
        if shape and transform == STACKED:
            layers, shape = max(layers, shape[0]), shape[1:]
        elif shape:
            rank, to_ours, _ = TRANSFORMS[transform]
            shape = (shape[0] // parts, *shape[1:])
            shape = shape_after(to_ours, shape) if rank in (None, len(shape)) else None
        if shape is not None:
            found[leaf] = shape
        if "{i}" in pattern:
            numbers = (re.match(r"\d+", name[pattern.index("{i}") :]) for name in names)
            layers = max([layers, *(int(number[0]) + 1 for number in numbers if number)])
    return found, layers

"""What the names of a network's parameters mean: its parts and its stages.

Networks declare it themselves, ours and nnU-Net's in the same words (`key_to_encoder`, `key_to_stem`,
`keys_to_in_proj`, ours also `key_to_seg_layers` and `keys_by_anisotropy`). What nnU-Net's do not declare, the names
within their decoders, stands here once.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from nnunetv2_misfm.plans.network_entry import DECODER, ENCODER, NETWORKS, STEM, own_class

SEG_LAYERS = "segmentation layers"
LEARNING_PARTS = (STEM, ENCODER, DECODER)
"""What pretraining can train for a fine-tuning."""
PARTS = (*LEARNING_PARTS, SEG_LAYERS)
OTHER = "other"
"""What a file holds besides the parts of a network: projectors, densifiers, mask tokens."""


@dataclass(frozen=True)
class Names:
    """The names of modules in a network; each ends at a dot, and lists may be empty.

    Attributes:
        encoder, stem, decoder: of the parts; the stem counts as a part of its own, wherever it lies.
        in_proj: the convolutions of the image.
        seg_layers: the layers that belong to the labels of one dataset.
        by_anisotropy: lists with one module for each degree of anisotropy.
        encoder_stages: lists with one module for each stage, from fine to coarse.
        decoder_stages: lists with one module for each stage but the coarsest, from coarse to fine.
    """

    encoder: str = "encoder"
    stem: str = "encoder.stem"
    decoder: str = "decoder"
    in_proj: tuple[str, ...] = ()
    seg_layers: tuple[str, ...] = ("decoder.seg_layers",)
    by_anisotropy: tuple[str, ...] = ()
    encoder_stages: tuple[str, ...] = ()
    decoder_stages: tuple[str, ...] = ()

    def part_of(self, name: str) -> str:
        """The part that a parameter of a file belongs to: one of `PARTS`, or `OTHER`."""
        for part, keys in (
            (SEG_LAYERS, self.seg_layers),
            (STEM, (self.stem,)),
            (ENCODER, (self.encoder,)),
            (DECODER, (self.decoder,)),
        ):
            if any(within(name, key) for key in keys):
                return part
        return OTHER

    def part_in_network(self, name: str) -> str:
        """The part of a network's parameter: whatever is neither encoder nor segmentation layer, decodes."""
        part = self.part_of(name)
        return DECODER if part == OTHER else part


_OF_UNETS: dict[str, Any] = {
    "encoder_stages": ("encoder.stages",),
    "decoder_stages": ("decoder.stages", "decoder.transpconvs"),
}
OF_PLAIN_UNET = Names(stem="encoder.stages.0", in_proj=("encoder.stages.0.0.convs.0.conv",), **_OF_UNETS)
OF_RESIDUAL_UNET = Names(stem="encoder.stem", in_proj=("encoder.stem.convs.0.conv",), **_OF_UNETS)


def _declared(class_name: str) -> Names:
    """What a network of this package declares."""
    network = own_class(class_name)
    in_proj = network.keys_to_in_proj
    return Names(
        stem=network.key_to_stem,
        seg_layers=(network.key_to_seg_layers,),
        by_anisotropy=network.keys_by_anisotropy,
        # With stems in turn it depends on those there are, and is a property.
        in_proj=tuple(in_proj) if isinstance(in_proj, (list, tuple)) else (),
    )


_OF_CLASSES = {
    "PlainConvUNet": OF_PLAIN_UNET,
    "GenericUNet": OF_PLAIN_UNET,
    "ResidualEncoderUNet": OF_RESIDUAL_UNET,
    **{own_class(path).__name__: _declared(path) for path in NETWORKS.values()},
}
OF_PCTNET, OF_FMUNET = _OF_CLASSES["PCTNet"], _OF_CLASSES["FMUNet"]


def names_in_class(class_name: str) -> Names | None:
    """The names in networks of a class that plans name; None if they are not known without building it."""
    return _OF_CLASSES.get(class_name.rpartition(".")[2])


_MORE_CLASSES = (1, 16)
# They are taken where there is nothing else; whole words, for "semantic" is none.
_COPIES = {"ema", "teacher", "momentum", "averaged", "target", "shadow", "swa", "polyak"}


def names_of(network: nn.Module, rebuilt: Callable[[int, int], nn.Module] | None = None) -> Names:
    """The names in a network, as it declares them.

    Args:
        network: of any class.
        rebuilt: builds the same network for other numbers of channels and classes than it has; then the convolutions
            of the image and the segmentation layers of a network that does not declare them are those that change.
    """
    encoder = getattr(network, "key_to_encoder", "encoder")
    stem = getattr(network, "key_to_stem", "encoder.stem")
    own = {name for name, _ in network.named_modules()}
    in_proj = [key for key in getattr(network, "keys_to_in_proj", ()) if key in own]
    seg_layers = [key for key in (getattr(network, "key_to_seg_layers", "decoder.seg_layers"),) if key in own]
    if rebuilt is not None and not seg_layers:
        # The widths of whole decoders may follow from the number of classes, but not in every step of it.
        seg_layers = [*dict.fromkeys(name for more in _MORE_CLASSES for name in _changed(network, rebuilt(0, more)))]
    if rebuilt is not None and not in_proj:
        in_proj = _changed(network, rebuilt(1, 0))
    if not in_proj:
        convolutions = [name for name, module in network.named_modules() if isinstance(module, (nn.Conv3d, nn.Conv2d))]
        in_proj = convolutions[:1]
    decodes = [key for key in _OF_UNETS["decoder_stages"] if isinstance(_module(network, key), nn.ModuleList)]
    is_unet = len(decodes) == len(_OF_UNETS["decoder_stages"]) and hasattr(_module(network, "encoder"), "strides")
    return Names(
        encoder=encoder.removesuffix(".stages"),
        stem=stem,
        in_proj=tuple(in_proj),
        seg_layers=tuple(seg_layers),
        by_anisotropy=tuple(getattr(network, "keys_by_anisotropy", ())),
        **(_OF_UNETS if is_unet else {}),
    )


def is_copy(place: str) -> bool:
    """Whether a place in a file is that of an average of weights, or of a network that only teaches."""
    return not _COPIES.isdisjoint(re.split(r"[._]", place.lower())) or "encoder_k" in place.lower()


def within(name: str, key: str) -> bool:
    """Whether a parameter belongs to the module `key`, or is it."""
    return name == key or name.startswith(f"{key}.")


def _changed(network: nn.Module, other: nn.Module) -> list[str]:
    shapes = {name: parameter.shape for name, parameter in other.named_parameters()}
    changed = (name for name, p in network.named_parameters() if shapes.get(name) != p.shape)
    return list(dict.fromkeys(name.rpartition(".")[0] for name in changed))


def _module(network: nn.Module, name: str) -> Any:
    try:
        return network.get_submodule(name)
    except AttributeError:
        return None

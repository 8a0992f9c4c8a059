"""The networks that public checkpoints hold, each recognised by names of parameters that no other has.

One row for each: which are read, and how, and which are not, with the reason and what to do instead. A name is looked
for behind whatever wrappers a project has put before it (`module.`, `student.backbone.`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from nnunetv2_misfm.checkpoints.names import OF_FMUNET, OF_PCTNET, OF_PLAIN_UNET, OF_RESIDUAL_UNET, Names

GENERIC_UNET_CLASS = "nnunetv2_misfm.architectures.generic_unet.GenericUNet"
RESIDUAL_UNET = "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet"

_OWN_TRAINER = "Fine-tune it with the code of its authors"
_IN_PLANS = (
    "if its class can be imported here, name one that takes nnU-Net's constructor call in a plans file "
    "(network_class_name) and use -network plan: docs/own_networks.md"
)
_OTHER_BLOCKS = f"its blocks compute something else than those of nnU-Net's U-Nets or of PCT-Net. {_OWN_TRAINER}, or, "
_TRANSFORMER = f"it is a transformer, whose weights no U-Net can take. {_OWN_TRAINER}, or, "


@dataclass(frozen=True)
class Kind:
    """A network that checkpoints hold.

    Attributes:
        name: for people.
        told_by: names of parameters; a file holds this network if it has all of them, each given as one of the
            alternatives between "|".
        names: of the network it is read as; None if it is not read.
        refusal: why it is not read, and the nearest way.
        inside: where in the network its names belong, for a file with a part of it.
    """

    name: str
    told_by: tuple[str, ...]
    names: Names | None = None
    refusal: str = ""
    inside: str = ""


def names_in(kind: Kind | None) -> Names:
    """The names in a network of a kind; the usual ones where they are not known."""
    return (None if kind is None else kind.names) or Names()


def _of_other_blocks(name: str, *told_by: str) -> Kind:
    return Kind(name, told_by, refusal=_OTHER_BLOCKS + _IN_PLANS)


def _transformer(name: str, *told_by: str) -> Kind:
    return Kind(name, told_by, refusal=_TRANSFORMER + _IN_PLANS)


PCTNET = Kind("PCTNet", ("encoder.stage2.conv.0.weight",), OF_PCTNET)
FMUNET = Kind("FMUNet", ("encoder.stem.weight", "encoder.downs.0.2.weight"), OF_FMUNET)
PUBLISHED_PCTNET = Kind("published PCT-Net", ("embeddings.0.proj.weight",), OF_PCTNET)
PUBLISHED_FMUNET = Kind("published FMUNet", ("project.weight", "encoder.en_conv0.conv_list.0.3.weight"), OF_FMUNET)
PLAIN = Kind(
    "PlainConvUNet",
    ("encoder.stages.0.0.convs.0.conv.weight|encoder.stages.0.0.convs.0.all_modules.0.weight",),
    OF_PLAIN_UNET,
)
RESIDUAL = Kind(
    "ResidualEncoderUNet",
    (
        "encoder.stem.convs.0.conv.weight|encoder.stem.convs.0.all_modules.0.weight",
        "encoder.stages.0.blocks.0.conv1.conv.weight|encoder.stages.0.blocks.0.conv1.all_modules.0.weight",
    ),
    OF_RESIDUAL_UNET,
)
RESIDUAL_ENCODER = Kind(
    "encoder of a ResidualEncoderUNet",
    tuple("|".join(name.removeprefix("encoder.") for name in told.split("|")) for told in RESIDUAL.told_by),
    OF_RESIDUAL_UNET,
    inside="encoder.",
)
PLAIN_ENCODER = Kind(
    "encoder of a PlainConvUNet",
    ("stages.0.0.convs.0.conv.weight|stages.0.0.convs.0.all_modules.0.weight",),
    OF_PLAIN_UNET,
    inside="encoder.",
)
GENERIC_UNET = Kind(
    "Generic_UNet of nnU-Net v1", ("conv_blocks_context.0.blocks.0.conv.weight", "tu.0.weight"), OF_PLAIN_UNET
)

KINDS = (
    PCTNET,
    FMUNET,
    PUBLISHED_PCTNET,
    PUBLISHED_FMUNET,
    RESIDUAL,
    PLAIN,
    RESIDUAL_ENCODER,
    PLAIN_ENCODER,
    GENERIC_UNET,
    Kind(
        "Generic_UNet of nnU-Net v1 without transposed convolutions",
        ("conv_blocks_context.0.blocks.0.conv.weight",),
        refusal="it pools and interpolates where nnU-Net v2's U-Nets have strided and transposed convolutions. Take "
        "the model of one of v1's default trainers (nnUNetTrainerV2)",
    ),
    Kind(
        "residual U-Net of nnU-Net v1",
        ("encoder.initial_conv.weight",),
        refusal=f"{_OTHER_BLOCKS}train a ResidualEncoderUNet (nnUNetv2_plan_experiment -pl nnUNetPlannerResEncL)",
    ),
    _of_other_blocks("STU-Net", "conv_blocks_context.0.0.conv1.weight"),
    _of_other_blocks("MedNeXt", "enc_block_0.0.conv1.weight|enc_stages.0.0.conv1.weight"),
    _transformer("Swin UNETR", "swinViT.patch_embed.proj.weight|layers1.0.blocks.0.attn.relative_position_bias_table"),
    _transformer("UNETR", "vit.blocks.0.attn.qkv.weight"),
    _transformer("Primus", "eva.blocks.0.norm1.weight"),
    Kind(
        "Segment Anything model",
        ("prompt_encoder.no_mask_embed.weight|image_encoder.patch_embed.proj.weight",),
        refusal=f"{_TRANSFORMER}for a network that needs no prompts, start from other weights",
    ),
    _transformer(
        "vision transformer", "patch_embed.proj.weight|patch_embedding.position_embeddings", "blocks.0.attn.qkv.weight"
    ),
    _of_other_blocks("SegResNet", "convInit.conv.weight|encoder.conv_init.weight"),
    _of_other_blocks("DynUNet of MONAI", "input_block.conv1.conv.weight"),
    _of_other_blocks(
        "U-Net of MONAI", "model.0.conv.unit0.conv.weight|conv_0.conv_0.conv.weight|model.0.conv.0.conv.weight"
    ),
    _of_other_blocks(
        "U-Net of MONAI", "model.0.conv.weight", "model.1.submodule.conv.weight|model.1.submodule.0.conv.weight"
    ),
    _of_other_blocks("V-Net of MONAI", "in_tr.conv_block.conv.weight"),
    Kind(
        "U-Net of Models Genesis",
        ("down_tr64.ops.0.conv1.weight",),
        refusal=_OTHER_BLOCKS
        + "for nnU-Net, take a checkpoint of its pretext task for ResidualEncoderUNet (ModelsGenesis in nnssl)",
    ),
    Kind(
        "ResNet (Med3D, torchvision)",
        ("conv1.weight", "layer1.0.conv1.weight"),
        refusal="it is an encoder for classification, whose blocks compute something else than those of nnU-Net's "
        "U-Nets or of PCT-Net. Fine-tune it with the code of its authors",
    ),
)


def recognised(names: Collection[str]) -> tuple[Kind, list[str]] | None:
    """The first of `KINDS` that a file's names tell of, and what stands before the network's names in the file.

    Returns:
        The kind with all prefixes behind which there is such a network, the shortest first; None for no known network.
    """
    for kind in KINDS:
        prefixes = set(_prefixes(names, kind.told_by[0]))
        for more in kind.told_by[1:]:
            prefixes &= set(_prefixes(names, more))
        prefixes = {prefix.removesuffix("decoder.") for prefix in prefixes}  # nnU-Net's list their encoder too
        if prefixes:
            return kind, sorted(prefixes, key=lambda prefix: (len(prefix), prefix))
    return None


def _prefixes(names: Collection[str], alternatives: str) -> Iterator[str]:
    for wanted in alternatives.split("|"):
        for name in names:
            if name == wanted or name.endswith(f".{wanted}"):
                yield name.removesuffix(wanted)

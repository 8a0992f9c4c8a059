"""Moving pretrained weights into another network, with an account of every parameter.

`transfer` is a pure function: a source and a target network in, a state dict and a `TransferReport` out. Nothing
is loaded and nothing is left out silently: each parameter of the target ends as transferred, adapted (how) or fresh
(why), each tensor of the source as used or not (why), and too little coverage is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from torch import Tensor, nn

from nnunetv2_misfm.checkpoints.names import LEARNING_PARTS, OTHER, SEG_LAYERS, Names, names_of, within
from nnunetv2_misfm.checkpoints.source import Source
from nnunetv2_misfm.checkpoints.unet_weights import is_statistic
from nnunetv2_misfm.errors import UserError
from nnunetv2_misfm.plans.network_entry import DECODER
from nnunetv2_misfm.plans.run_settings import FinetuningSettings
from nnunetv2_misfm.transfer.adaptation import fit_bias_table, fit_input_channels, fit_kernel, fit_upsampling_kernel
from nnunetv2_misfm.transfer.alignment import matching_names
from nnunetv2_misfm.transfer.report import ADAPTED, FRESH, TRANSFERRED, Entry, TransferReport, Unused, percent

MIX_CHANNELS = "--mix_input_channels"
_MOST_MISMATCHES = 5


class TransferError(UserError, RuntimeError):
    """Too little of the source fits the target; the message lists the first mismatches and what would allow it."""


def transfer(
    source: Source,
    target: nn.Module,
    settings: FinetuningSettings | None = None,
    channels: tuple[str, ...] = (),
    rebuilt: Callable[[int, int], nn.Module] | None = None,
) -> tuple[dict[str, Tensor], TransferReport]:
    """The state dict that `target` should load to start from `source`.

    Segmentation layers always start fresh, and so do parts that were not trained. Everything else is taken over as it
    is where the shapes agree, and adapted where what it computes can be kept (see `adaptation.py`): other input
    channels, kernels of another degree of anisotropy, other attention windows. Stems and stages are matched first (see
    `names.py`).

    Args:
        source: the pretrained weights, and what is known of them.
        target: the network as built, its initial values used where something is fresh.
        settings: whether the decoder is transferred too, whether several input channels may be mixed for another number
            of channels, and how much must be covered.
        channels: names of the target's images, after whose channels come the labels of a cascade's first stage; empty
            if they are not known, and all channels are images.
        rebuilt: see `names_of`.

    Raises:
        TransferError: if nothing can be used, or less than `settings.min_coverage`.
    """
    settings = settings or FinetuningSettings()
    names = names_of(target, rebuilt)
    if source.whole:
        whole, known = (_num_found(one, source, target, names) for one in (source.whole, source.weights))
        if whole > known:
            source = replace(source, weights=dict(source.whole), kind=None, info=None, unused={})
    fit = _Fitting(source, target, names, settings, channels)
    entries = fit.take_parameters()
    without_statistics = fit.take_statistics()
    expected = tuple(
        part
        for part in LEARNING_PARTS
        if part not in source.untrained and not (settings.encoder_only and part == DECODER)
    )
    unused = tuple(_unused(source, fit.used, fit.rejected, source.names or names))
    notes = tuple(_about_statistics(source, target, without_statistics))
    report = TransferReport(str(source.path), entries, expected, unused, notes)
    _require(report, source, settings.min_coverage)
    return fit.result, report


def _num_found(weights: Mapping[str, Tensor], source: Source, target: nn.Module, names: Names) -> int:
    """How many parameters of the target have a counterpart among weights of the source."""
    find = matching_names(weights, source.arch_kwargs, target, names)
    return sum(find(name) in weights for name, _ in target.named_parameters())


class _Fitting:
    """Finds the value of one parameter of the target after another.

    Attributes:
        result: the state dict that the target should load.
        used: names in the source of what is in it.
        rejected: names in the source of what did not fit, each with the reason.
    """

    def __init__(
        self,
        source: Source,
        target: nn.Module,
        names: Names,
        settings: FinetuningSettings,
        channels: tuple[str, ...],
    ):
        self.source = source
        self.target = target
        self.result = {name: value.clone() for name, value in target.state_dict().items()}
        self.used: set[str] = set()
        self.rejected: dict[str, str] = {}
        self.names = names
        self.settings = settings
        self.channels = channels
        self.find = matching_names(source.weights, source.arch_kwargs, target, names)
        self.aliases = _names_by_identity(target)
        self.input_layers = {f"{key}.weight" for key in names.in_proj}
        # Other parameters with five axes, such as a position embedding, mean something else by their last three.
        self.fit_kernels = {
            f"{name}.weight": fit_upsampling_kernel if isinstance(module, nn.ConvTranspose3d) else fit_kernel
            for name, module in target.named_modules()
            if isinstance(module, (nn.Conv3d, nn.ConvTranspose3d))
        }

    def take_parameters(self) -> tuple[Entry, ...]:
        """Take every parameter that fits into the result; what became of each."""
        entries = []
        for name, parameter in self.target.named_parameters():
            name_in_source = self.find(name)
            value, status, reason = self.value_for(name, parameter, name_in_source)
            part = self.names.part_in_network(name)
            entries.append(Entry(name, part, status, reason, parameter.numel(), tuple(parameter.shape)))
            if value is not None and name_in_source is not None:
                self._take(name_in_source, parameter, value)
            elif name_in_source is not None:
                self.rejected[name_in_source] = reason
        return tuple(entries)

    def take_statistics(self) -> list[str]:
        """Take the buffers (BatchNorm's statistics) around the weights taken; the names of those that are missing.

        They are not counted as parameters.
        """
        missing = []
        for name, buffer in self.target.named_buffers():
            name_in_source = self.find(name)
            if name not in self.result or name_in_source is None or self.why_fresh(name) is not None:
                continue
            in_source = self.source.weights.get(name_in_source)
            if in_source is not None and in_source.shape == buffer.shape:
                self._take(name_in_source, buffer, in_source)
            elif in_source is not None:
                self.rejected[name_in_source] = f"shape {list(in_source.shape)} in the source"
            elif name.endswith(".running_mean") and name_in_source.replace(".running_mean", ".weight") in self.used:
                missing.append(name)
        return missing

    def _take(self, name_in_source: str, own: Tensor, value: Tensor) -> None:
        self.used.add(name_in_source)
        for alias in self.aliases[id(own)]:
            self.result[alias] = value.to(own.dtype)

    def why_fresh(self, name: str) -> str | None:
        """Why a parameter is fresh whatever the source has; None if it need not be."""
        part = self.names.part_in_network(name)
        if part == SEG_LAYERS:
            return "segmentation layers always start fresh"
        if self.settings.encoder_only and part == DECODER:
            return "only the encoder was asked for"
        return self.source.untrained.get(part)

    def value_for(self, name: str, parameter: Tensor, name_in_source: str | None) -> tuple[Tensor | None, str, str]:
        """The value, or None; the status; how it was adapted or why it is fresh."""
        reason = self.why_fresh(name)
        if reason is not None:
            return None, FRESH, reason
        if name_in_source is None or name_in_source not in self.source.weights:
            return None, FRESH, "not in the source"
        value, steps = self.source.weights[name_in_source], []
        if any(within(name, key) for key in self.names.by_anisotropy) and name_in_source != name:
            steps.append(f"from degree of anisotropy {name_in_source.split('.')[2]}")
        fitted: Tensor | None = value
        if name.endswith("relative_position_bias_table") and value.ndim == 2 and value.shape != parameter.shape:
            fitted = fit_bias_table(value, parameter.shape[0])
            steps.append(f"interpolated from {value.shape[0]} to {parameter.shape[0]} relative positions")
        elif name in self.fit_kernels and value.ndim == 5 and value.shape[2:] != parameter.shape[2:]:
            fitted = self.fit_kernels[name](value, parameter.shape[2:])
            steps.append(f"kernel {list(value.shape[2:])} to {list(parameter.shape[2:])}")
        if fitted is not None and name in self.input_layers and value.ndim == parameter.ndim > 2:
            # It sees images and, in a cascade, labels after them.
            fitted, said = self._fit_channels(fitted, parameter.shape[1])
            if fitted is None:
                return None, FRESH, said
            steps += [said] if said else []
        if fitted is None or fitted.shape != parameter.shape:
            return None, FRESH, f"shape {list(value.shape)} in the source"
        return (fitted, ADAPTED, ", ".join(steps)) if steps else (fitted, TRANSFERRED, "")

    def _fit_channels(self, value: Tensor, inputs: int) -> tuple[Tensor | None, str]:
        """A first convolution's weight for other input channels, and what was done, if anything; or None, and why."""
        have = min(self.source.num_images or value.shape[1], value.shape[1])
        images = len(self.channels) or inputs
        order = channel_order(self.source.channels[:have], self.channels)
        if order is not None and order != list(range(have)):
            taken = ", ".join(self.source.channels[i] for i in order)
            said = f"input channels {taken} of {', '.join(self.source.channels)}"
            return fit_input_channels(value[:, order], images, inputs), said
        if value.shape[1] == have == images == inputs:
            return value, ""
        if have not in (1, images) and not self.settings.mix_input_channels:
            return None, f"{have} input channels in the source; {MIX_CHANNELS} would mix them"
        fitted = fit_input_channels(value[:, :have], images, inputs)
        if value.shape[1] != inputs:
            return fitted, f"input channels {value.shape[1]} to {inputs}"
        return fitted, "" if fitted.equal(value) else "labels of a cascade start at zero"


def channel_order(source: Sequence[str], target: Sequence[str]) -> list[int] | None:
    """For each image channel of the target the source's of the same name; None where names do not decide.

    Where both have as many channels, those without a namesake take what is left, in order.
    """
    theirs, ours = ([name.casefold() for name in names] for names in (source, target))
    both = set(theirs) & set(ours)
    if len(theirs) < 2 or len(set(theirs)) < len(theirs) or len(set(ours)) < len(ours) or not both:
        return None
    if not set(ours) <= set(theirs) and len(ours) != len(theirs):
        return None
    left = iter([i for i, name in enumerate(theirs) if name not in both])
    return [theirs.index(name) if name in both else next(left) for name in ours]


def _names_by_identity(network: nn.Module) -> dict[int, list[str]]:
    # nnU-Net's U-Nets list their encoder's parameters a second time under the decoder.
    names: dict[int, list[str]] = {}
    for listed in (network.named_parameters, network.named_buffers):
        for name, tensor in listed(remove_duplicate=False):
            names.setdefault(id(tensor), []).append(name)
    return names


def _unused(source: Source, used: set[str], rejected: Mapping[str, str], parts: Names) -> Iterator[Unused]:
    """What of the source the target does not start from."""
    for name, value in source.weights.items():
        if name in used:
            continue
        part = parts.part_of(name)
        if name in rejected:
            reason = rejected[name].replace(" in the source", " does not fit")
        elif part == SEG_LAYERS:
            reason = "segmentation layers always start fresh"
        elif part in source.untrained:
            reason = source.untrained[part]
        elif any(within(name, key) for key in parts.by_anisotropy):
            reason = "for another degree of anisotropy"
        elif is_statistic(name):
            reason = "statistics of BatchNorm, which this network has not"
        elif any(within(name, key) for key in (*parts.encoder_stages, *parts.decoder_stages)):
            reason = "this network has no such stage, or no such layer in it"
        else:
            reason = "no part of this network"
        yield Unused(name, part, reason, value.numel())
    yield from (Unused(name, OTHER, reason, 0) for name, reason in source.unused.items())


def _about_statistics(source: Source, target: nn.Module, without: Sequence[str]) -> Iterator[str]:
    """What happens to BatchNorm's means and variances; `without` are those that the source lacks for its weights."""
    lost = [name for name in source.weights if name.endswith("running_mean")]
    has_statistics = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in target.modules())
    if lost and not has_statistics:
        yield (
            f"The checkpoint's {source.network_name} normalises with BatchNorm, this network does not: the means and "
            f"variances of {len(lost)} layers are lost, and the features are not those that the weights were trained "
            f"to give."
        )
    elif has_statistics and not lost:
        yield (
            f"This network normalises with BatchNorm, and the checkpoint ({source.network_name}) holds no means and "
            f"variances: they start fresh, and the features are not those that the weights were trained to give."
        )
    elif without:
        yield (
            f"The means and variances of {len(without)} BatchNorm layers, such as {without[0]}, are not in the "
            f"checkpoint and start fresh, while the weights around them do not."
        )


def _require(report: TransferReport, source: Source, min_coverage: float) -> None:
    coverage = report.coverage(report.expected)
    used = report.coverage(LEARNING_PARTS)
    if used > 0 and coverage >= min_coverage:
        return
    if used == 0 and source.kind is not None and source.kind.refusal:
        raise TransferError(
            f"{report.source} holds a {source.network_name}, which cannot be used: {source.kind.refusal}."
        )
    wrong = [entry for entry in report.entries if entry.status == FRESH and entry.part in report.expected]
    lines = [f"  {entry.name} {list(entry.shape)}: {entry.reason}" for entry in wrong[:_MOST_MISMATCHES]]
    if len(wrong) > _MOST_MISMATCHES:
        lines.append(f"  ... and {len(wrong) - _MOST_MISMATCHES} more")
    remedy = "Use a checkpoint of the same network, or allow this with misfm_plan -min_coverage or --encoder_only."
    if used == 0:
        remedy = (
            "Nothing of it can be used, which would be training from scratch. Use a checkpoint of the same network, or "
            "give plans that name this checkpoint's network (-p) with -network plan."
        )
    if wrong and all(MIX_CHANNELS in entry.reason for entry in wrong):
        remedy = f"Allow it with {MIX_CHANNELS}."
    elif {"n_stages", "strides"} <= set(source.arch_kwargs):
        remedy += " -network pretrained trains the checkpoint's own network."
    asked_for = f"; the plan asks for {100 * min_coverage:.2f} %" if used > 0 else ""
    raise TransferError(
        f"{report.source} covers {percent(coverage):.2f} % of the network's {', '.join(report.expected)} (it holds a "
        f"{source.network_name}){asked_for}. First mismatches:\n" + "\n".join([*lines, remedy])
    )

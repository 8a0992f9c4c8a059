"""What networks declare about themselves, in the words of nnU-Net's networks, is true of them."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from nnunetv2_misfm.architectures import FMUNet, PCTNet
from nnunetv2_misfm.architectures.resolution import strides_of
from nnunetv2_misfm.checkpoints import names
from nnunetv2_misfm.plans.network_entry import NETWORKS as OWN_NETWORKS
from nnunetv2_misfm.plans.network_entry import own_class

FEATURES = (4, 4, 8, 16, 32)
# Every network that plans can name, so a new one is tested as soon as it is listed there.
NETWORKS = {name: partial(own_class(path), features_per_stage=FEATURES) for name, path in OWN_NETWORKS.items()}
NETWORKS["pctnet, all stems"] = partial(PCTNet, features_per_stage=FEATURES, stems=(0, 1, 2))
each_network = pytest.mark.parametrize("kind", NETWORKS.values(), ids=NETWORKS)


@each_network
def test_keys_name_what_they_say(kind) -> None:
    network = kind(2, 3, strides_of(1))
    state, others = network.state_dict(), kind(3, 3, strides_of(1)).state_dict()
    changed = {name.rpartition(".")[0] for name, tensor in state.items() if tensor.shape != others[name].shape}
    assert changed == set(network.keys_to_in_proj)
    assert all(name.startswith(f"{network.key_to_stem}") for name in network.keys_to_in_proj)
    assert network.key_to_stem.startswith(f"{network.key_to_encoder}.")
    for name in (network.key_to_encoder, network.key_to_stem, *network.keys_to_in_proj):
        assert list(network.get_submodule(name).parameters())
    assert network.get_submodule(network.key_to_seg_layers) is network.decoder.seg_layers
    assert network.key_to_lpe is None
    assert all(set(network.get_submodule(name)) <= set("012") for name in network.keys_by_anisotropy)


@pytest.mark.parametrize("degree", [0, 1, 2])
@each_network
def test_strides_and_divisor_are_those_of_the_outputs(kind, degree: int) -> None:
    network = kind(1, 3, strides_of(degree)).eval()
    size = [2 * divisor for divisor in network.size_divisor]
    with torch.no_grad():
        outputs = network(torch.zeros(1, 1, *size))
    assert [tuple(n // s for n, s in zip(size, stride, strict=True)) for stride in network.output_strides] == [
        tuple(output.shape[2:]) for output in outputs
    ]


@each_network
def test_the_encoder_gives_a_map_for_every_stage(kind) -> None:
    network = kind(1, 3, strides_of(1)).eval()
    with torch.no_grad():
        maps = network.encode(torch.zeros(1, 1, 20, 33, 16))
    padded = [n + -n % divisor for n, divisor in zip((20, 33, 16), network.size_divisor, strict=True)]
    assert [m.shape[1] for m in maps] == network.encoder.output_channels
    assert [list(m.shape[2:]) for m in maps[:-1]] == [
        [n // s for n, s in zip(padded, stride, strict=True)] for stride in network.output_strides
    ]
    assert [n // m for n, m in zip(padded, maps[-1].shape[2:], strict=True)] == list(network.size_divisor)


def test_a_list_names_convolutions_of_the_image_as_a_tuple_does(monkeypatch: pytest.MonkeyPatch) -> None:
    class Listed(FMUNet):
        keys_to_in_proj = ["encoder.stem"]

    monkeypatch.setattr(names, "own_class", lambda _: Listed)
    assert names._declared("a.Listed").in_proj == ("encoder.stem",)

"""PCT-Net: shapes, padding, independence of the patch size, checkpointing."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.version import Version

from nnunetv2_misfm.architectures import PCTNet
from nnunetv2_misfm.architectures.pct_net import reproducible_max_pool
from nnunetv2_misfm.architectures.resolution import strides_of

SMALL = {"features_per_stage": (4, 4, 8, 16, 32), "num_heads": (2, 2, 4), "window_size": 3}


def network(anisotropy: int = 0, **changes: object) -> PCTNet:
    torch.manual_seed(0)
    arguments = {"input_channels": 1, "num_classes": 3, "strides": strides_of(anisotropy), **SMALL, **changes}
    return PCTNet(**arguments).eval()  # type: ignore[arg-type]


@pytest.mark.parametrize("anisotropy", [0, 1, 2])
@pytest.mark.parametrize("size", [(16, 32, 48), (17, 33, 20), (5, 40, 56), (1, 16, 16), (3, 7, 100)])
def test_output_has_the_size_of_the_input(anisotropy: int, size: tuple[int, int, int]) -> None:
    with torch.no_grad():
        outputs = network(anisotropy)(torch.randn(2, 1, *size))
    assert [tuple(o.shape[:2]) for o in outputs] == [(2, 3)] * 4
    assert tuple(outputs[0].shape[2:]) == size
    assert all(torch.isfinite(o).all() for o in outputs)


@given(anisotropy=st.integers(0, 2), size=st.tuples(st.integers(1, 40), st.integers(1, 70), st.integers(1, 70)))
@settings(max_examples=25)
def test_padding_inside_equals_zero_padding_by_the_user(anisotropy: int, size: tuple[int, int, int]) -> None:
    net, x = network(anisotropy, deep_supervision=False), torch.randn(1, 1, *size)
    pads = [-n % m for n, m in zip(size, (16 >> anisotropy, 16, 16), strict=True)]
    padded = torch.nn.functional.pad(x, (0, pads[2], 0, pads[1], 0, pads[0]))
    with torch.no_grad():
        assert torch.equal(net(x), net(padded)[:, :, : size[0], : size[1], : size[2]])


def test_deep_supervision_outputs_have_the_sizes_nnunet_scales_segmentations_to() -> None:
    with torch.no_grad():
        outputs = network(1)(torch.randn(1, 1, 13, 30, 44))
    assert [tuple(o.shape[2:]) for o in outputs] == [(13, 30, 44), (13, 15, 22), (6, 8, 11), (3, 4, 6)]


def test_one_state_dict_serves_ten_patch_sizes() -> None:
    state = network(1).state_dict()
    sizes = [(64, 32, 32), (8, 16, 16), (40, 56, 40), (28, 48, 32), (7, 64, 16), (16, 16, 96), (33, 17, 31)]
    sizes += [(1, 32, 32), (12, 80, 16), (24, 24, 24)]
    for size in sizes:
        net = network(1, deep_supervision=False)
        net.load_state_dict(state, strict=True)
        with torch.no_grad():
            assert tuple(net(torch.randn(1, 1, *size)).shape[2:]) == size


def test_a_sample_does_not_depend_on_the_rest_of_its_batch() -> None:
    net = network(0, deep_supervision=False)
    x = torch.randn(3, 1, 16, 32, 32)
    with torch.no_grad():
        together = net(x)
        alone = torch.cat([net(sample[None]) for sample in x])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_axes_are_not_interchanged() -> None:
    """An anisotropic network treats its first axis differently from the other two, and those two alike in shape."""
    net = network(2, deep_supervision=False)
    x = torch.zeros(1, 1, 8, 32, 32)
    x[0, 0, 4, 16, 16] = 1
    with torch.no_grad():
        stem = net.encoder.stems["2"].project
        response = stem(x) - stem(torch.zeros_like(x))
    touched = [int(response[0].abs().sum(dim=[d for d in range(4) if d != axis]).count_nonzero()) for axis in (1, 2, 3)]
    assert touched == [1, 3, 3]


def test_stems_of_a_universal_network_are_chosen_by_degree() -> None:
    net = network(0, stems=(0, 1, 2), deep_supervision=False)
    x = torch.randn(1, 1, 16, 32, 32)
    with torch.no_grad():
        isotropic = net(x)
        net.use_anisotropy(2)
        anisotropic = net(x)
    assert isotropic.shape == anisotropic.shape
    assert not torch.allclose(isotropic, anisotropic)
    with pytest.raises(ValueError, match="no stem for degree of anisotropy 1"):
        network(0).use_anisotropy(1)


def test_segmentation_layers_run_from_coarse_to_fine_as_in_nnunet() -> None:
    layers = network(1).decoder.seg_layers
    assert [layer.in_channels for layer in layers] == [16, 8, 4, 4]
    assert all(layer.out_channels == 3 for layer in layers)


def test_every_parameter_gets_a_gradient() -> None:
    net = network(1).train()
    sum(o.square().mean() for o in net(torch.randn(2, 1, 16, 32, 32))).backward()
    assert [name for name, p in net.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.machine_code)])
def test_checkpointing_changes_neither_gradients_nor_running_statistics(compiled: bool) -> None:
    plain, checkpointed = (network(1, dropout_per_stage=(0.0,) * 5, drop_path=0.0).train() for _ in range(2))
    checkpointed.checkpointing = True
    x = torch.randn(2, 1, 16, 32, 32)
    for net in (plain, checkpointed):
        run = torch.compile(net, fullgraph=True, dynamic=False, backend="aot_eager") if compiled else net
        sum(o.square().mean() for o in run(x)).backward()
    for (name, a), b in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name)
    for (name, a), b in zip(plain.named_buffers(), checkpointed.buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_checkpointing_takes_norms_that_average_all_batches() -> None:
    plain, checkpointed = (network(1, dropout_per_stage=(0.0,) * 5, drop_path=0.0).train() for _ in range(2))
    checkpointed.checkpointing = True
    for net in (plain, checkpointed):
        for module in net.modules():
            if isinstance(module, torch.nn.BatchNorm3d):
                module.momentum = None
        for seed in (1, 2):
            x = torch.randn(2, 1, 16, 32, 32, generator=torch.Generator().manual_seed(seed))
            sum(o.square().mean() for o in net(x)).backward()
    for (name, a), b in zip(plain.named_buffers(), checkpointed.buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_a_traced_network_is_the_network() -> None:
    net = network(0, deep_supervision=False).eval()
    x = torch.randn(1, 1, 16, 32, 32)
    with torch.no_grad():
        traced = torch.jit.trace(net, x, check_trace=False)
        torch.testing.assert_close(traced(x), net(x))


def test_checkpointing_recomputes_with_the_same_dropout() -> None:
    gradients = []
    for checkpointing in (False, True):
        net = network(1, checkpointing=checkpointing).train()
        torch.manual_seed(1)
        sum(o.square().mean() for o in net(torch.randn(2, 1, 16, 32, 32))).backward()
        gradients.append(net.encoder.stage2.conv[2].weight.grad)
    torch.testing.assert_close(*gradients)


def test_all_wrong_arguments_are_named_at_once() -> None:
    with pytest.raises(ValueError) as error:
        network(0, features_per_stage=(4, 4, 9, 16, 32), dropout_per_stage=(0.1,), stems=(1,))
    message = str(error.value)
    assert "features_per_stage[2] = 9" in message and "dropout_per_stage needs 5" in message and "stems" in message


def test_strides_of_other_topologies_are_refused() -> None:
    with pytest.raises(ValueError, match="not supported by this network"):
        network(0, strides=[[1, 1, 1], [2, 2, 2], [2, 2, 2], [2, 2, 2]])


@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True])
def test_compiles_without_graph_breaks(training: bool) -> None:
    """With a backend that runs the traced graphs as they are; `pytest -m machine_code` compiles."""
    plain = network(1, dropout_per_stage=(0.0,) * 5, drop_path=0.0).train(training)
    compiled = torch.compile(deepcopy(plain), fullgraph=True, dynamic=False, backend="aot_eager")
    x = torch.randn(1, 1, 13, 35, 50)
    for ours, theirs in zip(compiled(x), plain(x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.machine_code
@pytest.mark.skipif(Version(torch.__version__) < Version("2.8"), reason="torch 2.7 makes invalid C++ of this step")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_training_step_with_dropout(checkpointing: bool) -> None:
    net = network(1, checkpointing=checkpointing).train()
    compiled = torch.compile(net, fullgraph=True, dynamic=False)
    sum(o.square().mean() for o in compiled(torch.randn(2, 1, 16, 32, 32))).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in net.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_reduced_precision_stays_finite_and_close(dtype: torch.dtype) -> None:
    """Large activations too: attention logits beyond what float16 holds would make every later value NaN."""
    net = network(1, dropout_per_stage=(0.0,) * 5, drop_path=0.0)
    x = 100 * torch.randn(1, 1, 16, 32, 32)
    with torch.no_grad():
        exact = net(x)
        with torch.autocast("cpu", dtype):
            reduced = net(x)
    for a, b in zip(reduced, exact, strict=True):
        assert (a.float() - b).norm() < 0.05 * b.norm()
    net.train()
    # Without oneDNN, whose bfloat16 kernel leaves parts of some weight gradients of tiny maps uninitialised.
    with torch.backends.mkldnn.flags(enabled=False):
        with torch.autocast("cpu", dtype):
            outputs = net(x)
        sum(o.float().mean() for o in outputs).backward()
    assert all(torch.isfinite(p.grad).all() for p in net.parameters())


def test_the_same_seed_gives_the_same_gradients() -> None:
    gradients = []
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(2):
            net = network(1).train()
            torch.manual_seed(1)
            sum(o.square().mean() for o in net(torch.randn(2, 1, 16, 32, 32))).backward()
            gradients.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("kernel", [(2, 2, 2), (1, 2, 2)])
def test_reproducible_pooling_equals_ordinary_pooling(kernel: tuple[int, int, int]) -> None:
    inputs = [torch.randn(2, 3, 4, 6, 8, generator=torch.Generator().manual_seed(0)).requires_grad_() for _ in range(2)]
    pooled = [torch.nn.functional.max_pool3d(inputs[0], kernel), reproducible_max_pool(inputs[1], kernel)]
    for output in pooled:
        output.square().sum().backward()
    assert torch.equal(*pooled) and torch.equal(inputs[0].grad, inputs[1].grad)


def test_two_threads_give_the_same_gradients_every_time() -> None:
    """Not only when determinism is asked for: a resumed run must equal an uninterrupted one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        network = PCTNet(1, 2, strides_of(0), (4, 4, 8, 16, 32))
        x = torch.randn(1, 1, 24, 32, 24)
        gradients = []
        for _ in range(4):
            network.zero_grad()
            torch.manual_seed(0)
            sum(output.square().mean() for output in network(x)).backward()  # type: ignore[union-attr]
            gradients.append([p.grad.clone() for p in network.parameters()])  # type: ignore[union-attr]
    finally:
        torch.set_num_threads(threads)
    for repeated in gradients[1:]:
        assert all(torch.equal(a, b) for a, b in zip(gradients[0], repeated, strict=True))

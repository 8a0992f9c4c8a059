"""Networks on a GPU, in half precision, compiled and with activation checkpointing, against float32 on the CPU.

`pytest -m gpu` runs them where there is a GPU. MISFM_TEST_DEVICE=cpu runs them on the CPU instead, which shows that the
tests work and says nothing of a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from nnunetv2_misfm.architectures import FMUNet, PCTNet
from nnunetv2_misfm.architectures.checkpointing import set_checkpointing
from nnunetv2_misfm.architectures.memory import estimate_training_memory
from nnunetv2_misfm.architectures.resolution import strides_of
from nnunetv2_misfm.plans.checks import build_network
from nnunetv2_misfm.pretrain.planning import plain_unet_entry

pytestmark = pytest.mark.gpu

FEATURES = (8, 16, 32, 64, 128)
SHAPE = (2, 1, 16, 32, 48)
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    # Without dropout, whose random numbers differ between devices.
    "PCT-Net": partial(PCTNet, 1, 3, strides_of(1), FEATURES, dropout_per_stage=(0.0,) * 5, drop_path=0.0),
    "FMUNet": partial(FMUNet, 1, 3, strides_of(1), FEATURES, dropout_per_stage=(0.0,) * 5),
    "U-Net": partial(build_network, plain_unet_entry((3.0, 1.0, 1.0), SHAPE[2:]), 1, 3),
}
# Relative errors of outputs and of all gradients together: float32 by rounding (TF32 included), half precision by its
# digits (PCT-Net on a CPU, float16: 0.006 and 0.15). A layer that is left out or counted twice changes them more.
ERRORS = {torch.float32: (2e-3, 2e-2), torch.float16: (2e-2, 0.3), torch.bfloat16: (0.1, 0.6)}


def step(
    network: nn.Module, run: Callable[[Tensor], list[Tensor]], x: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Outputs and gradients of a training step, each in one vector of float32 on the CPU."""
    with torch.autocast(x.device.type, dtype=dtype, enabled=dtype != torch.float32):
        outputs = run(x)
    scale = 2.0**16 if dtype == torch.float16 else 1.0  # as the scaler of mixed precision does
    (scale * sum(output.float().square().mean() for output in outputs)).backward()
    gradients = [p.grad / scale for p in network.parameters() if p.grad is not None]
    vectors = (torch.cat([one.detach().float().flatten().cpu() for one in many]) for many in (outputs, gradients))
    return next(vectors), next(vectors)


def relative_error(value: Tensor, expected: Tensor) -> float:
    return float((value - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("dtype", ERRORS, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_training_step_is_that_of_the_cpu(
    gpu_device: torch.device, name: str, dtype: torch.dtype, checkpointing: bool, compiled: bool
) -> None:
    if checkpointing and name == "U-Net":
        pytest.skip("nnU-Net's networks have no activation checkpointing")
    if dtype == torch.bfloat16 and gpu_device.type == "cpu":
        pytest.skip("on some CPUs PyTorch's gradients of small convolutions in bfloat16 are wrong")
    torch.manual_seed(0)
    on_cpu = NETWORKS[name]().train()
    on_device = deepcopy(on_cpu).to(gpu_device)
    if checkpointing:
        set_checkpointing(on_device, True)
    x = torch.randn(SHAPE)
    expected = step(on_cpu, on_cpu, x, torch.float32)
    run = torch.compile(on_device, dynamic=False) if compiled else on_device
    found = step(on_device, run, x.to(gpu_device), dtype)
    errors = [relative_error(value, right) for value, right in zip(found, expected, strict=True)]
    print(f"{name}, {dtype}: outputs {errors[0]:.1e}, gradients {errors[1]:.1e}")
    assert errors[0] < ERRORS[dtype][0] and errors[1] < ERRORS[dtype][1]
    torch.compiler.reset()


@pytest.mark.parametrize("name", NETWORKS)
def test_a_prediction_is_that_of_the_cpu(gpu_device: torch.device, name: str) -> None:
    torch.manual_seed(0)
    on_cpu = NETWORKS[name]().eval()
    on_cpu.decoder.deep_supervision = False
    on_device = deepcopy(on_cpu).to(gpu_device)
    x = torch.randn(SHAPE)
    with torch.inference_mode(), torch.autocast(gpu_device.type, dtype=torch.float16):
        found = on_device(x.to(gpu_device)).float().cpu()
    with torch.inference_mode():
        expected = on_cpu(x)
    assert relative_error(found, expected) < 2e-2
    assert (found.argmax(1) == expected.argmax(1)).float().mean() > 0.98


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "mixed"])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_estimate_of_memory_is_near_the_measured_peak(
    gpu_device: torch.device, name: str, autocast: bool, checkpointing: bool
) -> None:
    if gpu_device.type != "cuda" or (checkpointing and name == "U-Net"):
        pytest.skip("a CPU's memory is not counted, and nnU-Net's networks have no activation checkpointing")
    shape = (2, 1, 64, 128, 128)  # as large as users train: small ones are mostly the libraries' workspaces
    network = NETWORKS[name]().to(gpu_device).train()
    if checkpointing:
        set_checkpointing(network, True)
    optimizer = torch.optim.AdamW(network.parameters())
    for _ in range(2):  # the first step makes the optimiser's states
        torch.cuda.reset_peak_memory_stats()
        step(network, network, torch.randn(shape, device=gpu_device), torch.float16 if autocast else torch.float32)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    peak = torch.cuda.max_memory_allocated()
    estimate = estimate_training_memory(NETWORKS[name], shape, checkpointing=checkpointing, autocast=autocast).total
    print(f"{name}: estimated {estimate / 2**30:.2f} GiB, measured {peak / 2**30:.2f} GiB, ratio {estimate / peak:.2f}")
    assert 0.7 < estimate / peak < 1.6

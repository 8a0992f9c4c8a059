"""misfm_import_checkpoint on files in the published layout, and load_network on what it writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from parity.reference import load, recorded_noise, reference_folder, relative_error

from nnunetv2_misfm import load_network
from nnunetv2_misfm.architectures import PCTNet
from nnunetv2_misfm.commands.checkpoints import import_main

pytestmark = pytest.mark.real_data


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("pctnet_small_mode1", "1"),
        ("pctnet_small_mode1", "all"),
        ("pctnet_small_mode0_narrow", "0"),
        ("fmunet_small_mode0", "all"),
    ],
)
def test_the_imported_network_gives_the_recorded_outputs(name: str, mode: str, tmp_path: Path) -> None:
    description, recorded = load(name)
    import_main(["-i", str(reference_folder() / f"{name}.pt"), "-o", str(tmp_path / "c.pth"), "-resolution_mode", mode])
    network = load_network(tmp_path / "c.pth", deep_supervision=True)
    if isinstance(network, PCTNet):
        network.use_anisotropy(description["params"]["resolution_mode"])
    with torch.no_grad():
        outputs = network(recorded_noise(tuple(description["input_shape"])))
        stride = description["output0_stride"]
        outputs[0] = outputs[0][:, :, ::stride, ::stride, ::stride]
    assert max(relative_error(a, b) for a, b in zip(outputs, recorded, strict=True)) < 1e-4


@pytest.mark.parametrize("name", ["pctnet_small_mode1", "fmunet_small_mode0"])
def test_incomplete_files_are_refused(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = torch.load(reference_folder() / f"{name}.pt", weights_only=False)
    weights = content["model_state_dict"]
    missing = [
        key for key in weights if key.startswith(("pyramid_ct.convtrans_e2.trans.blocks.1.", "decoder.de_conv1"))
    ]
    for key in missing:
        del weights[key]
    torch.save(content, tmp_path / "part.pt")
    with pytest.raises(SystemExit):
        import_main(["-i", str(tmp_path / "part.pt"), "-o", str(tmp_path / "x.pth")])
    assert missing and "is not a complete published network: it lacks" in capsys.readouterr().err
    assert not (tmp_path / "x.pth").exists()


def test_a_network_with_one_stem_has_none_to_choose(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(reference_folder() / "fmunet_small_mode0.pt")
    with pytest.raises(SystemExit):
        import_main(["-i", file, "-o", str(tmp_path / "x.pth"), "-resolution_mode", "2"])
    assert "holds an FMUNet, which has one stem. Leave -resolution_mode out." in capsys.readouterr().err


def test_other_files_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"network_weights": {"a": torch.zeros(1)}}, tmp_path / "ours.pth")
    with pytest.raises(SystemExit):
        import_main(["-i", str(tmp_path / "ours.pth"), "-o", str(tmp_path / "x.pth")])
    assert "not a published MIS-FM file" in capsys.readouterr().err
    assert not (tmp_path / "x.pth").exists()

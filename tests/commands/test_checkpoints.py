"""misfm_export_checkpoint, misfm_inspect and names on the Hugging Face Hub, as a user types them."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from foreign_files import unet
from huggingface_hub import errors as hub_errors
from nnunet_dataset import NAME

from nnunetv2_misfm.architectures import PCTNet
from nnunetv2_misfm.architectures.resolution import strides_of
from nnunetv2_misfm.checkpoints.checkpoint import CheckpointError, CheckpointInfo, write_checkpoint
from nnunetv2_misfm.checkpoints.hub import download
from nnunetv2_misfm.checkpoints.inspection import describe
from nnunetv2_misfm.checkpoints.source import load_network, load_source, read_source
from nnunetv2_misfm.commands.checkpoints import export_main, import_main, inspect_main
from nnunetv2_misfm.commands.plan import plan_main
from nnunetv2_misfm.plans.network_entry import NETWORKS

FEATURES = [4, 4, 8, 16, 32]
COMMIT = "a" * 40


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    arguments = {"strides": strides_of(0), "features_per_stage": FEATURES}
    preprocessing = {"normalization_schemes": ["ZScoreNormalization"], "patch_size": [32, 32, 32], "spacing": [1, 1, 1]}
    training = {"task": "volume_fusion", "num_epochs": 7, "initial_lr": 0.001, "learnt": "half of it"}
    info = CheckpointInfo("volume_fusion", NETWORKS["pctnet"], arguments, 1, 5, preprocessing, training, {"torch": "2"})
    path = tmp_path / "checkpoint_final.pth"
    write_checkpoint({"network_weights": PCTNet(1, 5, **arguments).state_dict()}, info, path)
    return path


@pytest.fixture
def exported(checkpoint: Path, tmp_path: Path) -> Path:
    export_main(["-i", str(checkpoint), "-o", str(tmp_path / "export"), "-license", "apache-2.0"])
    return tmp_path / "export"


def test_an_exported_checkpoint_is_the_same_network(checkpoint: Path, exported: Path) -> None:
    x = torch.randn(1, 1, 16, 16, 16)
    with torch.no_grad():
        before, after = (load_network(p)(x) for p in (checkpoint, exported / "model.safetensors"))
    assert torch.equal(before, after)
    assert read_source(exported / "model.safetensors").info == read_source(checkpoint).info


def test_an_exported_checkpoint_keeps_the_names_of_its_channels(checkpoint: Path, tmp_path: Path) -> None:
    """Weights of several channels are matched by them."""
    content = torch.load(checkpoint, weights_only=True)
    content["init_args"] = {"dataset_json": {"channel_names": {"0": "PET"}}}
    torch.save(content, checkpoint)
    export_main(["-i", str(checkpoint), "-o", str(tmp_path / "export"), "-license", "apache-2.0"])
    assert read_source(tmp_path / "export" / "model.safetensors").channels == ("PET",)


def test_the_model_card_says_what_it_is_and_how_to_use_it(exported: Path) -> None:
    card = (exported / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlibrary_name: nnunetv2_misfm\n") and "license: apache-2.0" in card
    assert "misfm_plan -d DATASET_ID" in card and "num_epochs" in card and str(exported.parent) not in card


def test_the_model_card_has_the_checksum_of_the_file_beside_it_and_no_paths(checkpoint: Path, exported: Path) -> None:
    card = (exported / "README.md").read_text(encoding="utf-8")
    sums = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (exported / "model.safetensors", checkpoint)]
    assert [re.findall(r"^ *sha256 +(\w+)", card, flags=re.MULTILINE)] == [sums]
    mode = (exported / "model.safetensors").stat().st_mode & 0o777
    assert mode == (exported / "README.md").stat().st_mode & 0o777


def test_what_was_exported_from_others_is_not_said_to_be_ours(tmp_path: Path) -> None:
    torch.save({"network_weights": unet().state_dict()}, tmp_path / "c.pth")
    export_main(["-i", str(tmp_path / "c.pth"), "-o", str(tmp_path / "export")])
    kind = describe(read_source(tmp_path / "export" / "model.safetensors")).splitlines()[1]
    assert "the weights of a PlainConvUNet, exported by this package" in kind


def test_files_and_networks_that_could_not_be_used_are_not_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flat = PlainConvUNet(1, 2, [4, 8], torch.nn.Conv2d, 3, [1, 2], 1, 2, 1)
    torch.save({"network_weights": flat.state_dict()}, tmp_path / "c.pth")
    with pytest.raises(SystemExit):
        export_main(["-i", str(tmp_path / "c.pth"), "-o", str(tmp_path / "export")])
    with pytest.raises(SystemExit):
        import_main(["-i", str(tmp_path / "c.pth"), "-o", str(tmp_path / "c.safetensors")])
    messages = capsys.readouterr().err
    assert "holds a 2D PlainConvUNet" in messages and "misfm_export_checkpoint writes safetensors" in messages
    assert not list(tmp_path.glob("*export*")) and not list(tmp_path.glob("*.safetensors"))


def test_load_network_warns_of_parts_that_did_not_learn(checkpoint: Path) -> None:
    content = torch.load(checkpoint, weights_only=True)
    torch.save({**content, "trained_parts": ["stem", "encoder"]}, checkpoint)
    with pytest.warns(UserWarning, match="the decoder was not trained by volume_fusion, and is random"):
        load_network(checkpoint)


def test_export_refuses_what_is_there_and_what_it_does_not_know(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"network_weights": {"a": torch.zeros(1)}}, tmp_path / "stock.pth")
    for source, target in ((checkpoint, tmp_path), (tmp_path / "stock.pth", tmp_path / "new")):
        with pytest.raises(SystemExit):
            export_main(["-i", str(source), "-o", str(target)])
    messages = capsys.readouterr().err
    assert "exists. Choose another" in messages and "does not say which network" in messages
    assert not list(tmp_path.glob("new*"))


def test_inspect_prints_what_a_checkpoint_is(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inspect_main([str(checkpoint)])
    printed = capsys.readouterr().out
    for expected in ("PCTNet", "volume_fusion", "num_epochs", "ZScoreNormalization", "torch 2", "sha256"):
        assert expected in printed
    network = load_network(checkpoint)
    in_encoder = sum(
        p.numel() for n, p in network.named_parameters() if n.startswith(("encoder.stage", "encoder.down"))
    )
    assert f"encoder {in_encoder:,}" in printed
    assert re.findall("learnt +(.+)", printed) == ["half of it"]


def test_a_short_fine_tuning_at_the_default_rate_is_named(
    nnunet: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["-d", "4", "-pretrained_weights", str(checkpoint), "--no_pp", "-num_iterations_per_epoch", "25"]
    for more, named in (
        (["-num_epochs", "12"], True),
        (["-num_epochs", "12", "-initial_lr", "5e-3"], False),
        (["-num_epochs", "1000"], False),
        (["-num_epochs", "12", "--from_scratch"], False),
    ):
        plan_main([*arguments, *more])
        assert ("300 iterations are few" in capsys.readouterr().out) is named


def test_weights_that_decay_has_shrunk_are_named(
    nnunet: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = torch.load(checkpoint, weights_only=True)
    content["network_weights"]["encoder.stage4.swin.0.attention.qkv.weight"].mul_(0.01)
    torch.save(content, checkpoint)
    inspect_main([str(checkpoint)])
    assert "encoder.stage4 (1 of" in capsys.readouterr().out
    plan_main(["-d", "4", "-pretrained_weights", str(checkpoint), "--no_pp"])
    assert "starts from zero in encoder.stage4 (1 of" in capsys.readouterr().out
    plan_main(["-d", "4", "-pretrained_weights", str(checkpoint), "--no_pp", "--from_scratch"])
    assert "starts from zero" not in capsys.readouterr().out


def test_inspect_foretells_the_transfer(nnunet: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inspect_main([str(checkpoint), "-d", "4"])
    printed = capsys.readouterr().out
    assert (
        "segmentation layers" in printed
        and "100.00%" in printed
        and "misfm_plan -d 4 -c 3d_fullres -pretrained_weights" in printed
    )
    with pytest.raises(SystemExit):
        inspect_main([str(checkpoint), "-d", "4", "-network", "plan"])
    assert not list((nnunet / "nnUNet_preprocessed" / NAME).glob("nnUNetMisFMPlans*"))


class _Hub(BaseHTTPRequestHandler):
    """As much of the Hub as a download needs."""

    folder: Path

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        parts = self.path.partition("?")[0].strip("/").split("/")
        if parts[:4] == ["api", "models", "group", "weights"]:
            files = [{"type": "file", "oid": "0", "size": 1, "path": path.name} for path in self.folder.iterdir()]
            return self._send(json.dumps(files).encode(), body, "application/json")
        file = self.folder / parts[-1]
        if parts[:2] != ["group", "weights"] or not file.is_file():
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound" if parts[:2] == ["group", "weights"] else "RepoNotFound")
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            return
        self._send(file.read_bytes(), body, "application/octet-stream")

    def _send(self, content: bytes, body: bool, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadingHTTPServer]:
    handler = type("Hub", (_Hub,), {"folder": exported})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    yield server
    server.shutdown()


def test_a_checkpoint_on_the_hub_is_downloaded_once_and_pinned(
    nnunet: Path, hub: ThreadingHTTPServer, exported: Path
) -> None:
    plan_main(["-d", "4", "-pretrained_weights", "hf:group/weights", "--no_pp"])
    plans = json.loads((nnunet / "nnUNet_preprocessed" / NAME / "nnUNetMisFMPlans.json").read_text(encoding="utf-8"))
    info = plans["pretrain_info"]
    assert info["checkpoint_path"] == f"hf:group/weights@{COMMIT}:model.safetensors"
    shutil.rmtree(exported)
    hub.shutdown()
    # The cache serves the training run, on a machine that reaches nothing any more.
    source = load_source(info)
    assert source.sha256 == info["sha256"] and source.info is not None


@pytest.mark.parametrize("name", ["checkpoint_final.pth", "whatever.pt"])
@pytest.mark.parametrize("given", ["hf:group/weights", "https://huggingface.co/group/weights"])
def test_a_checkpoint_of_any_name_is_found_and_works_offline(
    hub: ThreadingHTTPServer,
    exported: Path,
    checkpoint: Path,
    name: str,
    given: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (exported / "model.safetensors").unlink()
    shutil.copy(checkpoint, exported / name)
    (exported / "adaptation_plan.json").write_text("{}", encoding="utf-8")
    online = read_source(given)
    assert online.hub_name == f"hf:group/weights@{COMMIT}:{name}"
    assert (online.path.parent / "adaptation_plan.json").is_file()
    hub.shutdown()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert read_source(given).sha256 == online.sha256 and read_source(online.hub_name).path == online.path


def test_what_nnunet_v1_keeps_beside_a_checkpoint_comes_with_it(hub: ThreadingHTTPServer, exported: Path) -> None:
    (exported / "model.safetensors").unlink()
    shutil.copy(exported / "README.md", exported / "c.model.pkl")
    shutil.copy(exported / "README.md", exported / "c.model")
    path = download("hf:group/weights:c.model").path
    assert path.with_name("c.model.pkl").is_file()


def test_addresses_of_files_are_taken_and_several_checkpoints_are_listed(
    hub: ThreadingHTTPServer, exported: Path, checkpoint: Path
) -> None:
    (exported / "model.safetensors").unlink()
    for name in ("a.pth", "b.ckpt"):
        shutil.copy(checkpoint, exported / name)
    source = read_source("https://huggingface.co/group/weights/blob/main/b.ckpt?download=true")
    assert source.hub_name == f"hf:group/weights@{COMMIT}:b.ckpt"
    with pytest.raises(CheckpointError, match="several checkpoints.*hf:group/weights:a.pth, hf:group/weights:b.ckpt"):
        read_source("hf:group/weights")


def test_a_connection_that_breaks_is_no_traceback(
    hub: ThreadingHTTPServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(*_: object, **__: object) -> None:
        raise hub_errors.HTTPError("the peer closed the connection")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", breaks)
    with pytest.raises(SystemExit):
        inspect_main(["hf:group/weights"])
    assert "cannot be downloaded (the peer closed the connection). Check the name" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("https://example.org/weights.pth", "download the file and give its path"),
        ("hf:group/weights:other.pth", "has no other.pth"),
        ("hf:nobody/nothing", "cannot be downloaded"),
        ("hf:nonsense", "not the name of a repository"),
    ],
)
def test_what_the_hub_does_not_have(
    hub: ThreadingHTTPServer, name: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        inspect_main([name])
    assert message in capsys.readouterr().err

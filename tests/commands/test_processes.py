"""One job in several processes: the same training as in one, and an end with a reason when one of them dies."""

from __future__ import annotations

import csv
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest
from nnunet_dataset import NAME
from torch.multiprocessing.spawn import ProcessRaisedException

from nnunetv2_misfm.commands.launch import launch
from nnunetv2_misfm.commands.processes import Processes
from nnunetv2_misfm.errors import PlanError, UserError
from nnunetv2_misfm.trainers.distributed import check_batch_size

# PlainConvUNet: it has no BatchNorm, which processes on CPUs cannot share, and no dropout.
TASK = ["-d", "4", "-device", "cpu", "-network", "plan", "-batch_size", "2", "-num_epochs", "3"]
# SGD: Adam divides by the size of a gradient, so it would hide a wrong factor, and it magnifies rounding.
TASK += [
    "-num_iterations_per_epoch",
    "3",
    "-num_val_iterations_per_epoch",
    "2",
    "-optimizer",
    "sgd",
    "-initial_lr",
    "0.01",
]
ONE_MACHINE = ["--standalone", "--nproc_per_node", "2"]


def command(plans: str, torchrun: list[str] | None, *more: str) -> list[str]:
    start = [sys.executable] if torchrun is None else [sys.executable, "-m", "torch.distributed.run", *torchrun]
    return [*start, "-m", "nnunetv2_misfm.pretrain", *TASK, "-overwrite_plans_name", plans, *more]


def metrics(plans: str, *names: str) -> list[float]:
    folder = Path(os.environ["nnUNet_results"]) / NAME / f"VolumeFusionTrainer__{plans}__3d_fullres" / "fold_all"
    with open(folder / "metrics.csv", encoding="utf-8", newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file) for name in names]


def assert_same_training(plans: str, others: str) -> None:
    """To float precision; the Dice counts voxels, of which some are ties that rounding decides."""
    losses = metrics(plans, "train_loss", "val_loss")
    print(plans, losses, others, metrics(others, "train_loss", "val_loss"))
    assert len(losses) == 6
    assert losses == pytest.approx(metrics(others, "train_loss", "val_loss"), rel=2e-4)
    assert metrics(plans, "dice_0", "dice_1") == pytest.approx(metrics(others, "dice_0", "dice_1"), abs=2e-3)


def run(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(arguments, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
def test_two_processes_train_as_one_does(nnunet: Path) -> None:
    for plans, torchrun in (("One", None), ("Two", ONE_MACHINE)):
        done = run(command(plans, torchrun))
        assert done.returncode == 0, done.stderr[-2000:]
    assert_same_training("Two", "One")


@pytest.mark.parametrize(("batch_size", "processes", "fitting"), [(3, 2, 4), (4, 8, 8), (7, 3, 6)])
def test_a_batch_that_is_not_shared_evenly_is_refused(batch_size: int, processes: int, fitting: int) -> None:
    with pytest.raises(PlanError, match=f"{batch_size} samples cannot be shared .* -batch_size {fitting},"):
        check_batch_size(batch_size, processes)
    check_batch_size(fitting, processes)


def saves_when_it_has_finished_its_step(path: Path) -> None:
    time.sleep(1)
    path.touch()


def test_ctrl_c_waits_for_processes_that_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What follows looks at what they have saved, and may put an earlier run back in its place."""

    def interrupted(*arguments: object, **options: object) -> None:
        multiprocessing.Process(target=saves_when_it_has_finished_its_step, args=(tmp_path / "saved",)).start()
        multiprocessing.Process(target=time.sleep, args=(600,), daemon=True).start()  # a data worker, which never ends
        raise KeyboardInterrupt

    monkeypatch.setattr("nnunetv2.run.run_training.run_training", interrupted)
    with pytest.raises(KeyboardInterrupt):
        launch("VolumeFusionTrainer", NAME, "Plans", "3d_fullres", "cpu", 2, False)
    assert (tmp_path / "saved").exists()
    for worker in multiprocessing.active_children():
        worker.terminate()


@pytest.mark.parametrize(
    "error", [UserError("two files:\n  - a.b2nd\n  - b.b2nd\nPrepare: again."), ValueError("a: b")]
)
def test_all_that_a_process_says_of_its_end_is_told(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*arguments: object, **options: object) -> None:
        try:
            raise KeyError("before it")
        except KeyError:
            try:
                raise error
            except Exception:
                said = f"\n\n-- Process 1 terminated with the following error:\n{traceback.format_exc()}\n"
                raise ProcessRaisedException(said, 1, 1234) from None

    monkeypatch.setattr("nnunetv2.run.run_training.run_training", failing)
    with pytest.raises(UserError) as told:
        launch("VolumeFusionTrainer", NAME, "Plans", "3d_fullres", "cpu", 2, False)
    what = str(error) if isinstance(error, UserError) else "ValueError: a: b"
    assert str(told.value) == f"Process 1 of 2 failed: {what}"


@pytest.mark.slow
def test_when_a_process_is_killed_the_job_ends_and_says_so(nnunet: Path) -> None:
    arguments = command("Killed", ONE_MACHINE, "-num_epochs", "500")
    job = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    folder = Path(os.environ["nnUNet_results"]) / NAME / "VolumeFusionTrainer__Killed__3d_fullres" / "fold_all"
    until = time.monotonic() + 240
    while not (folder / "metrics.csv").exists() and time.monotonic() < until:
        time.sleep(0.5)
    assert (folder / "metrics.csv").exists(), "no epoch in four minutes"
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text(encoding="utf-8").split()
    os.kill(int(children[1]), signal.SIGKILL)
    output, _ = job.communicate(timeout=120)
    assert job.returncode != 0
    assert "exitcode  : -9" in output or "exitcode: -9" in output or "Another process of this job ended" in output


@pytest.mark.variants
@pytest.mark.skipif(shutil.which("ip") is None or not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs root")
def test_two_hosts_train_as_one_process_does(nnunet: Path) -> None:
    """Two network namespaces joined by a cable are two machines as far as torchrun can tell."""
    hosts = ("misfm_a", "misfm_b")
    setup = [f"netns add {host}" for host in hosts]
    setup += [f"link add cable_a netns {hosts[0]} type veth peer name cable_b netns {hosts[1]}"]
    for number, (host, end) in enumerate(zip(hosts, ("cable_a", "cable_b"), strict=True), start=1):
        setup += [f"-n {host} addr add 10.77.0.{number}/24 dev {end}", f"-n {host} link set {end} up"]
        setup += [f"-n {host} link set lo up"]
    try:
        for line in setup:
            if subprocess.run(["ip", *line.split()], capture_output=True).returncode != 0:
                pytest.skip(f"this system does not allow: ip {line}")
        assert run(command("OneHost", None)).returncode == 0
        os.environ["GLOO_SOCKET_IFNAME"] = "cable_a"
        jobs = []
        for rank, (host, end) in enumerate(zip(hosts, ("cable_a", "cable_b"), strict=True)):
            nodes = ["--nnodes", "2", "--node_rank", str(rank), "--nproc_per_node", "1", "--master_addr", "10.77.0.1"]
            environment = {**os.environ, "GLOO_SOCKET_IFNAME": end}
            arguments = ["ip", "netns", "exec", host, *command("TwoHosts", [*nodes, "--master_port", "29622"])]
            jobs.append(subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
        outputs = [job.communicate(timeout=600)[0].decode() for job in jobs]
        assert [job.returncode for job in jobs] == [0, 0], outputs
    finally:
        for host in hosts:
            subprocess.run(["ip", "netns", "del", host], capture_output=True)
    assert_same_training("TwoHosts", "OneHost")


def test_one_process_does_the_work_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "4")  # some clusters set it for jobs that torchrun did not start
    processes = Processes()
    assert not processes.several and processes.first_does(lambda: ["a", "b"]) == ["a", "b"]
    with processes.training("cpu"):
        pass


def test_the_others_hear_that_the_first_one_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    torch_distributed = pytest.importorskip("torch.distributed")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    first, second = Processes(), Processes()
    second.rank = 1
    first._store = second._store = torch_distributed.HashStore()

    def fails() -> None:
        raise UserError("no volumes")

    with pytest.raises(UserError, match="no volumes"):
        first.first_does(fails)
    with pytest.raises(UserError, match="could not prepare"):
        second.first_does(lambda: None)

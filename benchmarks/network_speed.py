"""PCT-Net here against the published implementation: time and peak memory of a training step and of inference.

    python benchmarks/network_speed.py --reference <checkout of openmedlab/MIS-FM>
    python benchmarks/network_speed.py --ablation

The checkout is imported from where it is; it needs einops and timm. Both networks have the same weights, input, dropout
and drop path, and all four outputs; that they compute the same is checked first. Each variant lives in a process of its
own, so that its memory can be told from the others'; the processes take turns, one step each, and ratios are taken
within a round. A training step is forward pass, cross entropy of the four outputs, backward pass and an Adam step.

With `--ablation` our network is compared with itself without one hand-written kernel at a time, which says what each is
worth; that needs no checkout.

Peak memory is what the device's allocator held on a GPU, and on a CPU the process' largest resident size, less what it
had before the network was built.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as multiprocessing
import torch.nn.functional as F
from provenance import device_name, provenance
from torch import Tensor, nn

from nnunetv2_misfm.architectures import PCTNet, kernels
from nnunetv2_misfm.architectures.resolution import strides_of
from nnunetv2_misfm.checkpoints.published_weights import convert_pctnet

RESULTS = Path(__file__).parent / "results"
FEATURES = (24, 48, 128, 256, 512)
NUM_CLASSES = 5
KINDS = ("inference", "training step")  # in this order: an optimiser's states are not there yet in the first

Table = dict[str, list[tuple[float, float]]]  # seconds and peak bytes of each round, by the variant's name


@dataclass(frozen=True)
class Variant:
    """One way to run the network."""

    name: str
    ours: bool
    amp: bool = False
    checkpointing: bool = False
    compiled: bool = False
    without: str = ""  # a kernel that is switched off


CPU_VARIANTS = (
    Variant("original", False),
    Variant("ours", True),
    Variant("ours, activation checkpointing", True, checkpointing=True),
)
CUDA_VARIANTS = (
    Variant("original", False),
    Variant("original, AMP", False, amp=True),
    Variant("ours", True),
    Variant("ours, AMP", True, amp=True),
    Variant("ours, AMP, compiled", True, amp=True, compiled=True),
    Variant("ours, AMP, activation checkpointing", True, amp=True, checkpointing=True),
)


def ablation_variants(device: str) -> tuple[Variant, ...]:
    """All kernels, then all but one."""
    amp = device == "cuda"
    without = (Variant(f"without {kernel}", True, amp, without=kernel) for kernel in kernels.KERNELS)
    return (Variant("all kernels", True, amp), *without)


@dataclass(frozen=True)
class Job:
    """What all variants are given."""

    reference: Path | None
    device: str
    batch_size: int
    patch_size: tuple[int, int, int]
    anisotropy: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reference", type=Path, help="checkout of openmedlab/MIS-FM")
    parser.add_argument("--ablation", action="store_true", help="what each hand-written kernel is worth")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--batch_size", type=int, help="default: 1 on a CPU, 2 on a GPU")
    parser.add_argument("--patch_size", type=int, nargs=3, default=(64, 128, 128))
    parser.add_argument("--anisotropy", type=int, default=1, help="degree of anisotropy (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds (default: %(default)s)")
    parser.add_argument("--variants", nargs="+", help="names of those to measure (default: all of the device)")
    parser.add_argument("--output", type=Path, help="where the table goes (default: results/NAME_DEVICE.md)")
    options = parser.parse_args()
    if not (options.ablation or options.reference):
        parser.error("--reference is needed to compare with the published implementation")
    batch_size = options.batch_size or (1 if options.device == "cpu" else 2)
    reference = None if options.ablation else options.reference.resolve()
    job = Job(reference, options.device, batch_size, tuple(options.patch_size), options.anisotropy)
    variants: tuple[Variant, ...] = CPU_VARIANTS if job.device == "cpu" else CUDA_VARIANTS
    if options.ablation:
        variants = ablation_variants(job.device)
    if options.variants:
        names = [variant.name for variant in variants]
        if unknown := set(options.variants) - set(names):
            parser.error(f"no variants of {job.device}: {', '.join(sorted(unknown))}; there are: {', '.join(names)}")
        variants = tuple(variant for variant in variants if variant.name in options.variants)

    error = 0.0 if options.ablation else largest_difference(job)
    print(f"Largest relative difference of an output: {error:.1e}", flush=True)
    if error > 1e-4:
        sys.exit("The two networks do not compute the same; there is nothing to compare.")
    tables = measure(job, variants, options.rounds)
    report = make_report(job, variants, tables, error, options.rounds)
    output = (
        options.output or RESULTS / f"{'network_ablation' if options.ablation else 'network_speed'}_{job.device}.md"
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(report, encoding="utf-8")
    print(report)


def build(job: Job, variant: Variant) -> nn.Module:
    """The variant's network; both implementations have the weights of the original drawn from one seed."""
    torch.manual_seed(0)
    if job.reference is None:
        return PCTNet(1, NUM_CLASSES, strides_of(job.anisotropy), FEATURES).to(job.device)
    original = original_network(job)
    if not variant.ours:
        return original.to(job.device)
    network = PCTNet(1, NUM_CLASSES, strides_of(job.anisotropy), FEATURES, checkpointing=variant.checkpointing)
    network.load_state_dict(convert_pctnet(original.state_dict(), [job.anisotropy]))
    return network.to(job.device)


def original_network(job: Job) -> nn.Module:
    if str(job.reference) not in sys.path:
        sys.path.insert(0, str(job.reference))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from net.pct_net import PCTNet as OriginalPCTNet
    parameters = {
        "in_chns": 1,
        "class_num": NUM_CLASSES,
        "input_size": list(job.patch_size),
        "feature_chns": list(FEATURES),
        "dropout": [0, 0, 0.2, 0.2, 0.2],
        "resolution_mode": job.anisotropy,
        "multiscale_pred": True,
    }
    network: nn.Module = OriginalPCTNet(parameters)
    return network


def largest_difference(job: Job) -> float:
    """Relative error of our outputs to the original's, the largest of the four, in float32."""
    image, _ = make_batch(job)
    with torch.no_grad(), torch.backends.cudnn.flags(allow_tf32=False):
        theirs, ours = (build(job, Variant("", ours)).eval()(image) for ours in (False, True))
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(ours, theirs, strict=True))


def make_batch(job: Job) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    size = (job.batch_size, 1, *job.patch_size)
    image = torch.randn(size, generator=generator)
    labels = torch.randint(NUM_CLASSES, size, generator=generator)
    return image.to(job.device), labels.to(job.device)


def measure(job: Job, variants: Sequence[Variant], rounds: int) -> dict[str, Table]:
    """Seconds and peak bytes of each kind of step, variant and round, after one round that does not count."""
    context = multiprocessing.get_context("spawn")
    pipes, processes = {}, []
    for variant in variants:
        pipes[variant.name], theirs = context.Pipe()
        processes.append(context.Process(target=serve, args=(theirs, job, variant), daemon=True))
        processes[-1].start()
    for pipe in pipes.values():
        pipe.recv()
    tables: dict[str, Table] = {}
    for kind in KINDS:
        tables[kind] = {variant.name: [] for variant in variants}
        for round_ in range(rounds + 1):
            for name, pipe in pipes.items():
                pipe.send(kind)
                result = pipe.recv()
                if round_:
                    tables[kind][name].append(result)
                print(f"{kind}, round {round_}, {name}: {result[0]:.3f} s, {result[1] / 2**30:.2f} GB", flush=True)
    for pipe in pipes.values():
        pipe.send("stop")
    for process in processes:
        process.join()
    return tables


def serve(pipe: Any, job: Job, variant: Variant) -> None:
    """What each process does: build, then run a step of the kind it is asked for."""
    torch.set_num_threads(torch.get_num_threads())  # starts the threads before memory is read off
    torch.backends.cudnn.benchmark = True  # as nnU-Net trains
    kernels.switched_off.update({variant.without} if variant.without else ())
    memory = CudaMemory() if job.device == "cuda" else ResidentMemory()
    network = build(job, variant)
    batch = make_batch(job)
    if variant.compiled:
        network.compile()
    steps = {"inference": inference(network, variant, batch), "training step": training_step(network, variant, batch)}
    pipe.send("ready")
    while (kind := pipe.recv()) in steps:
        memory.reset()
        start = time.perf_counter()
        steps[kind]()
        if job.device == "cuda":
            torch.cuda.synchronize()
        pipe.send((time.perf_counter() - start, memory.peak()))


def inference(network: nn.Module, variant: Variant, batch: tuple[Tensor, Tensor]) -> Callable[[], None]:
    image, _ = batch

    def step() -> None:
        network.eval()
        with torch.no_grad(), torch.autocast(image.device.type, torch.float16, enabled=variant.amp):
            network(image)

    return step


def training_step(network: nn.Module, variant: Variant, batch: tuple[Tensor, Tensor]) -> Callable[[], None]:
    image, labels = batch
    optimizer = torch.optim.Adam(network.parameters(), 1e-3, weight_decay=1e-5)
    scaler = torch.amp.GradScaler(image.device.type, enabled=variant.amp)

    def step() -> None:
        network.train()
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(image.device.type, torch.float16, enabled=variant.amp):
            loss = torch.zeros((), device=image.device)
            for output in network(image):
                scaled = F.interpolate(labels.float(), output.shape[2:], mode="nearest")[:, 0].long()
                loss = loss + F.cross_entropy(output, scaled)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    return step


class ResidentMemory:
    """The process' largest resident size since `reset`, less its size when this object was made (Linux)."""

    def __init__(self) -> None:
        self.before = self._read("VmRSS")

    def reset(self) -> None:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")

    def peak(self) -> float:
        return self._read("VmHWM") - self.before

    @staticmethod
    def _read(name: str) -> float:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return float(next(line.split()[1] for line in status.splitlines() if line.startswith(name))) * 1024


class CudaMemory:
    """The most bytes that PyTorch's allocator had handed out at once since `reset`."""

    def reset(self) -> None:
        torch.cuda.reset_peak_memory_stats()

    def peak(self) -> float:
        return float(torch.cuda.max_memory_allocated())


def make_report(
    job: Job,
    variants: Sequence[Variant],
    tables: Mapping[str, Table],
    error: float,
    rounds: int,
) -> str:
    originals = [variant.name for variant in variants if not variant.ours] or [variants[0].name]
    header = ["", "s", "GB", *(f"{what} / {name}" for name in originals for what in ("time", "memory"))]
    lines = []
    for kind, results in tables.items():
        lines += ["", f"## {kind.capitalize()}", "", f"| {' | '.join(header)} |", "| --- " * len(header) + "|"]
        for name, rows in results.items():
            cells = [name, f"{median(t for t, _ in rows):.3g}", f"{median(m for _, m in rows) / 2**30:.2f}"]
            for other in originals:
                for index in (0, 1):
                    ratios = [a[index] / b[index] for a, b in zip(rows, results[other], strict=True)]
                    cells.append(f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
            lines.append(f"| {' | '.join(cells)} |")
    kind = "CPU" if job.device == "cpu" else "GPU"
    threads = f", {torch.get_num_threads()} threads" if job.device == "cpu" else ""
    option, patch = "--reference MIS-FM" if job.reference else "--ablation", " ".join(map(str, job.patch_size))
    command = f"python benchmarks/network_speed.py {option} --patch_size {patch} --anisotropy {job.anisotropy}"
    command += f" --rounds {rounds}"
    title, agree = "time and memory without one hand-written kernel at a time", ""
    if job.reference:
        title = "time and memory against the published implementation"
        agree = f" The outputs of the two agree to {error:.0e} (relative)."
    packages = ("torch", "timm") if job.reference else ("torch",)
    checkouts = {"MIS-FM": job.reference} if job.reference else {}
    return "\n".join(
        [
            f"# PCT-Net on a {kind}: {title}",
            "",
            f"Features {'/'.join(map(str, FEATURES))}, patch {patch.replace(' ', 'x')}, batch {job.batch_size}, "
            f"degree of anisotropy {job.anisotropy}; float32 where AMP (float16) is not named. Medians of {rounds} "
            f"alternating rounds, ratios with their range.{agree}",
            *lines,
            "",
            *provenance(command, packages, checkouts, device_name(job.device) + threads),
            "",
        ]
    )


def median(values: Any) -> float:
    return statistics.median(values)


if __name__ == "__main__":
    main()

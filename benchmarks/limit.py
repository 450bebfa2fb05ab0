"""How far one training step is from the hardware: its operations, bytes, arithmetic, and its matrix products alone."""

import json
import math
import re
import statistics
import tempfile
from collections import Counter

from common import heading, in_turns, machine, options_of, step_times, times_table, torch, training_of, verdict
from torch.profiler import ProfilerActivity, profile, schedule
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

LIMIT_RATIO = 1.3  # step / own products, on a CPU at the paper's size
SQUARE = {"cpu": 1024, "cuda": 8192}  # rows of the product that measures the matrix rate

# Kind -> what an operator's or a GPU kernel's name contains; the first that fits counts.
KINDS = {
    "optimiser": r"adam|multi_tensor|vector_norm|foreach|optimizer",
    "matrix products": r"mm_?$|bmm|linear|matmul|gemm|gemv|splitk|cutlass|cublas|xmma|wgmma|nvjet|triton_tem",
    "random numbers": r"random|bernoulli|dropout|philox|distribution|uniform|normal_|native_rand",
    "softmax and norms": r"softmax|norm|triton_red|triton_per",
    "copies": r"copy|clone|contiguous|::to$|cat$|stack|fill_|zero_|memcpy|memset|catarray|fillfunctor",
    "other": r"empty|view|reshape|resize|strided|transpose|permute|expand|slice|select|split|chunk|unbind|squeeze|::t$"
    r"|detach|flatten|lift|alias|result_type|backward\d|evaluate_function|accumulategrad|profilerstep|nonzero|item$",
    "element-wise": r"aten::|elementwise|reduce|triton|index|gather|scatter|kernel",
}
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "addmm_", "baddbmm_")
NO_TRAFFIC = ("_unsafe_view", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")


def kind_of(name):
    "The kind of work a name stands for; a compiled kernel's name lists all it fuses, so only its type counts."
    name = name.lower()
    name = name[: len("triton_poi")] if name.startswith("triton_") else name
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name)), "other")


def size_of(values):
    "Bytes of tensors in memory; what is expanded counts once."
    tensors = [x for x in tree_leaves(values) if isinstance(x, torch.Tensor)]
    return sum(x.element_size() * math.prod(n if stride else min(n, 1) for n, stride in zip(x.shape, x.stride()))
               for x in tensors)  # fmt: skip


class Recorder(TorchDispatchMode):
    "Notes every operator that runs, those of the backward pass included."

    def __init__(self):
        super().__init__()
        self.operations, self.views, self.bytes, self.products, self.operands = 0, 0, 0, [], {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if func.is_view or name in NO_TRAFFIC:
            self.views += 1
            return result
        self.operations += 1
        self.bytes += size_of((args, kwargs, result))
        if name in PRODUCTS:
            self.products.append((func, *tree_map_only(torch.Tensor, self.operand, (args, kwargs))))
        return result

    def operand(self, x):
        "A tensor of noise that lies in memory as this one; one for all that lie so."
        key = x.shape, x.stride(), x.dtype
        if key not in self.operands:
            length = 1 + sum((n - 1) * stride for n, stride in zip(*key[:2]))
            self.operands[key] = torch.randn(length, device=x.device).to(x.dtype).as_strided(*key[:2])
        return self.operands[key]


def flops(product):
    "Multiplications and additions of a recorded product."
    a, b = [x for x in product[1] if isinstance(x, torch.Tensor)][-2:]
    return 2 * a.numel() * b.shape[-1]


def record(options):
    "What one step dispatches. A compiled model does not show its operators, so on a GPU this is the plain step."
    setup = training_of(options, "plain" if options.device == "cuda" else options.how)
    step_times(setup)
    with Recorder() as recorder:
        setup.step()
    return recorder


def replay_of(products, device):
    """A function that repeats all products; on a GPU it replays a graph and launches none of them on its own.

    Equal operands are one tensor. Caches are then as warm as in the step or warmer, so this is no excuse for the step.
    """

    @torch.no_grad()
    def run():
        for func, args, kwargs in products:
            func(*args, **kwargs)

    if device.type != "cuda":
        return run
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def profiled(setup):
    "The profiler's result for one step, and its seconds."
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (setup.device.type == "cuda")
    with profile(activities=activities, schedule=schedule(wait=0, warmup=1, active=1, repeat=1)) as prof:
        step_times(setup, 1)  # starting the profiler takes long, and memory and caches are cold after it
        prof.step()
        [[seconds], _] = step_times(setup, 1)
        prof.step()
    return prof, seconds


def kinds_on_cpu(prof, step):
    "Seconds by kind; `other` holds Python, dispatch, views and allocation."
    seconds = Counter()
    for event in prof.key_averages():
        seconds[kind_of(event.key)] += event.self_cpu_time_total / 1e6
    seconds["other"] += step - seconds.total()
    return seconds


def kinds_on_gpu(prof, step):
    "Seconds by kind of what the device did in one step; what it waited for is printed."
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        prof.export_chrome_trace(file.name)
        events = [e for e in json.load(file)["traceEvents"] if "dur" in e]  # times in microseconds
    calls = [e["name"] for e in events if e.get("cat") in ("cuda_runtime", "cuda_driver")]
    work = sorted((e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")), key=lambda e: e["ts"])
    seconds, copied, busy, end = Counter(), Counter(), 0.0, 0.0
    for event in work:
        seconds[kind_of(event["name"])] += event["dur"] / 1e6
        stop = event["ts"] + event["dur"]
        busy, end = busy + max(stop - max(event["ts"], end), 0.0) / 1e6, max(stop, end)
        if event["cat"] == "gpu_memcpy":
            direction = next((d for d in ("HtoD", "DtoH", "DtoD") if d in event["name"]), "other")
            copied.update({f"{direction} copies": 1, f"{direction} bytes": event.get("args", {}).get("bytes", 0)})
    # A wait for the whole device is the profiler's and this script's own.
    waits = sum(bool(re.search("(Stream|Event)Synchronize", name)) for name in calls)
    print(f"busy: {1e3 * busy:.2f} ms a step; idle: {100 * (1 - busy / step):.0f} % of a step")
    kernels, launches = sum(e["cat"] == "kernel" for e in work), sum("Launch" in name for name in calls)
    print(f"a step: {kernels} kernels, {launches} launches, {waits} waits of the host, copies: {dict(copied)}")
    return seconds


def main(argv=None):
    options = options_of(__doc__, argv, size="paper", device="cpu", steps=10,
                         how=dict(default="fast", choices=("fast", "plain")),
                         precision=dict(default="32-true", choices=("32-true", "bf16-mixed")))  # fmt: skip
    cpu, n = options.device == "cpu", SQUARE[options.device]
    print(machine(options.device, precision=options.precision, steps=options.steps))
    print(f"{heading(options.size)}; {options.how}\n")
    recorder, setup = record(options), training_of(options, options.how)
    kind = torch.bfloat16 if "bf16" in options.precision else torch.float32
    a, b = torch.randn(2, n, n, device=setup.device, dtype=kind)
    step_times(setup)
    work = {"step": setup.step, "products": replay_of(recorder.products, setup.device), "square": lambda: a @ b}
    times = in_turns(options.steps, setup.device, work)
    step, rate = statistics.median(times["step"]), 2 * n**3 / statistics.median(times.pop("square"))
    flop, of = sum(map(flops, recorder.products)), "" if cpu else " (of the plain step)"
    print(f"dispatched a step: {recorder.operations} operations and {recorder.views} views{of}")
    print(f"bytes moved: {recorder.bytes / 1e6:.0f} MB a step (inputs and outputs of every operation)")
    print(f"matrix products: {len(recorder.products)}, {flop / 1e9:.2f} GFLOP")
    print(f"matrix rate: {rate / 1e9:.1f} GFLOP/s (a square product of {n} rows)\n")
    prof, seconds = profiled(setup)
    kinds = kinds_on_cpu(prof, seconds) if cpu else kinds_on_gpu(prof, step)
    for name, value in kinds.most_common():
        print(f"{name:<22}{1e3 * value:>9.2f} ms{100 * value / kinds.total():>8.1f}%")
    ratio = statistics.median(whole / part for whole, part in zip(*times.values()))
    aim = f"; aim: at most {LIMIT_RATIO}: {verdict(ratio, LIMIT_RATIO)}" if cpu and options.size == "paper" else ""
    print(f"\n{times_table(times)}\nshare of the arithmetic limit: {100 * flop / rate / step:.0f} %")
    print(f"step / its own products: {ratio:.2f}{aim}")


if __name__ == "__main__":
    main()

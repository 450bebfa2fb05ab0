"""How far one training step is from the hardware: its operations, bytes, arithmetic, and its matrix products alone."""

import json
import re
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from common import heading, in_turns, machine, options_of, times_table, torch, training_of, verdict, waiter, watch
from torch.profiler import ProfilerActivity, profile, schedule
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

LIMIT_RATIO = 1.3  # step / own products, on a CPU at the paper's size
WARM_UP = 3  # steps
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
NOT_READ = ("copy_", "fill_", "zero_", "random_", "bernoulli_", "uniform_", "normal_")
NO_TRAFFIC = ("_unsafe_view", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")


def kind_of(name):
    "The kind of work a name stands for; a compiled kernel's name lists all it fuses, so only its type counts."
    name = name.lower()
    name = name[: len("triton_poi")] if name.startswith("triton_") else name
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name)), "other")


def tensors(*values):
    return [x for x in tree_leaves(values) if isinstance(x, torch.Tensor)]


def size_of(x):
    "Bytes of a tensor in memory; what is expanded counts once."
    count = 1
    for length, stride in zip(x.shape, x.stride()):
        count *= length if stride else min(length, 1)
    return count * x.element_size()


def traffic(func, args, kwargs, result):
    "Bytes an operator reads and writes, if it reads every input and writes every output once."
    name = func.overloadpacket.__name__
    read, written = 0, 0
    for i, argument in enumerate(func._schema.arguments):
        value = args[i] if i < len(args) else kwargs.get(argument.name)
        size = sum(map(size_of, tensors(value)))
        changed = argument.alias_info is not None and argument.alias_info.is_write
        written += size if changed else 0
        read += 0 if changed and (argument.is_out or name in NOT_READ) else size
    return read + (written or sum(map(size_of, tensors(result))))


class Recorder(TorchDispatchMode):
    "Notes every operator that runs, those of the backward pass included."

    def __init__(self):
        super().__init__()
        self.counts, self.views, self.bytes, self.products = Counter(), 0, 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if func.is_view or name in NO_TRAFFIC:
            self.views += 1
            return result
        self.counts[name] += 1
        self.bytes += traffic(func, args, kwargs, result)
        if name in PRODUCTS:
            self.products.append((func, [*map(operand, args)], {key: operand(x) for key, x in kwargs.items()}))
        return result


class Operand(NamedTuple):
    "How a tensor lies in memory."

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def make(self):
        "A tensor of noise that lies in memory as the recorded one did."
        length = 1 + sum((n - 1) * stride for n, stride in zip(self.shape, self.stride))
        return torch.randn(length, device=self.device).to(self.dtype).as_strided(self.shape, self.stride)


def operand(x):
    "A tensor's operand; anything else as it is."
    return Operand(x.shape, x.stride(), x.dtype, x.device) if isinstance(x, torch.Tensor) else x


def flops(product):
    "Multiplications and additions of a recorded product."
    a, b = [x for x in product[1] if isinstance(x, Operand)][-2:]
    return 2 * a.shape.numel() * b.shape[-1]


def record(options):
    "What one step dispatches. A compiled model does not show its operators, so on a GPU this is the plain step."
    how = "plain" if options.device == "cuda" else options.how
    setup = training_of(options.size, how, options.device, options.precision)
    for _ in range(WARM_UP):
        setup.step()
    recorder = Recorder()
    seen = watch(setup, lambda: len(recorder.products))
    with recorder:
        setup.step()
    if seen["backward"] == seen["losses"]:
        raise RuntimeError("no matrix product was seen in the backward pass; what is counted here would be wrong")
    return recorder, seen["losses"]


def replay_of(products, device):
    """A function that repeats all products; on a GPU it replays a graph and launches none of them on its own.

    Equal operands are one tensor. Caches are then as warm as in the step or warmer, so this is no excuse for the step.
    """
    made = {}

    def make(x):
        if not isinstance(x, Operand):
            return x
        if x not in made:
            made[x] = x.make()
        return made[x]

    calls = [(func, [*map(make, args)], {key: make(x) for key, x in kwargs.items()}) for func, args, kwargs in products]

    @torch.no_grad()
    def run():
        for func, args, kwargs in calls:
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


def square_product(device, precision):
    "A large square product in the precision of the step, and its multiplications and additions."
    rows = SQUARE[device.type]
    a, b = torch.randn(2, rows, rows, device=device, dtype=torch.bfloat16 if "bf16" in precision else None)
    return (lambda: a @ b), 2 * rows**3


def profiled(setup, repeats):
    "The profiler's result for one step, and its seconds: of several profiled steps the one of median time."
    wait = waiter(setup.device)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (setup.device.type == "cuda")
    found = []
    for _ in range(repeats):
        with profile(activities=activities, schedule=schedule(wait=0, warmup=1, active=1, repeat=1)) as prof:
            setup.step()  # starting the profiler takes long, and memory and caches are cold after it
            wait()
            prof.step()
            start = time.perf_counter()
            setup.step()
            wait()
            found.append((time.perf_counter() - start, prof))
            prof.step()
    seconds, prof = sorted(found, key=lambda x: x[0])[repeats // 2]
    return prof, seconds


def kinds_on_cpu(prof, step):
    "Seconds by kind; `other` holds Python, dispatch, views and allocation."
    seconds = Counter(dict.fromkeys(KINDS, 0.0))
    for event in prof.key_averages():
        seconds[kind_of(event.key)] += event.self_cpu_time_total / 1e6
    seconds["other"] = step - sum(v for kind, v in seconds.items() if kind != "other")
    return {"kinds": dict(seconds)}


def trace_events(prof):
    "The profiler's trace as a list of events (Chrome's format: category, name, start and duration in microseconds)."
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        prof.export_chrome_trace(str(path))
        return json.loads(path.read_text())["traceEvents"]


def busy_time(events):
    "Seconds in which at least one of the events ran."
    total, end = 0.0, 0.0
    for start, stop in sorted((e["ts"], e["ts"] + e["dur"]) for e in events):
        total += max(stop - max(start, end), 0.0)
        end = max(end, stop)
    return total / 1e6


def kinds_on_gpu(events):
    "What the device did in one step, from its trace."
    categories = ("kernel", "gpu_memcpy", "gpu_memset")
    by = {name: [e for e in events if e.get("cat") == name and "dur" in e] for name in categories}
    calls = Counter(e["name"] for e in events if e.get("cat") in ("cuda_runtime", "cuda_driver"))
    work, seconds, copied = sum(by.values(), []), Counter(dict.fromkeys(KINDS, 0.0)), Counter()
    for event in work:
        seconds[kind_of(event["name"])] += event["dur"] / 1e6
    for event in by["gpu_memcpy"]:
        direction = next((d for d in ("HtoD", "DtoH", "DtoD") if d in event["name"]), "other")
        copied[f"{direction} copies"] += 1
        copied[f"{direction} bytes"] += event.get("args", {}).get("bytes", 0)
    return {
        "kinds": dict(seconds),
        "busy": busy_time(work),
        "kernels": len(by["kernel"]),
        "launches": sum(n for name, n in calls.items() if "Launch" in name),
        # A wait for the whole device is the profiler's and this script's own.
        "waits": sum(n for name, n in calls.items() if re.search("(Stream|Event)Synchronize", name)),
        "copies": dict(copied),
    }


def measure(options):
    "Everything that is printed, as a dictionary; times in seconds."
    recorder, forward = record(options)
    setup = training_of(options.size, options.how, options.device, options.precision)
    square, square_flops = square_product(setup.device, options.precision)
    for _ in range(WARM_UP):
        setup.step()
    work = {"step": setup.step, "products alone": replay_of(recorder.products, setup.device), "square": square}
    times = in_turns(options.steps, setup.device, work)
    prof, seconds = profiled(setup, min(options.steps, 5))
    kinds = kinds_on_gpu(trace_events(prof)) if setup.device.type == "cuda" else kinds_on_cpu(prof, seconds)
    operations, rate = sum(map(flops, recorder.products)), square_flops / statistics.median(times.pop("square"))
    return kinds | {
        "times": times,
        "operations": sum(recorder.counts.values()),
        "views": recorder.views,
        "common": recorder.counts.most_common(8),
        "bytes": recorder.bytes,
        "product_count": len(recorder.products),
        "forward_products": forward,
        "flops": operations,
        "forward_flops": sum(map(flops, recorder.products[:forward])),
        "rate": rate,
        "ratio": statistics.median(a / b for a, b in zip(*times.values())),
        "arithmetic_share": operations / rate / statistics.median(times["step"]),
    }


def show(found, options):
    "The result as text."
    cpu, step = options.device == "cpu", statistics.median(found["times"]["step"])
    of = "" if cpu else " (of the plain step)"
    lines = [
        f"dispatched a step: {found['operations']} operations and {found['views']} views{of}",
        f"  most frequent: {', '.join(f'{name} {count}' for name, count in found['common'])}",
        f"bytes moved: {found['bytes'] / 1e6:.0f} MB a step (inputs and outputs of every operation)",
        f"matrix products: {found['product_count']}, {found['flops'] / 1e9:.2f} GFLOP; before the backward pass "
        f"{found['forward_products']}, {found['forward_flops'] / 1e9:.2f} GFLOP",
        f"matrix rate: {found['rate'] / 1e9:.1f} GFLOP/s (a square product of {SQUARE[options.device]} rows)\n",
        *show_kinds(found, step), "", times_table(found["times"]),
        f"share of the arithmetic limit (FLOP / matrix rate / step): {100 * found['arithmetic_share']:.0f} %",
    ]  # fmt: skip
    line = f"step / own products: {found['ratio']:.2f}"
    if cpu and options.size == "paper":
        line += f"; aim: at most {LIMIT_RATIO}: {verdict(found['ratio'], LIMIT_RATIO)}"
    return "\n".join([*lines, line])


def show_kinds(found, step):
    "Time by kind as text, and on a GPU what it waited for."
    whole = sum(found["kinds"].values())
    kinds = sorted(found["kinds"].items(), key=lambda x: -x[1])
    lines = [f"{kind:<22}{1e3 * seconds:>9.2f} ms{100 * seconds / whole:>8.1f}%" for kind, seconds in kinds]
    if "busy" not in found:
        return lines
    copies = ", ".join(f"{name} {value:,}" for name, value in sorted(found["copies"].items()))
    return [
        *lines,
        f"busy: {1e3 * found['busy']:.2f} ms a step; idle: {100 * (1 - found['busy'] / step):.0f} % of a step",
        f"a step: {found['kernels']} kernels, {found['launches']} launches, {found['waits']} waits of the host, "
        f"{copies or 'no copies'}",
    ]


def main(argv=None):
    options = options_of(__doc__, argv, size="paper", device=dict(choices=("cpu", "cuda")), threads=1, steps=10,
                         json=None, how=dict(default="fast", choices=("fast", "plain")),
                         precision=dict(default="32-true", choices=("32-true", "bf16-mixed")))  # fmt: skip
    found = measure(options)
    if options.json:
        return print(json.dumps(found))
    print(machine(options.device, threads=options.threads, precision=options.precision, steps=options.steps))
    print(f"{heading(options.size)}; {options.how}\n\n{show(found, options)}")


if __name__ == "__main__":
    main()

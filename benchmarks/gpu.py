"""A GPU in one command: is it right, how fast is it, and Table 3 at the paper's size, in ten minutes.

Every part writes its file into the folder `--out` when it is done, and is not computed again by the same code on the
same device. So the script may be stopped, and started again to go on. The table itself goes to `--results`.
"""

import contextlib
import importlib
import io
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
from common import SIZES, machine, options_of, torch, training, verdict

from selfdetr.data.files import find_data, write_whole
from selfdetr.designs import make_objective
from selfdetr.inference import top_scores
from selfdetr.study import source_hash

ROOT = Path(__file__).resolve().parent.parent
STEPS = 20
AIMS = {  # largest difference, relative to the largest value
    "outputs": 1e-4, "gradients": 1e-3, "compiled against plain": 1e-3, "bf16 against fp32": 5e-2,
    "detection without maps": 1e-4,
}  # fmt: skip
SCRIPTS = {  # part -> what is run, and the seconds that it may need
    "train_step": (["train_step.py"], 150),
    "limit": (["limit.py", "--precision", "bf16-mixed"], 90),
    "inference": (["inference.py", "--hours", "10"], 60),
    "several": (["several.py", "--processes", "4", "--size", "paper"], 90),
}
UNFINISHED = "unfinished"  # said in the file of a part that a second call is to continue
SEEDS, RUN_AIM, TABLE_AIM = 5, 90, 600  # of Table 3; seconds of a run, and of all of them


def difference(found, expected):
    "The largest difference, relative to the largest value."
    return float((found.detach().cpu() - expected.detach().cpu()).abs().max() / expected.detach().abs().max().cpu())


def totals(size, device, how, precision="32-true"):
    "The total loss of some steps without dropout."
    size = size._replace(model=replace(size.model, dropout=0.0), train=replace(size.train, precision=precision))
    setup, values = training(size, device, how), []
    for _ in range(STEPS):
        values.append(setup.step())
    if device == "cuda":
        torch.cuda.synchronize()
    return torch.tensor([each.read()["total"] for each in values])


def one_pass(size, device):
    "Outputs, and the gradients of the total loss: matching, detection and feedback."
    setup = training(size._replace(model=replace(size.model, dropout=0.0)), device, "plain")
    output, objective = setup.model(setup.batch.features, None), make_objective(setup.model)
    names = ("logits", "segments", "encoder_maps", "decoder_maps", "cross_maps")
    parts = {name: getattr(output, name) for name in names}
    objective.total(objective(setup.model, setup.batch)).backward()
    return parts, {name: p.grad for name, p in setup.model.named_parameters() if p.grad is not None}


def correctness(options, left):
    "CUDA against the CPU, compiled against plain, bf16 against fp32, and detection with maps against without."
    size, device = SIZES[options.size], options.device
    (outputs, gradients), (expected, right) = one_pass(size, device), one_pass(size, "cpu")
    largest = max(float(g.abs().max()) for g in right.values())
    found = {"outputs": max(difference(outputs[name], expected[name]) for name in expected)}
    found["gradients"] = max(float((gradients[n].cpu() - g).abs().max()) for n, g in right.items()) / largest
    plain = totals(size, device, "plain")
    found["compiled against plain"] = difference(totals(size, device, "fast"), plain)
    found["bf16 against fp32"] = difference(totals(size, device, "fast", "bf16-mixed"), plain)
    setup = training(size, device, "plain")
    with torch.no_grad():
        with_maps, without = (top_scores(setup.model.eval()(setup.batch.features, None, maps=maps), 50)[0]
                              for maps in (True, False))  # fmt: skip
    found["detection without maps"] = difference(without, with_maps)
    rows = {name: {"difference": f"{value:.1e}", "at most": f"{AIMS[name]:.0e}", "": verdict(value, AIMS[name])}
            for name, value in found.items()}  # fmt: skip
    return pd.DataFrame(rows).T.to_string()


def benchmark(name):
    "A part that runs one of the other scripts."
    command, needed = SCRIPTS[name]

    def part(options, left):
        if options.smoke:
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                importlib.import_module(name).main(["--smoke"])
            return printed.getvalue()
        run = [sys.executable, str(ROOT / "benchmarks" / command[0]), *command[1:], "--device", options.device]
        done = subprocess.run(run, capture_output=True, text=True, timeout=min(left, 1.5 * needed))
        if done.returncode:
            raise RuntimeError(done.stderr.strip().splitlines()[-1])
        return f"python benchmarks/{' '.join([*command, '--device', options.device])}\n{done.stdout}"

    return part


def place_of_table(options):
    "Profile and folder of Table 3."
    profile, out = ("smoke", options.out) if options.smoke else ("full", options.results)
    return profile, Path(out).resolve() / f"simulated-{profile}"


def reproduce(seeds, options, left):
    "Table 3 with so many seeds; what the cache holds is not computed again. Returns the seconds of every run."
    import papermill

    from selfdetr.study import runs

    profile, folder = place_of_table(options)
    home, workers = (Path(options.out), 1) if options.smoke else (ROOT, options.workers)
    folder.mkdir(parents=True, exist_ok=True)
    papermill.execute_notebook(
        ROOT / "nbs" / "reproduce_table3.ipynb", folder / "table3.ipynb", cwd=home, progress_bar=False,
        execution_timeout=max(int(left), 1),
        parameters={"profile": profile, "seeds": seeds, "device": options.device, "workers": workers,
                    "out_dir": str(folder.parent)},
    )  # fmt: skip
    done = runs(home / "runs")
    return done[(done.profile == profile) & (done.dataset == "simulated") & done["current code"].eq(True)].seconds


def table3(options, left):
    "As many seeds as the time allows, four rows each."
    from nbclient.exceptions import CellTimeoutError

    begun, lines, seeds, last, wanted = time.monotonic(), [], 0, 0.0, 1 if options.smoke else SEEDS
    lines += [] if options.smoke or find_data("thumos14") else ["the THUMOS14 annotations are not here: other lengths"]
    saved = place_of_table(options)[1] / "table3.json"
    before = saved.read_bytes() if saved.is_file() else None
    saved.unlink(missing_ok=True)  # of more seeds than the first round has; its runs stay
    try:
        while seeds < wanted and (spent := time.monotonic() - begun) + 1.2 * last < left:
            seconds = reproduce(seeds + 1, options, left - spent)
            seeds, last = seeds + 1, time.monotonic() - begun - spent
            lines.append(f"{seeds} seeds: {spent + last:.0f} s in all, a run {seconds.median():.0f} s")
            print(lines[-1], flush=True)
    except CellTimeoutError:
        pass
    finally:
        if before and not seeds:
            write_whole(saved, before)
    if not seeds:
        return "\n".join([*lines, f"{UNFINISHED}: 0 of {wanted} seeds"])
    whole = seconds.sum() / options.workers  # of the runs that an earlier call has computed, too
    lines.append(f"a run {verdict(seconds.median(), RUN_AIM)} its aim of {RUN_AIM} s")
    lines += [f"all runs {verdict(whole, TABLE_AIM)} their aim of {TABLE_AIM} s"] if seeds == SEEDS else []
    lines += [f"{UNFINISHED}: {seeds} of {wanted} seeds"] if seeds < wanted else []
    return "\n".join(lines)


PARTS = {"correctness": (correctness, 90)} | {name: (benchmark(name), SCRIPTS[name][1]) for name in SCRIPTS}
PARTS |= {"table3": (table3, 120)}


def compute(name, options, deadline):
    "One part, unless its file is there or too little time is left; a failure is written down, and the next begins."
    part, least = PARTS[name]
    path, left = Path(options.out) / f"{name}.txt", deadline - time.monotonic()
    head = f"{machine(options.device)}, code {source_hash()}"
    before = path.read_text() if path.is_file() else ""
    if before.startswith(f"{head}\n") and UNFINISHED not in before:
        return f"{name}: is there already"
    if left < least:
        return f"{name}: left out, needs {least} s and {max(left, 0):.0f} s are left"
    started = time.monotonic()
    try:
        text = part(options, left)
    except Exception as error:
        write_whole(path, f"{head}, FAILED\n{error!r}\n")
        return f"{name}: FAILED, {error!r}"
    write_whole(path, f"{head}\n{text}\n")
    return f"{name}: {time.monotonic() - started:.0f} s\n{text}"


def main(argv=None):
    options = options_of(__doc__, argv, size="paper", device="cuda",
                         minutes=dict(type=float, default=9.5, help="when to stop, default: %(default)s"),
                         workers=dict(type=int, default=4, help="runs at a time, default: %(default)s"),
                         out=dict(default="gpu", help="folder of the files, default: %(default)s"),
                         results=dict(default=str(ROOT / "results"), help="folder of the table"))  # fmt: skip
    deadline = time.monotonic() + 60 * options.minutes
    Path(options.out).mkdir(parents=True, exist_ok=True)
    for name in PARTS:
        print(f"\n{compute(name, options, deadline)}", flush=True)


if __name__ == "__main__":
    main()

"""Kill training runs and studies with SIGKILL, and see that nothing is lost, half-written or computed twice at once.

    python tests/kill_runs.py --kills 60 --seed 0

Every run is started again until it ends; then metrics, history (without seconds) and files have to be, byte for byte,
those of a run that was not disturbed. Processes are forked from one that has imported everything, so that a kill costs
a fraction of a second. Ends with status 1 when anything is violated, and says what.
"""

import argparse
import contextlib
import fcntl
import functools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402

from selfdetr import study  # noqa: E402
from selfdetr.study import cache, compute  # noqa: E402
from selfdetr.data import load_dataset  # noqa: E402
from selfdetr.simulate import SimulatorConfig, make_dataset  # noqa: E402

SMALL = {"model.dim": 16, "model.heads": 2, "model.norm_groups": 2, "model.hidden": 16, "model.queries": 6,
         "train.epochs": 4, "train.batch": 3}  # fmt: skip
FINAL = {*cache.FILES, "metrics.json"}


class Violation(Exception):
    "Something that must not happen, did."


def require(condition, text):
    if not condition:
        raise Violation(text)


# ---- processes


def fork(function, *args):
    "Run a function in a process of its own, with whatever it starts; its error goes to stderr, its status is then 1."
    pid = os.fork()
    if pid:
        return pid
    try:
        os.setpgid(0, 0)
        function(*args)
        status = 0
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stderr.flush()
    os._exit(status)


def ended(pid, seconds):
    "Wait for a process, at most so long; its status (negative: the signal), None when it still runs."
    deadline = time.monotonic() + seconds
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= deadline:
            return None
        time.sleep(0.002)


def kill(pid):
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    return ended(pid, 30)


# ---- what happens in a process that will be killed


def note(path, text):
    "A line more in a file, whole even where several processes write."
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(handle, f"{text}\n".encode())
    os.close(handle)


def witnessed(root, function):
    "The function, noting that it ends, and noting a violation when another process is inside for the same run."

    def call(spec, *args):
        name = compute.run_hash(spec, "")
        with open(root / f"{name}.witness", "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # released by the system when the process dies
            except OSError:
                note(root / "violations", f"training of {name} by two processes at once")
            result = function(spec, *args)
            note(root / "ended", name)
        return result

    return call


class KillPoint:
    "Kills this process before the given one of the calls that bring files to the disk, or in the middle of a file."

    def __init__(self, point, rng):
        self.left, self.rng = point, rng
        for place, name in ((os, "fsync"), (os, "replace"), (os, "unlink"), (os, "rmdir")):
            setattr(place, name, self.around(name, getattr(place, name)))

    def around(self, name, function):
        def call(*args, **options):
            self.left -= 1
            if self.left < 0:
                if name == "fsync" and os.fstat(args[0]).st_size and self.rng.random() < 0.5:
                    with contextlib.suppress(OSError):  # a folder
                        os.ftruncate(args[0], self.rng.randrange(os.fstat(args[0]).st_size))
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **options)

        return call


def compute_all(world, specs, runs_root, point=None, seed=0, workers=1):
    "What a user's process does: some runs, with the state kept after every epoch."
    if point is not None:
        KillPoint(point, random.Random(seed))
    cache.State = functools.partial(cache.State, save_seconds=0)
    cache.compute_run = witnessed(world.log, cache.compute_run)
    study.run_all(specs, world.data, "", runs_root, "cpu", workers, progress=False)


# ---- the checks


def same_runs(ours, theirs):
    "The same bits: metrics and history but for seconds, and all files."
    timeless = [{k: v for k, v in run.metrics.items() if not k.startswith("seconds")} for run in (ours, theirs)]
    require(timeless[0] == timeless[1], f"{ours.folder}: other metrics than the undisturbed run")
    histories = [run.history.drop(columns="seconds") for run in (ours, theirs)]
    require(histories[0].equals(histories[1]), f"{ours.folder}: another history")
    for name in {*cache.FILES} - {"history.csv"}:
        require(ours.file(name).read_bytes() == theirs.file(name).read_bytes(), f"{ours.folder / name}: other bytes")


class World:
    "Data, specs, and the undisturbed runs."

    def __init__(self, folder, rng, budget):
        self.folder, self.rng, self.budget = folder, rng, budget
        recipe = SimulatorConfig(train_videos=3, test_videos=2, classes=3, channels=8, video_seconds=45, bout_gap=6)
        self.where = (str(make_dataset(folder / "tiny", 5, recipe)), "smoke", str(folder))
        self.data = load_dataset(self.where[0])
        compute.training_hash(), compute.source_hash()  # kept, before processes are forked
        self.specs = [study.make_spec("tiny", "smoke", self.data, seed, SMALL) for seed in range(3)]
        self.kills, self.compared, self.log = {}, 0, self.new_folder("log")
        self.reference = self.new_folder("reference")
        status = ended(fork(compute_all, self, self.specs, self.reference), 250)
        require(status == 0, f"the undisturbed runs ended with status {status}")

    def new_folder(self, name):
        return Path(tempfile.mkdtemp(prefix=f"{name}-", dir=self.folder))

    def name(self, spec):
        return compute.run_hash(spec, self.data.hash())

    def killed(self, what):
        self.kills[what] = self.kills.get(what, 0) + 1
        self.budget -= 1

    def check(self, runs_root):
        "After every kill: what has a final name is whole, and no two processes were in the same run."
        for folder in runs_root.glob("[!.]*"):
            found = study.read_run(folder)
            for name in found.files:
                found.file(name)
            due = found.metrics["source"] != compute.source_hash()
            names = {path.name for path in folder.iterdir()}
            require(due or names == FINAL, f"{folder} holds {sorted(names ^ FINAL)}")
            require(due or set(found.files) == set(cache.FILES), f"{folder}: only {sorted(found.files)} are summed")
        for log in self.folder.glob("log-*"):
            if (log / "violations").exists():
                raise Violation((log / "violations").read_text())
            done = (log / "ended").read_text().splitlines() if (log / "ended").exists() else []
            require(len(done) == len(set(done)), f"computed to the end twice: {done}")

    def compare(self, runs_root, specs):
        "At the end: the bits of the undisturbed runs, and nothing left behind but the locks."
        self.check(runs_root)
        for spec in specs:
            same_runs(*(study.read_run(root / self.name(spec)) for root in (runs_root, self.reference)))
            self.compared += 1
        left = {p.name for p in runs_root.iterdir()} - {self.name(s) for s in specs}
        require(all(name.endswith(".lock") for name in left), f"{runs_root}: left behind {sorted(left)}")


def kill_until_done(world, what, runs_root, specs, kills, points=None, longest=0.3):
    "Start the runs again and again, killed at a random point of writing or, without `points`, at a random time."
    while True:
        spare = world.budget > 0 and kills > 0
        point = world.rng.randrange(points) if points and spare else None
        pid = fork(compute_all, world, specs, runs_root, point, world.rng.random())
        status = ended(pid, world.rng.uniform(0, longest) if spare and not points else 120)
        if status is None:
            status = kill(pid)
        world.check(runs_root)
        if status == 0:
            return
        require(status == -signal.SIGKILL, f"a process of {what} ended with status {status} and was not killed")
        world.killed(what)
        kills -= 1


def one_run(world, kills, what="in training", points=None):
    "One run, killed at random times, or at its next writes: before one, in the middle of the file, before its name."
    runs_root = world.new_folder("one")
    world.log = world.new_folder("log")
    kill_until_done(world, what, runs_root, world.specs[:1], kills, points)
    world.compare(runs_root, world.specs[:1])


def in_writing(world, kills):
    one_run(world, kills, "in writing", points=16)


def in_measuring_again(world, kills):
    "A finished run that other code has measured, at a random write while it is measured again."
    runs_root, name = world.new_folder("measuring"), world.name(world.specs[0])
    shutil.copytree(world.reference / name, runs_root / name)
    found = study.read_run(runs_root / name)
    (found.folder / "detections.json").write_text("those of the other code")
    files = found.files | {"detections.json": cache.file_sum(found.folder / "detections.json")}
    cache.seal(found.folder, found.metrics | {"average": 99.0, "source": "older"}, files)
    kill_until_done(world, "in measuring again", runs_root, world.specs[:1], kills, points=19)  # there are 19
    world.compare(runs_root, world.specs[:1])


def two_studies(world, kills):
    "Two studies on one cache at a time, in different orders; one or both of them are killed."
    runs_root = world.new_folder("studies")
    world.log = world.new_folder("log")
    orders = [world.specs, world.specs[::-1]]
    left: dict[int, int | None] = {0: None, 1: None}  # which -> its process
    while left:
        for which, pid in left.items():
            left[which] = pid or fork(compute_all, world, orders[which], runs_root)
        spare = world.budget > 0 and kills > 0
        time.sleep(world.rng.uniform(0, 0.5) if spare else 0.05)
        victims = {which for which in left if spare and world.rng.random() < 0.6}
        for which, pid in list(left.items()):
            status = ended(pid, 0)
            if status is None and which in victims:
                kill(pid)
                world.killed("in one of two studies")
                kills, left[which] = kills - 1, None
            elif status is not None:
                require(status == 0, f"a study ended with status {status} and was not killed")
                del left[which]
        world.check(runs_root)
    world.compare(runs_root, world.specs)


def workers_of(pid):
    "The worker processes of a study on Linux, which has them in /proc."
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            command = (path.parent / "cmdline").read_bytes()
            if int(path.read_text().rpartition(")")[2].split()[1]) == pid and b"popen_loky" in command:
                found.append(int(path.parent.name))
    return found


def study_of_workers(world, specs, runs_root, report):
    try:
        study.run_all(specs, world.data, "", runs_root, "cpu", 2, progress=False)
        report.write_text("no error")
    except RuntimeError as error:
        report.write_text(str(error))


def a_worker(world, kills):
    "A worker of a study is killed: the study names the unfinished runs and keeps the others; a second call goes on."
    runs_root, report = world.new_folder("workers"), world.folder / "report"
    done, name = world.specs[2], world.name(world.specs[2])
    shutil.copytree(world.reference / name, runs_root / name)
    specs = [study.override(spec, {"train.epochs": 100}) for spec in world.specs[:2]]
    pid = fork(study_of_workers, world, [done, *specs], runs_root, report)
    begun = [cache.work_folder(world.name(spec), runs_root) / "epochs" for spec in specs]
    while not any(path.exists() for path in begun):
        require(ended(pid, 0.01) is None, f"the study ended too early: {report.exists() and report.read_text()}")
    os.kill(world.rng.choice(workers_of(pid)), signal.SIGKILL)
    world.killed("of a study's worker")
    require(ended(pid, 120) == 0, "the study did not end by itself")
    text = report.read_text()
    require("2 of 3 runs failed" in text and "a worker process was killed" in text, text)
    require(all(world.name(spec) in text for spec in specs) and name not in text, text)
    world.check(runs_root)
    world.log = world.new_folder("log")
    require(ended(fork(compute_all, world, [done, *specs], runs_root), 120) == 0, "the second call failed")
    world.check(runs_root)
    require(len(study.runs(runs_root)) == 3, "a run is missing after the second call")


def process_of(folder, data, runs_root):
    "What torchrun starts twice: one run, the state kept after every epoch, the process's number left for the killer."
    (Path(folder) / f"process {os.environ['RANK']}").write_text(str(os.getpid()))
    cache.State = functools.partial(cache.State, save_seconds=0)
    dataset = load_dataset(data)
    spec = study.make_spec("tiny", "smoke", dataset, 0, SMALL | {"train.epochs": 30})
    study.run(spec, dataset, runs_root=runs_root, device="cpu", progress=False)


def in_two_processes(world, kills):
    "A run under torchrun: either of its processes is killed, the other ends, and a second start ends in the same bits."
    undisturbed, disturbed = (world.new_folder("together") for _ in range(2))
    for runs_root, victim in ((undisturbed, None), (disturbed, world.rng.randrange(2)), (disturbed, None)):
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__]
        process = subprocess.Popen([*start, "--process", str(world.folder), world.where[0], str(runs_root)],
                                   stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)  # fmt: skip
        if victim is not None:
            while not list(runs_root.glob(".*/state.pt")):
                require(process.poll() is None, "the run under torchrun ended before its first epoch")
                time.sleep(0.005)
            os.kill(int((world.folder / f"process {victim}").read_text()), signal.SIGKILL)
            world.killed(f"process {victim} of two")
        said = process.communicate(timeout=200)[1]
        require(bool(process.returncode) == (victim is not None), f"torchrun ended with {process.returncode}:\n{said}")
        found = list(runs_root.glob("[!.]*"))
        require(len(found) == (victim is None), f"{runs_root} holds {found}")
    same_runs(*(study.read_run(next(root.glob("[!.]*"))) for root in (disturbed, undisturbed)))
    world.compared += 1


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=60, help="how often to kill")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--process", nargs=3, help=argparse.SUPPRESS)  # what torchrun starts
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    if options.process:
        process_of(*options.process)
        return 0
    started, rng = time.monotonic(), random.Random(options.seed)
    with tempfile.TemporaryDirectory(prefix="kills-") as folder:
        try:
            world = World(Path(folder).resolve(), rng, options.kills)
            rounds = [one_run, in_writing, two_studies, in_measuring_again]
            if options.kills >= 50 and Path("/proc/self/stat").exists():
                rounds.append(a_worker)  # it costs as much as all the others
            if options.kills >= 16:  # torchrun takes longer to start than all of the short form
                in_two_processes(world, 1)
            while world.budget > 0:
                for attack in rounds:
                    if world.budget > 0:
                        attack(world, kills=min(world.budget, max(3, options.kills // 10)))
        except (Violation, ValueError) as error:
            print(f"VIOLATED (seed {options.seed}): {error}", file=sys.stderr)
            return 1
    print(json.dumps({"kills": sum(world.kills.values()), **world.kills}))
    print(f"{world.compared} runs compared with undisturbed ones: all equal; {time.monotonic() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())

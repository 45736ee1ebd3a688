"""Console commands that are struck while they run: killed, ended, without room, input or permission, or not alone.

A process that has loaded the library once forks a child per command: a child is a whole process, with a signal, a
disk and permissions of its own, and starts in milliseconds. `python interrupted.py` is that process.
"""
import ctypes
import hashlib
import json
import os
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
import traceback
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

# --- the process that forks ------------------------------------------------------------------------------------------


def obey_permissions():
    "Make root a user like others: without CAP_DAC_OVERRIDE (1) and CAP_DAC_READ_SEARCH (2) it obeys a folder's bits"
    libc = ctypes.CDLL(None, use_errno=True)
    head, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    if libc.capget(head, sets): raise OSError(ctypes.get_errno(), "capget")
    for i in range(3): sets[i] &= ~0b110
    if libc.capset(head, sets): raise OSError(ctypes.get_errno(), "capset")


STEPS = "open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.chmod", "os.truncate"
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def count_steps(folder, stop):
    "Count what is done to files of a folder, and stand still before step `stop`; returns the count"
    count = [0]

    def step(event, args):
        names = [str(a) for a in args[:2] if isinstance(a, (str, os.PathLike))] if event in STEPS else []
        if not any(name.startswith(folder) for name in names): return
        if event == "open" and not args[2] & WRITES: return
        count[0] += 1
        if count[0] == stop: os.kill(os.getpid(), signal.SIGSTOP)
    sys.addaudithook(step)
    return count


def watch_network(said):
    "Note every attempt to reach another machine"
    def call(event, args):
        local = event == "socket.connect" and isinstance(args[1], str)   # a socket of this machine
        if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto") and not local:
            with open(f"{said}.network", "a") as f: print(event, args[1:], file=f)
            raise OSError("no network in this test")
    sys.addaudithook(call)


def become(command, said, poor, folder, stop):
    "Turn this process into a console command whose words go into a file"
    watch_network(said)
    steps = count_steps(folder, stop)
    out = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for fd in (1, 2): os.dup2(out, fd)
    if poor and os.geteuid() == 0: obey_permissions()
    sys.argv, code = command, 0
    try: runpy.run_path(str(Path(sys.executable).parent/command[0]), run_name="__main__")   # the console script itself
    except SystemExit as e:
        if isinstance(e.code, str): print(e.code, file=sys.stderr)
        code = 1 if isinstance(e.code, str) else e.code or 0
    except BaseException:
        traceback.print_exc()
        code = 70
    sys.stdout.flush(), sys.stderr.flush()
    Path(said).with_suffix(".steps").write_text(str(steps[0]))
    os._exit(code)


def load_all():
    "Load what commands need, so that children have it"
    import importlib
    import pkgutil

    import mix_geneformer
    for m in pkgutil.walk_packages(mix_geneformer.__path__, "mix_geneformer."):
        if ".paper" not in m.name: importlib.import_module(m.name)
    from transformers import BertForMaskedLM  # noqa: F401 (loaded when first asked for)


def serve():
    "Fork a child per line that says what it is to be; say its number, and its end where that is asked for"
    load_all()
    print("ready", flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        if "wait" in asked: said = os.waitpid(asked["wait"], (os.WNOHANG if asked["now"] else 0) | os.WUNTRACED)
        else:
            pid = os.fork()
            if pid == 0: become(**asked)
            said = [pid, 0]
        print(json.dumps(said), flush=True)


class Commands:
    "Starts console commands"
    def __init__(self):
        env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        env.pop("HF_HUB_OFFLINE", None)   # that nothing is sent is up to the library, not to who calls it
        self.server = subprocess.Popen([sys.executable, __file__], stdin=-1, stdout=-1, text=True, env=env)
        # -1: a pipe
        assert self.server.stdout.readline() == "ready\n"

    def ask(self, **what):
        self.server.stdin.write(json.dumps(what) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def start(self, command, said, **how): return Running(self, command, said, **how)

    def close(self):
        self.server.stdin.close()
        self.server.wait()


# what HDF5 says by itself where a disk is full, before the sentence
NOISE = re.compile(
    r"(Exception ignored in[^\n]*\n)?Traceback[^\n]*\n(  File .h5py/[^\n]*\n)+RuntimeError: .*?offset = \d+\)\n",
    re.DOTALL)


class Running:
    "A command that runs"
    def __init__(self, commands, command, said, poor=False, folder="/nowhere", stop=0):
        self.commands, self.said, self.begun = commands, Path(said), time.monotonic()
        self.code, self.stands = None, False
        how = dict(poor=poor, folder=str(folder), stop=stop)
        self.pid, _ = commands.ask(command=list(map(str, command)), said=str(said), **how)

    def look(self, now=True):
        "Whether it has ended, or stands still before a step"
        if self.code is not None or self.stands: return True
        pid, status = self.commands.ask(wait=self.pid, now=now)
        self.stands = bool(pid) and os.WIFSTOPPED(status)
        if pid and not self.stands: self.code = os.waitstatus_to_exitcode(status)
        return bool(pid)

    def go_on(self):
        if self.stands: os.kill(self.pid, signal.SIGCONT)
        self.stands = False

    def wait(self):
        "Wait for its end"
        self.go_on()
        self.look(now=False)
        asked = self.said.with_name(f"{self.said.name}.network")
        assert not asked.exists(), f"the network was asked for: {asked.read_text()}"
        return self

    @property
    def steps(self): return int(self.said.with_suffix(".steps").read_text())

    def is_told(self, command):
        "Whether it ended well, or in one sentence"
        if self.code == 0: return True
        said = NOISE.sub("", self.said.read_text())
        return self.code == 1 and "Traceback" not in said and f"{command}: " in said


# --- what is there ---------------------------------------------------------------------------------------------------

def of_hdf5(path):
    "All that an HDF5 file holds; its bytes may differ where what it holds does not"
    import h5py
    found = {}

    def look(name, item):
        value = item[()] if isinstance(item, h5py.Dataset) else b""
        value = value.tolist() if getattr(value, "dtype", None) is not None and value.dtype.hasobject else value
        value = value.tobytes() if hasattr(value, "tobytes") else value
        found[name] = repr((value, sorted(map(str, item.attrs.items()))))
    with h5py.File(path) as f: f.visititems(look)
    return found


def content(path):
    "What a file holds, without how fast it came to be"
    if path.suffix == ".h5ad": data = json.dumps(of_hdf5(path), sort_keys=True).encode()
    elif path.name == "training.json": data = json.dumps({**json.loads(path.read_text()), "speed": 0}).encode()
    else: data = path.read_bytes()
    return hashlib.sha256(data).hexdigest()


UNSEEN = "watched"   # tables that tell how fast a run was


def contents(path):
    "File -> what it holds, of a file or a folder; empty where there is none"
    path = Path(path)
    if path.is_file(): return {path.name: content(path)}
    files = (p for p in sorted(path.rglob("*")) if p.is_file() and UNSEEN not in p.relative_to(path).parts)
    return {str(p.relative_to(path)): content(p) for p in files}


def size_of(folder): return sum(p.stat().st_size for p in Path(folder).rglob("*") if p.is_file())


# --- verbs -----------------------------------------------------------------------------------------------------------

@dataclass
class Verb:
    "A command, what it reads and what it makes"
    command:list       # without its output; "OUT" stands for the folder of the outputs
    makes:list         # outputs, in that folder
    reads:list         # what may vanish
    result:str=""      # of a folder that a run fills step by step: the file that makes it whole
    room:float=1.      # how often its outputs' size it needs on the way
    expected:dict=field(default_factory=dict) # output -> contents, of a run that nothing disturbed
    seconds:float=0.   # that it took
    steps:int=0        # that it did to files of its output's folder
    size:int=0         # bytes of its outputs

    @property
    def name(self): return self.command[0]

    def at(self, folder, *more): return [str(a).replace("OUT", str(folder)) for a in (*self.command, *more)]

    def left(self, folder):
        "What a run has left: absent, whole or resumable; anything else is the contents that should not be"
        found, kinds = {n: contents(folder/n) for n in self.makes}, []
        for name, there in found.items():
            if not there or there == self.expected[name]: kinds.append("whole" if there else "absent")
            elif self.result and self.result not in there: kinds.append("resumable")
            elif self.result and there[self.result] == self.expected[name][self.result]: kinds.append("whole")
            else: raise AssertionError(f"{name} is half: {sorted(there)}")
        return max(kinds) if len(set(kinds)) == 1 else "resumable"

    def run(self, commands, folder, **how):
        "Run it"
        folder.mkdir(parents=True, exist_ok=True)
        return commands.start(self.at(folder), folder.parent/f"{folder.name}.said", folder=folder, **how)

    def measure(self, commands, folder):
        "Run it undisturbed, twice: the first run's contents are what is expected, the second's time is the shorter"
        for again in (folder, folder.with_name(f"{folder.name}-again")):
            run = self.run(commands, again).wait()
            assert run.code == 0, run.said.read_text()
            self.seconds = time.monotonic()-run.begun
            found = {name: contents(again/name) for name in self.makes}
            assert self.expected in ({}, found), f"{self.name} gives another result when it is repeated"
            self.expected, self.steps = found, run.steps
        self.size = size_of(folder)
        return folder


# --- faults ----------------------------------------------------------------------------------------------------------

@dataclass
class Strike:
    "What a strike was, and what came of it"
    verb:str
    fault:str
    at:str            # when
    hit:bool          # whether the run had not ended by then
    ended:str         # by the signal, well, or in one sentence
    left:str          # absent, resumable, whole
    same:bool         # whether the same command, called again, gives what an undisturbed run does
    litter:list       # names beside the output in the end


def strike_by(number):
    "A fault by a signal"
    @contextmanager
    def fault(verb, folder, run, draw):
        if run.code is None: os.kill(run.pid, number)
        yield
    return fault


@contextmanager
def vanished(verb, folder, run, draw):
    "One of the inputs is moved away, until the run has ended"
    path = Path(draw.choice(verb.reads))
    aside = path.with_name(f"{path.name}.aside")
    path.rename(aside)
    try: yield
    finally: aside.rename(path)


@contextmanager
def closed(verb, folder, run, draw):
    "Nothing can be made or removed in the folder and those in it"
    folders = [folder, *(p for p in folder.rglob("*") if p.is_dir())]
    for f in folders: os.chmod(f, 0o555)
    try: yield
    finally:
        for f in folders:
            if f.is_dir(): os.chmod(f, 0o755)


@contextmanager
def twice(verb, folder, run, draw):
    "The same command once more, at the same output"
    second = run.commands.start(verb.at(folder), run.said.with_suffix(".second"))
    if run.stands: time.sleep(.2)   # the second comes as far as it can
    yield
    second.wait()
    assert second.is_told(verb.name), second.said.read_text()[-3000:]


FAULTS = {"kill -9": strike_by(signal.SIGKILL), "SIGTERM": strike_by(signal.SIGTERM), "vanished input": vanished,
          "no permission": closed, "two processes": twice}


def can_mount(folder):
    "Whether small disks can be made here"
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True)
    if done.returncode: return False
    subprocess.run(["umount", folder], check=True)
    return True


@contextmanager
def small_disk(folder, size):
    "A disk of so many bytes; yields a function that makes it larger"
    folder.mkdir(parents=True)

    def mount(*how): subprocess.run(["mount", "-t", "tmpfs", "-o", ",".join(how), "tmpfs", folder], check=True)
    mount(f"size={size}")
    try: yield lambda: mount("remount", "size=256m")
    finally: subprocess.run(["umount", "-l", folder], check=True)


def judge(verb, fault, commands, folder, run, at, hit):
    "What came of a strike: nothing half, and the same command gives the undisturbed result"
    killed = run.code in (-signal.SIGKILL, -signal.SIGTERM) and fault in ("kill -9", "SIGTERM")
    assert killed or run.is_told(verb.name), f"{fault} at {at}:\n{run.said.read_text()[-4000:]}"
    ended = "signal" if killed else "well" if run.code == 0 else "one sentence"
    left = verb.left(folder)
    assert run.code or left == "whole", f"{verb.name} ended well and left nothing whole"
    file = Path(verb.makes[0]).suffix
    again = commands.start(verb.at(folder, *["--overwrite"] * bool(file and left != "absent")), run.said).wait()
    assert again.code == 0, f"{fault} at {at}, left {left}, again:\n{again.said.read_text()[-4000:]}"
    found = {name: contents(folder/name) for name in verb.makes}
    same = found == verb.expected
    assert same, f"{fault} at {at}, left {left}: another result than undisturbed, {differing(found, verb.expected)}"
    litter = sorted({p.name for p in folder.iterdir()}-set(verb.makes))
    return Strike(verb.name, fault, at, hit, ended, left, same, litter)


def differing(a, b):
    "Names whose contents differ"
    return [(out, f) for out in b for f in {*a[out], *b[out]} if a[out].get(f) != b[out].get(f)]


def strike(verb, fault, commands, folder, draw):
    "Start a command, strike it at a moment of its time or before one of its steps, and judge"
    at, stop = draw.uniform(0, verb.seconds), draw.choice([0, draw.randint(1, verb.steps)])
    run = verb.run(commands, folder, poor=fault == "no permission", stop=stop)
    while not run.look() and (stop or time.monotonic() < run.begun+at): time.sleep(.001)
    hit, at = run.code is None, f"step {stop} of {verb.steps}" if stop else f"{at:.2f} s"
    with FAULTS[fault](verb, folder, run, draw): run.wait()
    found = judge(verb, fault, commands, folder, run, at, hit)
    shutil.rmtree(folder)
    return found


def fill(verb, commands, folder, draw):
    "A disk that is full before the run has ended, at a moment that its size decides"
    size = 4096*draw.randint(1, max(2, int(verb.room*verb.size/4096)))
    with small_disk(folder, size) as larger:
        run = verb.run(commands, folder).wait()
        at, hit = f"{size:,} bytes", run.code != 0
        larger()
        return judge(verb, "full disk", commands, folder, run, at, hit)


def drawn(*what): return random.Random(repr(what))


if __name__ == "__main__": serve()

"""Every way out of a sandbox that is known to us, tried on the language: all are refused, and nothing of them runs.

The texts of ``WRITES`` are real: run by Python they write a file into the test's folder, which one test makes sure of.
The others would read secrets, change what all share, take the machine's memory or its time, or only get nearer.
"""

import ast
import contextlib
import dataclasses
import inspect
import math
import os
import random
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sartor.discover import language
from sartor.discover.language.expression import LanguageError
from sartor.discover.language.known import known
from sartor.discover.language.operators import OPERATORS
from sartor.discover.language.parse import parse
from sartor.discover.language.program import LOGPS, Program, as_loss, sides_of
from sartor.types import PairLogps

# What torch 2.13 exposes without an underscore on the way (research notes, 4.2).
WALKS = {
    "torch.os": "torch.os.system('touch FILE')",
    "torch.sys": "torch.sys.modules['os'].system('touch FILE')",
    "torch.ctypes": "torch.ctypes.CDLL(None).system(b'touch FILE')",
    "torch.importlib": "torch.importlib.import_module('os').system('touch FILE')",
    "torch.builtins": "torch.builtins.open('FILE', 'w')",
    "torch.builtins.exec": 'torch.builtins.exec(\'open("FILE", "w")\')',
    "torch.inspect": "torch.inspect.sys.modules['os'].system('touch FILE')",
    "torch.threading": "torch.threading.Thread(target=open, args=('FILE', 'w')).run()",
    "torch.functools": "torch.functools.partial(open, 'FILE')('w')",
    "subprocess": "torch.utils.collect_env.subprocess.run(['touch', 'FILE'])",
    "pickle": "torch.serialization.pickle.loads(b'cbuiltins\\nopen\\n(VFILE\\nVw\\ntR.')",
    "shutil": "torch.serialization.shutil.copyfile('/dev/null', 'FILE')",
    "tempfile": "torch.serialization.tempfile.mkstemp(dir='FOLDER')",
    "io": "torch.storage.io.FileIO('FILE', 'w')",
    "zipfile": "torch.hub.zipfile.ZipFile('FILE', 'w')",
    "types": "torch.overrides.types.FunctionType(compile(\"open('FILE', 'w')\", '', 'exec'), {})()",
    "weakref": "torch.utils.weakref.sys.modules['os'].system('touch FILE')",
    "functional.importlib": "F.importlib.import_module('os').system('touch FILE')",
    "functional.torch": "F.torch.os.system('touch FILE')",
    "torch.nn.functional.torch": "torch.nn.functional.torch.os.system('touch FILE')",
    "numpy": "np.savetxt('FILE', [0.0])",
    "numpy through functional": "F.np.savetxt('FILE', [0.0])",
    "a module under another name": "t = torch\nt.os.system('touch FILE')",
    "a module's module, underscored (CVE-2025-5120)": "random._os.system('touch FILE')",
}
TENSORS = {
    "tofile": "margin.numpy().tofile('FILE')",
    "dump": "margin.numpy().dump('FILE')",
    "memmap": "np.memmap('FILE', shape=4, mode='w+')",
    "from_file": "torch.from_file('FILE', shared=True, size=4)",
    "storage from_file": "torch.FloatStorage.from_file('FILE', True, 4)",
    "save": "torch.save(margin, 'FILE')",
    "through a call": "torch.exp(margin).numpy().tofile('FILE')",
    "through brackets": "(margin + 1).numpy().tofile('FILE')",
    "through a local": "z = margin\nz.numpy().tofile('FILE')",
    "register_hook": "margin.requires_grad_().register_hook(lambda g: open('FILE', 'w') and g)\nreturn margin",
    "hook from a def": (
        "def hook(g):\n    open('FILE', 'w')\n    return 0 * g\n"
        "margin.requires_grad_().register_hook(hook)\nreturn 2 * margin"
    ),
    "apply_": "margin.apply_(lambda x: len(str(open('FILE', 'w'))))",
    "map_": "margin.map_(margin, lambda x, y: len(str(open('FILE', 'w'))))",
    "autograd function": (
        "class Loss(torch.autograd.Function):\n    @staticmethod\n    def forward(ctx, x):\n"
        "        open('FILE', 'w')\n        return x.clone()\nLoss.apply(margin)"
    ),
    "torch dispatch": (
        "class Spy(torch.Tensor):\n    @classmethod\n    def __torch_function__(cls, f, t, a=(), k=None):\n"
        "        open('FILE', 'w')\n        return margin\ntorch.exp(torch.zeros(1).as_subclass(Spy))"
    ),
}
BUILTINS = {
    "open": "open('FILE', 'w')",
    "exec": "exec(\"open('FILE', 'w')\")",
    "eval": "eval(\"open('FILE', 'w')\")",
    "compile": "exec(compile(\"open('FILE', 'w')\", '', 'exec'))",
    "__import__": "__import__('os').system('touch FILE')",
    "__builtins__": "__builtins__['open']('FILE', 'w')",
    "globals": "globals()['__builtins__']['open']('FILE', 'w')",
    "getattr": "getattr(torch, 'o' + 's').system('touch FILE')",
    "vars": "vars(torch)['os'].system('touch FILE')",
    "map": "list(map(open, ['FILE'], ['w']))",
    "max with a key": "max([1, 2], key=lambda x: len(str(open('FILE', 'w'))))",
    "sorted with a key": "sorted([1], key=lambda x: str(open('FILE', 'w')))",
    "open in full width": "ｏｐｅｎ('FILE', 'w')",
    "open as a local": "f = open\nf('FILE', 'w')",
    "open as an argument": "torch.exp(open('FILE', 'w').fileno() * margin)",
    "open as a keyword": "torch.exp(input=open('FILE', 'w').fileno() * margin)",
    "open as a condition": "margin if open('FILE', 'w') else beta",
    "open as an index": "margin[open('FILE', 'w').fileno() * 0]",
    "open as a power": "margin ** open('FILE', 'w').fileno()",
    "open as a divisor": "margin / open('FILE', 'w').fileno()",
    "open in a comparison": "margin > open('FILE', 'w').fileno()",
    "open under the unread last line": "open('FILE', 'w')\nmargin",
    "open after return": "f = open('FILE', 'w')\nreturn margin\nf",
    "open behind a semicolon": "z = margin; open('FILE', 'w'); return z",
    "open behind a continued line": "margin + \\\nopen('FILE', 'w').fileno()",
    "open behind a form feed": "z = margin\n\x0copen('FILE', 'w')\nz",
    "import": "import os\nos.system('touch FILE')",
    "import from": "from os import system\nsystem('touch FILE')",
    "import as": "import os as o\no.mkdir('FILE')",
    "import before the function": "import os\nos.system('touch FILE')\ndef loss():\n    return margin",
    "a statement after the function": "def loss():\n    return margin\nopen('FILE', 'w')",
    "two functions": "def loss():\n    return margin\ndef more(x=open('FILE', 'w')):\n    return margin",
    "a function in the function": "def loss():\n    def f():\n        open('FILE', 'w')\n    f()\n    return margin",
}
FRAMES = {
    "generator frame (CVE-2023-37271)": (
        "g = (g.gi_frame.f_back.f_builtins for _ in [0])\n[*g][0]['open']('FILE', 'w')"
    ),
    "generator frame to the host": (
        "g = (g.gi_frame.f_back.f_back.f_back for _ in [0])\n[*g][0].f_builtins['open']('FILE', 'w')"
    ),
    "traceback": (
        "try:\n    1 / 0\nexcept Exception as error:\n    error.__traceback__.tb_frame.f_builtins['open']('FILE', 'w')"
    ),
    "traceback without underscores": (
        "try:\n    1 / 0\nexcept Exception:\n    torch.sys.exc_info()[2].tb_frame.f_builtins['open']('FILE', 'w')"
    ),
    "attribute-error object (CVE-2024-47532)": (
        "try:\n    margin.nothing\nexcept AttributeError as error:\n    error.obj.numpy().tofile('FILE')"
    ),
    "name-error object": (
        "try:\n    nothing\nexcept NameError as error:\n"
        "    error.with_traceback.__self__.__traceback__.tb_frame.f_builtins['open']('FILE', 'w')"
    ),
    "except-star (CVE-2025-22153)": (
        "try:\n    raise ExceptionGroup('', [ValueError()])\nexcept* ValueError as group:\n    open('FILE', 'w')"
    ),
    "subclasses": (
        "[c for c in ().__class__.__base__.__subclasses__() if c.__name__ == '_wrap_close'][0]"
        ".__init__.__globals__['system']('touch FILE')"
    ),
    "a function's globals": "F.relu.__globals__['__builtins__']['open']('FILE', 'w')",
    "a builtin's self": "len.__self__.open('FILE', 'w')",
    "sys frame": "torch.sys._getframe().f_builtins['open']('FILE', 'w')",
    "current frame": "torch.inspect.currentframe().f_back.f_builtins['open']('FILE', 'w')",
    "code object": ("def f():\n    pass\nf.__code__ = compile(\"open('FILE', 'w')\", '', 'exec')\nf()"),
    "finaliser": "class Later:\n    def __del__(self):\n        open('FILE', 'w')\nLater()\nreturn margin",
    "finaliser by weak reference": "torch.utils.weakref.finalize(torch.zeros(1), open, 'FILE', 'w')",
    "format that calls": (
        "class Text:\n    def __format__(self, how):\n        return str(open('FILE', 'w'))\n'{}'.format(Text())"
    ),
}
SYNTAX = {
    "lambda": "(lambda: open('FILE', 'w'))()",
    "lambda in a local": "f = lambda: open('FILE', 'w')\nf()",
    "walrus": "(f := open)('FILE', 'w')",
    "list comprehension": "[open('FILE', 'w') for _ in [0]]",
    "set comprehension": "{str(open('FILE', 'w')) for _ in [0]}",
    "dict comprehension": "{0: open('FILE', 'w') for _ in [0]}",
    "generator expression": "list(open('FILE', 'w') for _ in [0])",
    "f-string": "f\"{open('FILE', 'w')}\"",
    "f-string in a format": "f\"{1.0:{str(open('FILE', 'w'))[:0]}}\"",
    "starred": "print(*[open('FILE', 'w')])",
    "double starred": "dict(**{'a': open('FILE', 'w')})",
    "list": "[open('FILE', 'w')]",
    "tuple": "(open('FILE', 'w'),)",
    "set": "{str(open('FILE', 'w'))}",
    "dict": "{0: open('FILE', 'w')}",
    "slice": "'text'[open('FILE', 'w').fileno() :]",
    "and": "margin is None or open('FILE', 'w')",
    "chained comparison": "0 < 1 < open('FILE', 'w').fileno()",
    "yield": "list((lambda: (yield open('FILE', 'w')))())",
    "class body": "class Now:\n    file = open('FILE', 'w')",
    "class decorator": "@(lambda c: open('FILE', 'w'))\nclass Now:\n    pass",
    "metaclass": "class Now(metaclass=lambda *a: open('FILE', 'w')):\n    pass",
    "decorator": "@(lambda f: open('FILE', 'w'))\ndef loss():\n    return margin",
    "default": "def loss(pair, x=open('FILE', 'w')):\n    return pair.margin",
    "default of a keyword": "def loss(pair, *, x=open('FILE', 'w')):\n    return pair.margin",
    "default in a tuple": "def loss(pair, x=(open('FILE', 'w'),)):\n    return pair.margin",
    "annotated": "z: int = open('FILE', 'w')\nmargin",
    "annotated item": "z = [0]\nz[0]: int = open('FILE', 'w')\nmargin",
    "augmented": "z = ''\nz += str(open('FILE', 'w'))",
    "unpacked": "a, b = open('FILE', 'w'), 1",
    "to an attribute": "torch.sartor_test = open('FILE', 'w')\ndel torch.sartor_test",
    "to an item": "z = [0]\nz[0] = open('FILE', 'w')",
    "global": "global z\nz = open('FILE', 'w')",
    "nonlocal": "z = 0\ndef f():\n    nonlocal z\n    z = open('FILE', 'w')\nf()",
    "if": "if open('FILE', 'w'):\n    pass",
    "while": "while open('FILE', 'w'):\n    break",
    "for": "for _ in [open('FILE', 'w')]:\n    pass",
    "with": "with open('FILE', 'w'):\n    pass",
    "assert": "assert open('FILE', 'w')",
    "raise": "raise ValueError(open('FILE', 'w'))",
    "delete": "z = [0]\ndel z[open('FILE', 'w').fileno() * 0]",
    "try": "try:\n    open('FILE', 'w')\nfinally:\n    pass",
    "match": "match open('FILE', 'w'):\n    case _:\n        pass",
    "match guard": "match 0:\n    case _ if open('FILE', 'w'):\n        pass",
    "async": "async def f():\n    open('FILE', 'w')\ntry:\n    f().send(None)\nexcept StopIteration:\n    pass",
    "async comprehension": "async def f():\n    return [open('FILE', 'w') for _ in [0]]\nf().send(None)",
}
WRITES = {"walks": WALKS, "tensors": TENSORS, "builtins": BUILTINS, "frames": FRAMES, "syntax": SYNTAX}

OTHERS = {
    # what all share
    "seed": "torch.manual_seed(0)",
    "seed of numpy": "np.random.seed(0)",
    "seed through a generator": "torch.default_generator.manual_seed(0)",
    "default dtype": "torch.set_default_dtype(torch.float64)",
    "grad mode": "torch.set_grad_enabled(False)",
    "grad mode as a context": "with torch.no_grad():\n    return margin",
    "anomaly mode": "torch.autograd.set_detect_anomaly(True)",
    "threads": "torch.set_num_threads(1)",
    "deterministic": "torch.use_deterministic_algorithms(True)",
    "a function replaced": "F.logsigmoid = F.relu\nmargin",
    "a module replaced": "torch.sys.modules['torch'] = margin\nmargin",
    "an operator replaced": "OPERATORS['exp'] = margin\nmargin",
    "environment": "torch.os.environ.clear()",
    "folder": "torch.os.chdir('/')",
    "garbage": "torch.cuda.graphs.gc.disable()",
    "processes": "torch.multiprocessing.Process(target=margin).start()",
    # the model, through the graph
    "graph": "margin.grad_fn.next_functions[0][0].variable.data.fill_(0)",
    "graph from an argument": "exp(margin.grad_fn)",
    "weights in place": "pair.policy_chosen.grad_fn.next_functions[0][0].variable.zero_()",
    "log-probs in place": "policy_chosen.zero_()",
    "log-probs in place by a slice": "policy_chosen[:] = 0\nmargin",
    "log-probs in place by a statement": "policy_chosen -= 1\nmargin",
    "log-probs through data": "policy_chosen.data.add_(1)",
    "output of a function in place": "torch.add(margin, 1, out=margin)",
    "the trainer (DiscoPOP)": "self.optimizer.zero_grad()",
    "gradient": "margin.backward()",
    "gradient by name": "torch.autograd.grad(margin, policy_chosen)",
    # reading
    "format": "'{0.__class__.__init__.__globals__}'.format(margin)",
    "format (CVE-2023-41039)": "str.format_map('{a.__class__}', {'a': margin})",
    "percent": "'%s' % margin",
    "dunder of an input": "margin.__class__",
    "dunder of a constant": "(1).__class__",
    "dunder of a function": "exp.__globals__",
    "dunder of a call": "exp(margin).__reduce_ex__(2)",
    "dunder call": "exp.__call__(margin)",
    "breakpoint": "breakpoint()",
    "input": "input()",
    "exit": "exit()",
    "print": "print(margin)",
    "locals": "locals()",
    "id": "id(margin)",
    "type": "type('X', (), {})",
    "the tables": "OPERATORS",
    "the reader": "parse('margin')",
    "the operators' code": "compute(margin)",
    "a guard's module": "stable.torch.os.getcwd()",
    "a prefix alone": "torch",
    "a prefix of a prefix": "torch.torch.exp(margin)",
    "a name with a prefix within": "pair.torch.os",
    "an operator by its internal name": "mul(margin, margin)",
    "a pickled string": "pickle.loads(b'')",
    "environment variables": "torch.os.environ['HOME']",
    "sockets": "torch.distributed.rendezvous('tcp://127.0.0.1:1')",
    "hub": "torch.hub.load('owner/repo', 'model')",
    "load": "torch.load('weights.pt')",
    "extension": "torch.utils.cpp_extension.load_inline('x', '')",
    "jit": "torch.jit.script(margin)",
    "ops": "torch.ops.load_library('x.so')",
    "library (smolagents 2094)": "ctypes.CDLL(None)",
    "queue (CVE-2025-5120)": "queue.threading.sys.modules['os'].getcwd()",
    "dunder dict (CVE-2025-9959)": "margin.__dict__['x']",
    "pyodide (CVE-2025-68668)": "_pyodide._base.eval_code('1')",
    "error of a format (CVE-2026-0863)": (
        "try:\n    '{0.a}'.format(margin)\nexcept AttributeError as error:\n    return error.obj"
    ),
    "with as a scope (CVE-2026-1470)": "with margin as constructor:\n    return constructor",
    "gc": "torch.cuda.graphs.gc.get_objects()",
    # memory
    "expand and clone": "margin.expand(10**5, 10**5).clone()",
    "allocation": "torch.empty(2**35)",
    "allocation by a method": "margin.new_zeros(10**6, 10**6)",
    "long text": "'a' * 10**10",
    "long list": "[0] * 10**10",
    "large number": "10 ** 10 ** 10",
    "large shift": "1 << 10**10",
    "large literal": "9" * 3999,
    "outer": "torch.outer(margin, margin)",
    "tree": "a = margin * margin\n" + "a = a * a\n" * 300 + "a",
    # time
    "while": "while True:\n    pass",
    "for": "for i in range(10**12):\n    margin\nreturn margin",
    "sum": "sum(range(10**12))",
    "recursion": "def loss():\n    return loss()",
    "recursion of a lambda": "(lambda f: f(f))(lambda f: f(f))",
    "sleep": "torch.cuda.time.sleep(1000)",
    "regular expression": "torch.hub.re.match('(a+)+$', 'a' * 100 + 'b')",
    "alarm": "torch.multiprocessing.signal.alarm(0)",
    # syntax that gives nothing here and might in another version
    "type alias": "type X = int\nmargin",
    "type parameters": "def loss[T: open('FILE', 'w')](pair):\n    return margin[0]",
    "await": "await margin",
    "async for": "async for x in margin:\n    pass",
    "async with": "async with margin:\n    pass",
    "async function": "async def loss():\n    return margin",
    "yield": "yield margin",
    "yield from": "yield from margin",
    "yield in a local": "z = yield margin\nz",
    "class": "class Loss:\n    margin = 1",
    "pass": "pass",
    "ellipsis": "...",
    "bytes": "b'margin'",
    "is": "margin is None",
    "in": "margin in [1]",
    "import of the future": "from __future__ import annotations\nmargin",
    "star import": "from os import *",
    "relative import": "from . import x",
    "subscript": "margin[0]",
    "bitwise": "margin | 1",
    "matrix product": "margin @ margin",
    "global": "global margin",
    "two returns": "return margin\nreturn beta",
    "coding cookie": "# -*- coding: utf-7 -*-\n+AG8AcABlAG4-('x')",
    "null byte": "margin\0open('x')",
    "surrogate": "margin + '\ud800'",
    "end of the wrapper": "margin\ndef more(): open('x')",
    "dedent out of the wrapper": "margin\nopen('x')",
    "closed wrapper": "margin)\nopen('x'",
    "line separator": "margin\u2028open('x')",
    "carriage return": "margin\ropen('x')",
    "type comment": "z = open('x')  # type: int\nz",
    "backquotes": "`open('x')`",
    "shell": "!touch x",
    "magic": "%run x",
    "markdown": "```python\nmargin\n```",
    "json": '{"op": "exp", "args": ["margin"]}',
}
ATTACKS = WRITES | {"others": OTHERS}


@contextlib.contextmanager
def nothing_happens(folder: Path) -> Iterator[None]:
    before = state()
    yield
    assert list(folder.iterdir()) == []
    after = state()
    assert [name for name in before if before[name] != after[name]] == []


def state() -> dict[str, Any]:
    return {
        "seed": torch.get_rng_state().numpy().tobytes(),
        "seed of numpy": np.random.get_state()[1].tobytes(),
        "default dtype": torch.get_default_dtype(),
        "grad mode": torch.is_grad_enabled(),
        "anomaly mode": torch.is_anomaly_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "computing threads": torch.get_num_threads(),
        "modules": dict(sys.modules),
        "threads": threading.active_count(),
        "folder": os.getcwd(),
        "environment": dict(os.environ),
        "recursion": sys.getrecursionlimit(),
        "operators": {name: operator.compute for name, operator in OPERATORS.items()},
        "functions": (F.logsigmoid, F.softplus, F.relu, torch.exp, torch.Tensor.detach),
    }


def written_for(text: str, folder: Path) -> str:
    return text.replace("FILE", str(folder / "file")).replace("FOLDER", str(folder))


def refusal(text: str) -> str:
    """What is said of a text; nothing if it is read."""
    try:
        parse(text)
    except LanguageError as error:
        return str(error)
    return ""


def forms(text: str) -> list[str]:
    """As it stands, in a function before its last line, and as a local that nothing uses: nobody looks there."""
    if "def loss" in text or "\n" in text.strip():
        return [text]
    return [text, f"def loss(pair, *, beta):\n    {text}\n    return pair.margin", f"z = {text}\nmargin"]


@pytest.mark.parametrize("kind", ATTACKS)
def test_is_refused_and_does_nothing(kind: str, tmp_path: Path) -> None:
    for name, attack in ATTACKS[kind].items():
        for text in forms(written_for(attack, tmp_path)):
            with nothing_happens(tmp_path):
                said = refusal(text)
            assert said, f"{name}: {text!r} was read"
            assert "\n" not in said, name


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize("kind", WRITES)
def test_would_write_a_file_if_python_ran_it(kind: str, tmp_path: Path) -> None:
    """Without this, a slip in a text above would make it harmless, and its refusal would prove nothing."""
    harmless = []
    for place, (name, attack) in enumerate(WRITES[kind].items()):
        folder = tmp_path / str(place)
        folder.mkdir()
        run(written_for(attack, folder))
        harmless += [] if list(folder.iterdir()) else [name]
    assert harmless == []


def run(text: str) -> None:
    """As Python would run it, where a sandbox had let it through."""
    if "def loss" not in text:
        text = "def loss():\n" + "".join(f" {line}\n" for line in text.splitlines())
    scope: dict[str, Any] = {"torch": torch, "F": F, "np": np, "math": math, "random": random, "beta": 0.1}
    scope |= {"margin": torch.ones(4), "pair": SimpleNamespace(margin=torch.ones(4))}
    with contextlib.suppress(Exception):
        exec(text, scope)
        loss = scope["loss"]
        found = loss(*[scope["pair"]] * len(inspect.signature(loss).parameters))
        if isinstance(found, torch.Tensor) and found.requires_grad:
            found.sum().backward()


@pytest.mark.parametrize(
    "head",
    [
        "def loss(pair: open('FILE', 'w')):",
        "def loss(pair) -> open('FILE', 'w'):",
        "def loss(*pair: open('FILE', 'w'), **more: open('FILE', 'w')):",
        'def loss(pair: \'open("FILE", "w")\'):',
    ],
)
def test_annotations_are_not_read_and_do_not_run(head: str, tmp_path: Path) -> None:
    """The one place where a text may say anything: people write types there, and nobody looks."""
    with nothing_happens(tmp_path):
        assert parse(written_for(f"{head}\n    return beta * margin", tmp_path)) == parse("beta * margin")


SOURCES = sorted(Path(language.__file__).parent.glob("*.py"))
FORBIDDEN = {"eval", "exec", "compile", "__import__", "open", "globals", "locals", "vars", "setattr", "breakpoint"}
DUNDERS = {"__name__", "__getitem__"}
ALLOWED_IMPORTS = {
    *("ast", "re", "textwrap", "warnings", "collections", "dataclasses", "functools", "math", "torch", "jaxtyping")
}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_the_language_runs_no_text(path: Path) -> None:
    """By its source: no call that runs, finds or imports code by a name that a text could give."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            assert node.id not in FORBIDDEN, f"line {node.lineno}: {node.id}"
        if isinstance(node, ast.Attribute):
            assert node.attr not in FORBIDDEN - {"compile", "open"}, f"line {node.lineno}: {node.attr}"
            assert not node.attr.startswith("__") or node.attr in DUNDERS, f"line {node.lineno}: {node.attr}"
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            for module in modules:
                assert module.startswith("sartor.") or module.split(".")[0] in ALLOWED_IMPORTS, module
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr":
            # By names of its own tables, never by one from a text.
            assert ast.unparse(node.args[0]) in {"pair", "node"}, ast.unparse(node)


def test_the_sources_are_there() -> None:
    assert {"expression.py", "known.py", "operators.py", "parse.py", "printing.py", "program.py"} <= {
        path.name for path in SOURCES
    }


def graph(parameter: torch.nn.Parameter) -> PairLogps:
    """Log-probs that hang on a model's parameter."""
    policy = torch.log_softmax(parameter, 0)
    return PairLogps(policy[:3], policy[3:6], *[torch.full((3,), -2.0)] * 2, *[torch.tensor([3, 4, 5])] * 2)


def leaves_of(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Every leaf that the graph behind a tensor leads to, as a candidate could walk it."""
    found, left, seen = [], [tensor.grad_fn], set()
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        found += [node.variable] if hasattr(node, "variable") else []
        left += [following for following, _ in node.next_functions]
    return found


def test_the_walk_through_a_graph_finds_a_parameter() -> None:
    parameter = torch.nn.Parameter(torch.arange(8.0))
    assert any(leaf is parameter for leaf in leaves_of(graph(parameter).margin))


def test_a_candidate_sees_numbers_and_no_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """What reaches a candidate has no history, and what its own operations see leads to copies alone."""
    parameter = torch.nn.Parameter(torch.arange(8.0))
    inputs: list[torch.Tensor] = []
    within: list[torch.Tensor] = []
    losses = Program.losses

    def spied(self: Program, sides: dict[str, torch.Tensor], beta: Any) -> torch.Tensor:
        inputs.extend(sides.values())
        return losses(self, sides, beta)

    def spy(compute: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def noted(*args: torch.Tensor) -> torch.Tensor:
            within.extend(args)
            return compute(*args)

        return noted

    monkeypatch.setattr(Program, "losses", spied)
    for name in ("log_sigmoid", "mul", "neg"):
        operator = OPERATORS[name]
        monkeypatch.setitem(OPERATORS, name, dataclasses.replace(operator, compute=spy(operator.compute)))
    pair = graph(parameter)
    loss = as_loss(known("dpo"))(pair, beta=0.1)

    assert len(inputs) == len(LOGPS) + 2
    assert all(tensor.is_leaf and tensor.grad_fn is None for tensor in inputs)
    assert not any(tensor is getattr(pair, name) for tensor in inputs for name in LOGPS)
    reached = [leaf for tensor in within for leaf in leaves_of(tensor)]
    assert len(within) == 4
    assert {id(leaf) for leaf in reached} <= {id(tensor) for tensor in inputs}
    # And still training moves the parameter, by the weights alone.
    loss.sum().backward()
    assert parameter.grad is not None
    assert bool(parameter.grad.any())


@pytest.mark.parametrize("name", ["dpo", "ipo", "bco_pair", "lrml"])
def test_a_candidate_changes_nothing_of_its_inputs(name: str) -> None:
    pair = graph(torch.nn.Parameter(torch.arange(8.0)))
    before = {field.name: getattr(pair, field.name).clone() for field in dataclasses.fields(pair)}
    with nothing_happens_to(pair, before):
        as_loss(known(name))(pair, beta=0.1)
        Program(known(name)).weights(sides_of(pair), 0.1)


@contextlib.contextmanager
def nothing_happens_to(pair: PairLogps, before: dict[str, torch.Tensor]) -> Iterator[None]:
    yield
    for name, value in before.items():
        assert torch.equal(getattr(pair, name).nan_to_num(7.0), value.nan_to_num(7.0)), name
    assert pair.policy_chosen.requires_grad
    assert not pair.reference_chosen.requires_grad


def test_no_weight_carries_a_graph() -> None:
    found = Program(known("dpo")).weights(sides_of(graph(torch.nn.Parameter(torch.arange(8.0)))), 0.1)
    assert [t.requires_grad for t in (found.loss, found.chosen, found.rejected)] == [False] * 3

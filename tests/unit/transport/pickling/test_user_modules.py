import functools
import importlib
import pickle
import subprocess
import sys
import textwrap
import threading

import cloudpickle
import pytest
import torch

from dnb.errors import ShippingError
from dnb.transport.pickling import user_modules
from dnb.transport.pickling.module_sources import own_place
from dnb.transport.pickling.payloads import explain_unpicklable, pickle_payload
from dnb.transport.pickling.user_modules import dumps, loads

# Another process, as an engine is: it takes functions over, calls them, and says what came.
OTHER = """
import sys
from dnb.transport.pickling.user_modules import loads
sys.path.insert(0, sys.argv[1])
while size := int.from_bytes(sys.stdin.buffer.read(8), "little"):
    print(loads(sys.stdin.buffer.read(size), adopt=True)(), flush=True)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("own")


@pytest.fixture
def write(folder, monkeypatch):
    """Writes modules of the user's, and imports them; gone again at the end."""
    monkeypatch.syspath_prepend(str(folder))
    before = set(sys.modules)

    def write(name, source, *, imports=True):
        path = folder / f"{name.replace('.', '/')}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(textwrap.dedent(source))
        importlib.invalidate_caches()
        if not imports:
            return None
        return importlib.reload(sys.modules[name]) if name in sys.modules else importlib.import_module(name)

    yield write
    for name in set(sys.modules) - before:
        del sys.modules[name]


@pytest.fixture(scope="module")
def call(folder):
    """Lets the other process call a function; it lives longer than the code that it has imported."""
    process = subprocess.Popen([sys.executable, "-c", OTHER, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def call(function, pickle_it=dumps):
        pickled = pickle_it(function)
        process.stdin.write(len(pickled).to_bytes(8, "little") + pickled)
        process.stdin.flush()
        return process.stdout.readline().decode().strip()

    yield call
    process.stdin.close()
    assert process.wait(60) == 0
    process.stdout.close()


def test_a_module_is_the_users_own_unless_it_is_installed_or_of_python_or_of_dnb(write):
    own = own_place(write("own_mod", "X = 1"))
    assert own is not None
    assert own.name == "own_mod"
    assert [own_place(module) for module in (torch, cloudpickle, functools, user_modules, sys)] == [None] * 5


def test_another_process_computes_with_an_edited_module_and_with_what_was_set_in_it(write, call):
    source = "SCALE = 1\ndef f(): return SCALE * {}"
    assert call(write("edited_mod", source.format(2)).f) == "2"
    module = write("edited_mod", source.format(30))
    assert call(module.f) == "30"
    module.SCALE = 5
    assert call(module.f) == "150"


def test_code_that_was_edited_and_not_imported_again_is_what_the_notebook_has(write, call):
    module = write("stale_mod", "def f(): return 'old'")
    write("stale_mod", "def f(): return 'new'", imports=False)
    assert call(module.f) == "old"


def test_a_module_that_a_function_looks_into_is_that_of_the_notebook(write, call):
    write("deep_mod", "VALUE = 1\ndef g(): return VALUE")
    module = write("outer_mod", "import deep_mod\ndef f(): return deep_mod.g(), deep_mod.VALUE")
    assert call(module.f) == "(1, 1)"
    sys.modules["deep_mod"].VALUE = 7
    assert call(module.f) == "(7, 7)"


def test_a_module_that_a_function_imports_when_it_is_called_is_that_of_the_notebook(write, call):
    write("late_mod", "VALUE = 1\ndef g(): return VALUE")
    module = write("calling_mod", "def f():\n    from late_mod import g\n    return g()")
    assert call(module.f) == "1"
    write("late_mod", "VALUE = 2\ndef g(): return VALUE * 10")
    assert call(module.f) == "20"


def test_a_module_of_a_package_that_is_imported_relatively_is_that_of_the_notebook(write, call):
    write("pack_mod.__init__", "", imports=False)
    write("pack_mod.low", "def g(): return 1")
    module = write("pack_mod.high", "def f():\n    from .low import g\n    return g()")
    assert call(module.f) == "1"
    write("pack_mod.low", "def g(): return 2")
    assert call(module.f) == "2"


def test_a_class_that_was_edited_arrives_as_it_is_now(write, call):
    source = "class Base:\n    def f(self): return {}\nclass Net(Base):\n    def f(self): return super().f() + 1"
    assert call(write("class_mod", source.format(1)).Net().f) == "2"
    assert call(write("class_mod", source.format(10)).Net().f) == "11"


def test_a_method_that_was_replaced_in_the_notebook_arrives(write, call):
    module = write("patched_mod", "class Net:\n    def f(self): return 1")
    module.Net.f = lambda _: 2
    assert call(module.Net().f) == "2"


def test_a_function_with_a_cache_arrives_as_it_is_now(write, call):
    source = "import functools\n@functools.lru_cache(maxsize=4)\ndef f(): return {}"
    assert call(write("cached_mod", source.format(1)).f) == "1"
    assert call(write("cached_mod", source.format(2)).f) == "2"


LOCKED = """
import threading
LOCK, STREAM, WORD = threading.Lock(), open(__file__), 'word'
def f():
    with LOCK:
        return WORD, STREAM.readable()
"""


def test_globals_of_a_module_that_pickle_refuses_are_looked_up_where_it_arrives(write, call):
    module = write("locked_mod", LOCKED)
    assert call(module.f, lambda function: pickle_payload(function, name="f", folders=())[0]) == "('word', True)"
    module.STREAM.close()


def test_what_cannot_be_pickled_beside_them_is_still_refused(write):
    module = write("refused_mod", LOCKED)
    error = explain_unpicklable([module.f, threading.Lock()], name="model")
    assert isinstance(error, ShippingError)
    assert str(error).startswith("model[1] (a lock) cannot be sent to the engines")
    module.STREAM.close()


def test_a_class_of_this_process_is_not_written_into_when_it_is_unpacked_here(write):
    module = write("kept_mod", "SCALE = 1\nclass Net:\n    def f(self): return SCALE")
    before = module.Net.f
    arrived = loads(dumps(module.Net()), adopt=False)
    assert type(arrived) is module.Net
    assert module.Net.f is before
    module.SCALE = 3
    assert arrived.f() == 3


def test_code_unpacked_here_has_globals_apart_from_those_of_the_notebook(write):
    module = write("apart_mod", "SCALE = 1\ndef f(): return SCALE")
    pickled = dumps(module.f)
    module.SCALE = 2
    assert loads(pickled, adopt=False)() == 1
    assert module.f() == 2


def test_what_else_pickles_in_this_process_is_left_alone(write):
    module = write("alone_mod", "def f(): return 1")
    dumps(module.f)
    assert cloudpickle.list_registry_pickle_by_value() == set()
    assert b"alone_mod" in pickle.dumps(module.f)


def test_a_module_whose_import_fails_there_is_what_was_sent(write, call, folder):
    module = write("failing_mod", "A = 3\ndef f(): return A")
    (folder / "failing_mod.py").unlink()
    assert call(module.f) == "3"

"""Code of the user's own modules: it travels by value, as the notebook has it now, and not as its files once were.

Engines live longer than the code that they have imported. So functions and classes of modules that are no installed
package are pickled whole, with the globals that they read. Where they arrive, their globals are those of the module of
the same name, which is imported first, anew if its source has changed: whatever else imports it there finds the same.
"""

from __future__ import annotations

import contextlib
import dis
import functools
import importlib
import importlib.util
import io
import logging
import pickle
import sys
import threading
import types
import weakref
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import cloudpickle

from dnb.errors import USER_ERRORS, summary_of
from dnb.transport.pickling.generators import OwnGenerators, is_generator
from dnb.transport.pickling.module_reducers import reduce_module
from dnb.transport.pickling.module_sources import UserModule, digest_of, own_names, own_place

log = logging.getLogger(__name__)

_LruCache = type(functools.lru_cache(lambda: None))

# Classes that were packed in this process: it is theirs, and unpacking them here must not write into them.
_packed_here: weakref.WeakSet[type] = weakref.WeakSet()
# cloudpickle keeps the modules that go by value in one set for the whole process.
_registering = threading.RLock()


# Packing -------------------------------------------------------------------------------------------


class _Globals(dict[str, Any]):
    """Stands in a pickle for the globals of an own module."""

    def __init__(self, place: UserModule) -> None:
        super().__init__(__name__=place.name)  # cloudpickle fills one that is empty
        self._place = place

    def __reduce_ex__(self, _protocol: Any) -> Any:
        return _globals_of, tuple(self._place)


class _Reference:
    """Stands in a pickle for a global that cannot be pickled: it is looked up where it arrives."""

    def __init__(self, place: UserModule, name: str) -> None:
        self._place = place
        self._name = name

    def __reduce__(self) -> Any:
        return _attribute_of, (*self._place, self._name)


class CodePickler(cloudpickle.Pickler):  # type: ignore[misc]
    """A pickler for which the user's own modules are no files that others have, too.

    Args:
        file: to write into.
        referenced: globals, as (module, name), that are looked up where they arrive.
        options: of the pickler.
    """

    def __init__(self, file: io.BytesIO, *, referenced: Mapping[tuple[str, str], Any] | None = None, **options: Any):
        self.own_globals: dict[tuple[str, str], Any] = {}  # that go by value
        self.generators: list[Any] = []  # of random numbers
        self._referenced = referenced or {}
        self._places: dict[str, UserModule | None] = {}
        self._names: set[str] = set()  # that functions look up anywhere
        self._modules: dict[str, types.ModuleType] = {}  # that functions may look into
        self._sent: dict[str, set[str]] = {}  # of these, the names that are in the pickle
        super().__init__(file, **options)

    def dump_whole(self, obj: Any) -> None:
        """Pickle an object, and behind it the generators in it, and what functions in it look up in own modules."""
        with _registered(own_names()):
            self.dump(obj)
            while found := self._not_sent():
                self.dump(found)
            if self.generators:
                self.dump(OwnGenerators(self.generators))

    def reducer_override(self, obj: Any) -> Any:
        """Take the user's own functions, classes and modules by value."""
        kind = type(obj)
        if is_generator(obj):
            self.generators.append(obj)
            return NotImplemented
        if kind is types.FunctionType:
            return self._reduce_function(obj)
        if kind is types.ModuleType:
            return self._reduce_own_module(obj)
        if kind is _LruCache and self._place_of(getattr(obj, "__module__", None)) is not None:
            return _make_lru_cache, (obj.__wrapped__, *obj.cache_parameters().values())
        reduced = reduce_module(obj)
        if reduced is not None:
            return reduced
        reduced = super().reducer_override(obj)
        if isinstance(obj, type) and isinstance(reduced, tuple) and len(reduced) == 6:
            _packed_here.add(obj)
            return (*reduced[:5], _set_class_state)
        return reduced

    def _reduce_own_module(self, module: types.ModuleType) -> Any:
        place = self._place_of(module.__name__)
        if place is None or sys.modules.get(place.name) is not module:
            return NotImplemented
        self._modules[place.name] = module
        return _module_of, tuple(place)

    def _reduce_function(self, function: types.FunctionType) -> Any:
        space = function.__globals__
        found = sys.modules.get(space.get("__name__", ""))
        place = self._place_of(found.__name__) if found is not None and vars(found) is space else None
        if place is not None:
            self.globals_ref.setdefault(id(space), _Globals(place))
        reduced = super().reducer_override(function)
        if not isinstance(reduced, tuple):
            return reduced
        self._note_names(function.__code__, package=space.get("__package__") or "")
        if place is not None:
            state = reduced[2][1]
            state["__globals__"] = {
                name: self._global(place, name, value) for name, value in state["__globals__"].items()
            }
        return reduced

    def _global(self, place: UserModule, name: str, value: Any) -> Any:
        if (place.name, name) in self._referenced:
            return _Reference(place, name)
        self.own_globals[place.name, name] = value
        return value

    def _note_names(self, code: types.CodeType, *, package: str) -> None:
        """Remember what a function may look up in a module, and which own modules it imports when it is called."""
        self._names.update(code.co_names)
        for name in code.co_names:
            for full in (name, f"{package}.{name}" if name else package):
                if self._place_of(full) is not None and _imports(code, name):
                    self._modules[full] = sys.modules[full]
        for const in code.co_consts:
            if isinstance(const, types.CodeType):
                self._note_names(const, package=package)

    def _place_of(self, name: Any) -> UserModule | None:
        if not isinstance(name, str):
            return None
        if name not in self._places:
            self._places[name] = own_place(sys.modules.get(name))
        return self._places[name]

    def _not_sent(self) -> dict[str, dict[str, Any]]:
        """Return, by module, what functions look up in it and has not gone yet."""
        found: dict[str, dict[str, Any]] = {}
        for module_name, module in list(self._modules.items()):
            sent = self._sent.setdefault(module_name, set())
            names = [name for name in self._names & vars(module).keys() - sent if not name.startswith("__")]
            place = self._place_of(module_name)
            assert place is not None
            sent.update(names)
            if names:
                found[module_name] = {name: self._global(place, name, vars(module)[name]) for name in sorted(names)}
        return found


def _imports(code: types.CodeType, name: str) -> bool:
    return any(each.opname == "IMPORT_NAME" and each.argval == name for each in dis.get_instructions(code))


@contextlib.contextmanager
def _registered(names: list[str]) -> Iterator[None]:
    """Let cloudpickle take modules by value for a moment: what else uses it in this process is none of our business."""
    with _registering:
        before = cloudpickle.list_registry_pickle_by_value()
        new = [sys.modules[name] for name in names if name not in before and name in sys.modules]
        try:
            for module in new:
                cloudpickle.register_pickle_by_value(module)
            yield
        finally:
            for module in new:
                with contextlib.suppress(ValueError):
                    cloudpickle.unregister_pickle_by_value(module)


def unpicklable_globals(pickler: CodePickler) -> dict[tuple[str, str], Any]:
    """Return those of the globals on which a pickler has come that cannot be pickled, each by itself."""
    found = {}
    for key, value in pickler.own_globals.items():
        others = {other: None for other in pickler.own_globals if other != key}
        try:
            CodePickler(io.BytesIO(), referenced=others, protocol=5).dump_whole(value)
        except KeyboardInterrupt:
            raise
        except USER_ERRORS:  # a user's __reduce__ may raise anything; it is the answer
            found[key] = value
    return found


def dumps(obj: Any) -> bytes:
    """Pickle functions that are sent by themselves."""
    file = io.BytesIO()
    CodePickler(file, protocol=5).dump_whole(obj)
    return file.getvalue()


# Unpacking -----------------------------------------------------------------------------------------

# What modules are, while something is unpacked: None where they are the process's own, and stay as they are.
_adopting: ContextVar[bool] = ContextVar("adopting", default=False)
_apart: ContextVar[dict[str, dict[str, Any]] | None] = ContextVar("apart", default=None)
_adopted: dict[str, str] = {}  # digest of the source of each own module that was imported here


@contextlib.contextmanager
def _adopting_modules(adopt: bool) -> Iterator[None]:
    """Within, what is unpacked belongs to the modules of this process; else it has globals apart from theirs."""
    tokens = _adopting.set(adopt), _apart.set({})
    try:
        yield
    finally:
        _adopting.reset(tokens[0])
        _apart.reset(tokens[1])


def read_whole(unpickler: pickle.Unpickler, *, adopt: bool) -> tuple[Any, OwnGenerators]:
    """Unpickle what `CodePickler.dump_whole` wrote, and the generators in it.

    Args:
        unpickler: of what it has written.
        adopt: whether this process's own modules become those of the notebook; else the code has globals of its own.
    """
    generators = OwnGenerators()
    with _adopting_modules(adopt):
        obj = unpickler.load()
        with contextlib.suppress(EOFError):  # an older dnb has written nothing behind it
            while True:
                found = unpickler.load()
                if isinstance(found, OwnGenerators):
                    generators = found
                elif adopt:
                    _put_into_modules(found)
    return obj, generators


def loads(pickled: bytes, *, adopt: bool) -> Any:
    """Unpickle what `dumps` returned."""
    return read_whole(pickle.Unpickler(io.BytesIO(pickled)), adopt=adopt)[0]  # noqa: S301 - the caller has verified it


def _put_into_modules(found: Mapping[str, Mapping[str, Any]]) -> None:
    """Give modules what the notebook's have."""
    for name, values in found.items():
        module = sys.modules.get(name)
        if module is not None:
            vars(module).update(values)


def _globals_of(name: str, file: str, digest: str) -> dict[str, Any]:
    if _adopting.get():
        return vars(_module_of(name, file, digest))
    spaces = _apart.get()
    if spaces is None:
        spaces = {}
    if name not in spaces:
        spaces[name] = {"__name__": name, "__file__": file, "__package__": name.rpartition(".")[0]}
    return spaces[name]


def _attribute_of(name: str, file: str, digest: str, attribute: str) -> Any:
    return getattr(_module_of(name, file, digest), attribute)


def _module_of(name: str, file: str, digest: str) -> types.ModuleType:
    """Return the module of this process, imported anew if its source is not that of the notebook's."""
    module = sys.modules.get(name)
    if module is not None and (not _adopting.get() or _adopted.get(name) == digest):
        return module
    _adopted[name] = digest
    try:
        return _imported(name, file, digest)
    except KeyboardInterrupt:
        raise
    except USER_ERRORS as error:  # what was sent by value may be all that is needed
        log.warning("module %r of the notebook could not be imported here: %s", name, summary_of(error))
    if module is None:
        module = types.ModuleType(name)
        module.__file__ = file
        module.__package__ = name.rpartition(".")[0]
    sys.modules[name] = module
    return module


def _imported(name: str, file: str, digest: str) -> types.ModuleType:
    parent, _, last = name.rpartition(".")
    if parent:
        importlib.import_module(parent)
    sys.modules.pop(name, None)
    importlib.invalidate_caches()
    if digest and digest_of(file) == digest:
        is_package = Path(file).name == "__init__.py"
        spec = importlib.util.spec_from_file_location(
            name, file, submodule_search_locations=[str(Path(file).parent)] if is_package else None
        )
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        if parent:
            setattr(sys.modules[parent], last, module)
        return sys.modules[name]
    return importlib.import_module(name)


def _make_lru_cache(function: Any, maxsize: int | None, typed: bool) -> Any:
    return functools.lru_cache(maxsize, typed)(function)


def _set_class_state(cls: type, state: Any) -> type:
    """Fill a class that was unpickled; one of this process stays what it is."""
    if cls in _packed_here:
        return cls
    filled: type = cloudpickle.cloudpickle._class_setstate(cls, state)
    return filled

"""ggml's shared libraries through ctypes: where prebuilt ones are found, which is trusted, and how they are called.

Nobody has to compile: several PyPI wheels ship libggml. `PROVIDERS` lists them in order of preference; one is chosen
per process, after a self-test in a subprocess (a failed assertion inside ggml kills the process it happens in). Its
result is remembered in the user's cache folder, keyed by the files and the CPU.

VLAC_GGML_LIB names a folder with the libraries instead; VLAC_GGML_PROVIDER picks one provider by name.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import json
import os
import platform
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

from vlac.errors import EngineError


@dataclass(frozen=True)
class Provider:
    """A PyPI distribution that ships ggml: its name, top-level module, folder of the libraries, how to install it."""

    name: str
    module: str
    folder: str
    install: str


PROVIDERS = (
    Provider("transcribe-cpp-native", "transcribe_cpp_native", "_native", "pip install transcribe-cpp-native==0.4.1"),
    Provider("loom-py-rt", "loom", "", "pip install loom-py-rt==1.0.0rc19"),
    Provider("llama-cpp-python", "llama_cpp", "lib", "pip install llama-cpp-python==0.3.36 (compiles)"),
    Provider("libggml-python", "libggml", "lib64", "pip install libggml-python==0.20.2.post1"),
)

INSTALL = f"{PROVIDERS[0].install}, or name a folder of ggml libraries in VLAC_GGML_LIB"

# --- ABI ---------------------------------------------------------------------------------------------------------


class Tensor(ctypes.Structure):
    """struct ggml_tensor, 336 bytes, the same in ggml 0.15 to 0.26 (held by the self-test)."""

    _fields_ = (
        ("type", ctypes.c_int32),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int32),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * 10),
        ("view_src", ctypes.c_void_p),
        ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("name", ctypes.c_char * 64),
        ("extra", ctypes.c_void_p),
        ("padding", ctypes.c_char * 8),
    )


class InitParams(ctypes.Structure):
    """struct ggml_init_params, passed by value."""

    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


class _Feature(ctypes.Structure):
    _fields_ = (("name", ctypes.c_char_p), ("value", ctypes.c_char_p))


_KINDS: dict[str, Any] = {
    "v": None,
    "p": ctypes.c_void_p,
    "i": ctypes.c_int32,
    "l": ctypes.c_int64,
    "z": ctypes.c_size_t,
    "f": ctypes.c_float,
    "b": ctypes.c_bool,
    "s": ctypes.c_char_p,
    "I": InitParams,
}

# name without "ggml_" -> result and arguments, one letter each (see _KINDS); a missing restype would cut pointers
SIGNATURES: dict[str, str] = {
    "version": "s",
    "commit": "s",
    "log_set": "vpp",
    "init": "pI",
    "free": "vp",
    "tensor_overhead": "z",
    "graph_overhead_custom": "zzb",
    "new_graph_custom": "ppzb",
    "build_forward_expand": "vpp",
    "graph_n_nodes": "ip",
    "graph_node": "ppi",
    "graph_add_node": "vpp",
    "op_desc": "sp",
    "new_tensor_4d": "ppillll",
    "set_name": "pps",
    "set_input": "vp",
    "set_output": "vp",
    "nbytes": "zp",
    "is_contiguous": "bp",
    "type_name": "si",
    "blck_size": "li",
    "type_size": "zi",
    "op_name": "si",
    "quantize_chunk": "zipplllp",
    "add": "pppp",
    "sub": "pppp",
    "mul": "pppp",
    "div": "pppp",
    "mul_mat": "pppp",
    "get_rows": "pppp",
    "set_rows": "ppppp",
    "cast": "pppi",
    "cont": "ppp",
    "transpose": "ppp",
    "permute": "pppiiii",
    "reshape_4d": "pppllll",
    "view_1d": "ppplz",
    "view_4d": "pppllllzzzz",
    "concat": "ppppi",
    "cpy": "pppp",
    "repeat_4d": "pppllll",
    "pad": "pppiiii",
    "scale": "pppf",
    "scale_bias": "pppff",
    "norm": "pppf",
    "rms_norm": "pppf",
    "sqr": "ppp",
    "silu": "ppp",
    "sigmoid": "ppp",
    "tanh": "ppp",
    "relu": "ppp",
    "gelu_erf": "ppp",
    "swiglu_split": "pppp",
    "soft_max_ext": "ppppff",
    "rope_ext": "pppppiiiffffff",
    "flash_attn_ext": "ppppppfff",
    "backend_dev_count": "z",
    "backend_dev_by_type": "pi",
    "backend_dev_init": "pps",
    "backend_dev_backend_reg": "pp",
    "backend_reg_get_proc_address": "pps",
    "backend_load": "ps",
    "backend_free": "vp",
    "backend_graph_compute": "ipp",
    "backend_tensor_alloc": "ippp",
    "backend_cpu_buffer_type": "p",
    "backend_cpu_buffer_from_ptr": "ppz",
    "backend_alloc_ctx_tensors_from_buft": "ppp",
    "backend_buffer_set_usage": "vpi",
    "backend_buffer_free": "vp",
    "gallocr_new": "pp",
    "gallocr_alloc_graph": "bpp",
    "gallocr_get_buffer_size": "zpi",
    "gallocr_free": "vp",
}
# the first letter of a row is the result: a row "ppp" takes two pointers and gives one


def _prototype(code: str) -> tuple[Any, list[Any]]:
    return _KINDS[code[0]], [_KINDS[c] for c in code[1:]]


class Ggml:
    """Loaded libraries with every function of SIGNATURES as a method, and the CPU device.

    Attributes: directory, provider, version, commit, features ({"AVX512": "1", ...}), cpu_library (file name, empty for
    builds with one CPU variant inside).
    """

    def __init__(self, directory: Path, cpu_library: str, provider: str = "") -> None:
        if _uses_openmp(directory, cpu_library):
            # libgomp reads this in its constructor: spinning threads cost up to ten times when cores are shared
            os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        self.directory, self.cpu_library, self.provider = directory, cpu_library, provider
        self._libraries = [ctypes.CDLL(str(library(directory, stem))) for stem in ("ggml-base", "ggml")]
        self._log = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)
        self.log_set(ctypes.cast(self._log, ctypes.c_void_p), None)
        if cpu_library:
            self.backend_load(str(directory / cpu_library).encode())
        self.device = self.backend_dev_by_type(0)
        if not self.device:
            raise EngineError(f"{directory}: ggml offers no CPU device")
        self.version = self._text("version")
        self.commit = self._text("commit")
        self.features = dict(self._read_features())

    def __getattr__(self, name: str) -> Any:
        code = SIGNATURES.get(name)
        if code is None:
            raise AttributeError(name)
        for library in self._libraries:
            function = getattr(library, "ggml_" + name, None)
            if function is not None:
                function.restype, function.argtypes = _prototype(code)
                setattr(self, name, function)
                return function
        raise EngineError(f"{self.directory}: this ggml has no function ggml_{name}", remedy=INSTALL)

    def _text(self, name: str) -> str:
        try:
            return str(getattr(self, name)().decode())
        except EngineError:
            return "unknown"

    @cached_property
    def _set_n_threads(self) -> Any:
        return self.cpu_function("ggml_backend_set_n_threads", "vpi")

    def cpu_function(self, name: str, code: str) -> Any:
        """A function of the CPU backend, which is not visible to the dynamic linker in every build."""
        register = self.backend_dev_backend_reg(self.device)
        address = self.backend_reg_get_proc_address(register, name.encode())
        if not address:
            raise EngineError(f"{self.directory}: this ggml has no CPU function {name}", remedy=INSTALL)
        result, arguments = _prototype(code)
        return ctypes.CFUNCTYPE(result, *arguments)(address)

    def _read_features(self) -> Iterator[tuple[str, str]]:
        address = self.cpu_function("ggml_backend_get_features", "pp")(self.backend_dev_backend_reg(self.device))
        while address:
            feature = _Feature.from_address(address)
            if not feature.name:
                return
            yield feature.name.decode(), feature.value.decode()
            address += ctypes.sizeof(_Feature)

    def backend(self, threads: int) -> int:
        """A CPU backend with that many threads; free it with backend_free."""
        backend = self.backend_dev_init(self.device, None)
        if not backend:
            raise EngineError(f"{self.directory}: ggml could not start its CPU backend")
        self.set_threads(backend, threads)
        return int(backend)

    def set_threads(self, backend: int, threads: int) -> None:
        """How many threads the next graphs of a backend use; cheap."""
        self._set_n_threads(backend, threads)


# --- finding -----------------------------------------------------------------------------------------------------

_SUFFIX = {"win32": ("", ".dll"), "darwin": ("lib", ".dylib")}.get(sys.platform, ("lib", ".so"))


def library(directory: Path, stem: str) -> Path:
    """File of libggml ("ggml") or one of its parts ("ggml-base") as this system names it."""
    return directory / f"{_SUFFIX[0]}{stem}{_SUFFIX[1]}"


def _has_libraries(directory: Path) -> bool:
    return all(library(directory, stem).is_file() for stem in ("ggml-base", "ggml"))


def cpu_variants(directory: Path) -> list[Path]:
    """CPU libraries to choose from at run time; none when the only one is linked to libggml itself."""
    return sorted(p for p in directory.glob(f"{_SUFFIX[0]}ggml-cpu-*") if p.suffix in (".so", ".dll", ".dylib"))


def _spec(module: str) -> ModuleSpec | None:
    try:
        return importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return None  # something odd of that name is loaded


def find() -> list[tuple[Provider, Path]]:
    """Installed providers with their folders, best first; imports nothing and loads nothing."""
    wanted, folder = os.environ.get("VLAC_GGML_PROVIDER", ""), os.environ.get("VLAC_GGML_LIB", "")
    if folder:
        named = Provider(wanted or "VLAC_GGML_LIB", "", "", "")
        return [(named, Path(folder))] if _has_libraries(Path(folder)) else []
    found = []
    for provider in PROVIDERS:
        if wanted in ("", provider.name):
            spec = _spec(provider.module)
            for location in (spec.submodule_search_locations or []) if spec else []:
                directory = Path(location) / provider.folder
                if _has_libraries(directory):
                    found.append((provider, directory))
                    break
    return found


def missing() -> str:
    """Empty when a provider is installed, else what to do."""
    if find():
        return ""
    folder, wanted = os.environ.get("VLAC_GGML_LIB"), os.environ.get("VLAC_GGML_PROVIDER")
    if folder:
        return f"VLAC_GGML_LIB={folder} holds no {library(Path(), 'ggml-base')} and {library(Path(), 'ggml')}"
    if wanted:
        names = ", ".join(p.name for p in PROVIDERS)
        return f"VLAC_GGML_PROVIDER={wanted} is not installed (known: {names})"
    return f"no ggml library found: {INSTALL}"


def _uses_openmp(directory: Path, cpu_library: str) -> bool:
    """Whether the CPU library imports an entry point of gcc's or clang's OpenMP runtime."""
    path = directory / cpu_library if cpu_library else library(directory, "ggml-cpu")
    code = path.read_bytes() if path.is_file() else b""
    return b"GOMP_parallel" in code or b"__kmpc_fork_call" in code


# --- trusting ----------------------------------------------------------------------------------------------------

_CHECK_VERSION = "1"
"""Part of the cache key: raise it when vlac.engines.ggml_selftest checks more than before."""


def _cpu_identity() -> str:
    """What decides which variant runs: the CPU's model and feature flags."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.machine() + platform.processor()
    flags = {line for line in text.splitlines() if line.startswith(("flags", "Features", "model name", "CPU part"))}
    return platform.machine() + "".join(sorted(flags))


def _cache_file(directory: Path) -> Path | None:
    """Where the result of a folder's self-test is remembered; None when there is no home to remember it in."""
    state = [_CHECK_VERSION, str(directory.resolve()), _cpu_identity()]
    for path in sorted(directory.glob(f"{_SUFFIX[0]}ggml*")):
        stat = path.stat()
        state += [path.name, str(stat.st_size), str(stat.st_mtime_ns)]
    key = hashlib.sha256("\n".join(state).encode()).hexdigest()[:32]
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    except RuntimeError:
        return None
    return base / "vlac" / f"ggml-{key}.json"


def check(directory: Path) -> str:
    """The name of the CPU library to load from a folder ("" if it has one built in), after its self-test passed.

    The self-test runs in a subprocess once; later calls read its remembered result. Raises EngineError with what it
    said.
    """
    cache = _cache_file(directory)
    if cache is not None:
        try:
            known = json.loads(cache.read_text(encoding="utf-8"))["cpu_library"]
            if isinstance(known, str) and (not known or (directory / known) in cpu_variants(directory)):
                return known
        except (OSError, ValueError, KeyError, TypeError):
            pass  # nothing remembered, or not by us: run the self-test
    chosen = _check_in_subprocess(directory)
    if cache is not None:
        _remember(cache, chosen)
    return chosen


def _check_in_subprocess(directory: Path) -> str:
    """The best CPU library that passes. A variant for an instruction set can be wrong on some CPUs that have it (ggml
    0.26's q4_K with SVE vectors of 512 bits): then the next best is tried."""
    failed: dict[str, str] = {}
    while True:
        passed, name, said = _run_selftest(directory, list(failed))
        if passed:
            return name
        if not name or name in failed:  # one library without variants, or none left
            reasons = "; ".join(f"{v} {why}" for v, why in failed.items()) or said
            raise EngineError(f"{directory}: the ggml self-test failed {reasons}")
        failed[name] = said


SELFTEST_WALL_S = 900
"""A self-test that hangs ends; one that computes for ever ends sooner, by its CPU time (ggml_selftest.CPU_S). On a
machine that is busy, emulated or was suspended it only takes longer."""


def _run_selftest(directory: Path, refused: list[str]) -> tuple[bool, str, str]:
    """(it passed, the CPU library that was tried, what it said)."""
    root = Path(__file__).resolve().parents[2]
    path = os.pathsep.join([str(root), *(str(Path(p).resolve()) for p in sys.path if p)])
    command = [sys.executable, "-m", "vlac.engines.ggml_selftest", str(directory.resolve()), *refused]
    try:
        done = subprocess.run(
            # -m looks into the current folder first: let that be ours, not one that happens to hold a "vlac"
            command,
            cwd=root,
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            timeout=SELFTEST_WALL_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EngineError(f"{directory}: the ggml self-test could not be run: {error}") from None
    lines = done.stdout.strip().splitlines()
    told: dict[str, str] = {}
    for line in lines:
        try:
            told.update(json.loads(line))
        except (ValueError, TypeError):
            continue  # a library's own words
    if "cpu_library" in told:
        return True, told["cpu_library"], ""
    said = (done.stderr.strip() or (lines[-1] if lines else "nothing")).splitlines()[-1]
    return False, told.get("trying", ""), f"(exit {done.returncode}): {said}"


def _remember(cache: Path, chosen: str) -> None:
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        temporary = cache.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps({"cpu_library": chosen}), encoding="utf-8")
        temporary.replace(cache)
    except OSError:
        pass  # a read-only home costs a self-test per start, nothing else


# --- loading -----------------------------------------------------------------------------------------------------

_loaded: Ggml | None = None
_lock = threading.Lock()


def load() -> Ggml:
    """The process's ggml: the first provider of the chain whose self-test passes; EngineError names each refusal.

    A second provider cannot be loaded into one process: its libraries would bind to the first one's by name.
    """
    global _loaded
    with _lock:
        if _loaded is None:
            _loaded = _load_first()
        return _loaded


def _load_first() -> Ggml:
    reason = missing()
    if reason:
        raise EngineError(f"engine ggml: {reason}", remedy=INSTALL)
    refused = []
    for provider, directory in find():
        try:
            return Ggml(directory, check(directory), provider.name)
        except (EngineError, OSError) as error:
            refused.append(f"{provider.name}: {error.message if isinstance(error, EngineError) else error}")
    raise EngineError(f"engine ggml: no usable library; {'; '.join(refused)}", remedy=INSTALL)


def default_threads() -> int:
    """CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

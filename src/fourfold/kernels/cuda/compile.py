"""Compiling CUDA C++ at first use and launching it: NVRTC and the driver, both by way of ctypes.

torch's CUDA builds bring NVRTC along, so nothing has to be installed: no toolkit, no compiler, no headers.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES


class CompilerMissingError(RuntimeError):
    """NVRTC or the driver's library cannot be found or does not do what is needed."""


@functools.cache
def driver() -> ctypes.CDLL:
    """libcuda."""
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise CompilerMissingError(f"the CUDA driver's library: {error}") from None


def _load_nvrtc(path: str) -> ctypes.CDLL:
    # NVRTC opens its builtins by name when it compiles, and finds them only if they are loaded already.
    for builtins in Path(path).parent.glob("libnvrtc-builtins.so.*"):
        ctypes.CDLL(str(builtins))
    return ctypes.CDLL(path)


@functools.cache
def _nvrtc() -> ctypes.CDLL:
    name = f"libnvrtc.so.{(torch.version.cuda or '*').split('.')[0]}"
    packages = Path(torch.__file__).parent.parent / "nvidia"
    for candidate in (*map(str, packages.glob(f"*/lib/{name}")), name):
        try:
            return _load_nvrtc(candidate)
        except OSError:
            continue
    raise CompilerMissingError(f"{name} (it comes with torch's CUDA builds) was not found")


def check(status: int, what: str) -> None:
    """Raises:
    RuntimeError: the driver refused.
    """
    if status:
        text = ctypes.c_char_p()
        driver().cuGetErrorString(status, ctypes.byref(text))
        raise RuntimeError(f"{what}: {(text.value or b'unknown error').decode()} ({status})")


def stream(device: int) -> int:
    """torch's current stream of a device, as the driver knows it."""
    # What Triton and Inductor ask, too: the public `current_stream` takes 10 us to make an object of it.
    return int(torch._C._cuda_getCurrentRawStream(device))


def portable_architecture(capability: tuple[int, int]) -> str:
    """What to compile for where no instructions of one architecture are used."""
    # Code for 8.0 runs on every 8.x, but on none of 9.0 and later.
    return "sm_80" if capability[0] == 8 else "sm_{}{}".format(*capability)


def bind_context(device: int) -> None:
    """Make torch's context of a device current in this thread, if none is.

    (A thread whose first work comes from a cache of memory has none: torch binds it with the first call that
    needs one, autograd's threads included.)
    """
    current = ctypes.c_void_p()
    check(driver().cuCtxGetCurrent(ctypes.byref(current)), "the current context")
    if current.value is None:
        check(driver().cuDevicePrimaryCtxRetain(ctypes.byref(current), device), "a context")
        check(driver().cuCtxSetCurrent(current), "a context")


@functools.cache
def cubin(text: str, architecture: str, definitions: tuple[str, ...]) -> bytes:
    """Compiled code.

    Raises:
        CompilerMissingError: there is no NVRTC, or it knows no such architecture.
    """
    nvrtc = _nvrtc()
    program = ctypes.c_void_p()
    if nvrtc.nvrtcCreateProgram(ctypes.byref(program), text.encode(), b"kernel.cu", 0, None, None):
        raise CompilerMissingError("NVRTC made no program")
    try:
        options = [f"--gpu-architecture={architecture}", "--std=c++17", *(f"-D{d}" for d in definitions)]
        array = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        status = nvrtc.nvrtcCompileProgram(program, len(options), array)
        size = ctypes.c_size_t()
        if status:
            nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value)
            nvrtc.nvrtcGetProgramLog(program, log)
            raise CompilerMissingError(f"NVRTC for {architecture}: {log.value.decode()[-2000:]}")
        nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size))
        code = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetCUBIN(program, code)
        return code.raw
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


class Launcher:
    """Launches one kernel whose arguments are tensor maps, then pointers, then ints.

    The memory of the arguments is kept (making ctypes' arrays anew costs more than the launch); so a
    launcher belongs to one thread.
    """

    def __init__(self, kernel: ctypes.c_void_p, device: int, maps: int, pointers: int, ints: int) -> None:
        self.kernel = kernel
        self.device = device
        self._maps = maps
        self._pointers = (ctypes.c_uint64 * pointers)()
        self._ints = (ctypes.c_int * ints)()
        places = [
            *(ctypes.addressof(self._pointers) + 8 * i for i in range(pointers)),
            *(ctypes.addressof(self._ints) + 4 * i for i in range(ints)),
        ]
        self._places = (ctypes.c_void_p * (maps + len(places)))(*(0,) * maps, *places)
        self._launch = driver().cuLaunchKernel

    def __call__(
        self,
        grid: tuple[int, int, int],
        threads: int,
        shared_bytes: int,
        stream: int,
        maps: Sequence[ctypes.Array[ctypes.c_char]],
        pointers: Sequence[int],
        ints: Sequence[int],
    ) -> None:
        bind_context(self.device)
        for i, each in enumerate(maps):
            self._places[i] = ctypes.addressof(each)
        self._pointers[:] = list(pointers)
        self._ints[:] = list(ints)
        check(
            self._launch(
                self.kernel, *grid, threads, 1, 1, shared_bytes, ctypes.c_void_p(stream), self._places, None
            ),
            "launching a kernel",
        )


_kept = threading.local()


def launchers() -> dict[Any, Launcher]:
    """This thread's launchers, by whatever tells them apart."""
    if not hasattr(_kept, "launchers"):
        _kept.launchers = {}
    found: dict[Any, Launcher] = _kept.launchers
    return found


@functools.cache
def function(code: bytes, name: str, shared_bytes: int, device: int) -> ctypes.c_void_p:
    """A kernel of compiled code on a device, whose context must be current."""
    bind_context(device)
    module, found = ctypes.c_void_p(), ctypes.c_void_p()
    check(driver().cuModuleLoadData(ctypes.byref(module), code), "loading a kernel")
    check(driver().cuModuleGetFunction(ctypes.byref(found), module, name.encode()), f"kernel {name}")
    status = driver().cuFuncSetAttribute(found, _MAX_DYNAMIC_SHARED, shared_bytes)
    check(status, f"{shared_bytes} bytes of shared memory for {name}")
    return found


def readable(x_Sc: torch.Tensor) -> torch.Tensor:
    """The rows as kernels want them: in one piece each, at multiples of 16 bytes; copied if need be."""
    if x_Sc.stride(1) == 1 and x_Sc.stride(0) % 8 == 0 and x_Sc.data_ptr() % 16 == 0:
        return x_Sc
    S, columns = x_Sc.shape
    copy = x_Sc.new_empty(S, columns + -columns % 8)[:, :columns]
    return copy.copy_(x_Sc)


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor at a multiple of 16 bytes; a copy where it is not."""
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()

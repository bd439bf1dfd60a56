"""On which device the tests of `run/` run operators: this CPU, a graphics card, or what stands for one on this CPU.

The tests hand over tensors on the CPU. Where "this machine" is a card, an operator without a target, or for ``"llvm"``, is one
for the card, and a call copies tensors there and back: with their strides, their distance from an aligned address and the
memory that they share, so that views, gaps and overlaps are on the card what they are here.
"""

from __future__ import annotations

import functools
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace

import torch
import tvm_ffi

#: ``emulated`` runs the text for cards in the emulator, which takes seconds for each operator. ``mirrored`` calls the CPU's
#: kernels as a card's are called: it tests this module.
DEVICES = ("cpu", "cuda", "emulated", "mirrored")
#: The card that is emulated.
EMULATED = "cuda -arch=sm_80"

#: Files, or tests of them, that are not run on cards, and why.
NOT_ON_CARDS = {
    "test_attention_tuning.py": "names tilings of CPUs; test_cards.py has the clock of cards",
    "test_bitlinear.py": "layers follow their tensors, which are on the CPU",
    "test_cache_cli.py": "starts processes, which are for this CPU",
    "test_cli.py": "the commands have tests of their own",
    "test_docs.py": "the documents are about any machine",
    "test_dynamic_quantization.py::test_what_is_quantized_exactly_is_bit_equal_to_int8": "int8 goes to tensor cores there, "
    "whose sums are scaled in another order",
    "test_flash_atten.py::test_addresses_beyond_32_bits": "4 GB would go there and back",
    "test_flash_atten_calls.py": "what is wrong is refused before a kernel runs; processes are for this CPU",
    "test_float_activations.py::test_slices_keep_what_float32_sums_keep": "slices are for CPUs with VNNI",
    "test_float_activations.py::test_pairs_of_bfloat16_are_exact_but_for_the_sums": "pairs are for CPUs with AVX512-BF16",
    "test_integration_bitnet_layers.py": "layers follow their tensors, which are on the CPU",
    "test_integration_bitnet_model.py": "models are on the CPU there",
    "test_integration_bitnet_scripts.py": "scripts run models on the CPU there",
    "test_linear.py": "layers follow their tensors, which are on the CPU",
    "test_linear_autograd.py": "layers follow their tensors, which are on the CPU",
    "test_linear_compile.py": "layers follow their tensors, which are on the CPU",
    "test_quantize_model.py": "layers follow their tensors, which are on the CPU",
    "test_matmul.py::test_targets": "compares CPUs",
    "test_matmul.py::test_bits_do_not_depend_on_run_or_threads": "threads are the CPU's",
    "test_matmul.py::test_default_device_is_of_no_account": "a default device of cuda is in test_cuda_streams.py",
    "test_operator.py::test_the_script_the_schedule_and_the_code_can_be_read": "reads LLVM's code",
    "test_operator.py::test_names_that_are_not_taken": "names targets of CPUs",
    "test_operator.py::test_old_forms_of_a_target": "names targets of CPUs",
    "test_operator.py::test_a_damaged_record_counts_as_none": "writes a tiling of CPUs",
    "test_operator.py::test_a_record_with_another_content_counts_as_none": "writes a tiling of CPUs",
    "test_operator.py::test_a_record_makes_a_store_as_private_as_it_must_be": "writes a tiling of CPUs",
    "test_operator.py::test_the_log_says_what_is_built_and_where": "starts a process, which is for this CPU",
    "test_operator.py::test_a_compiler_may_have_options": "is about the C compiler",
    "test_operator.py::test_a_failing_compiler_shows_its_command_and_output": "is about the C compiler",
    "test_operator_cache.py": "starts processes, which are for this CPU; test_cuda_operator.py saves and loads",
    "test_promised_instructions.py": "reads x86-64",
    "test_public_api.py::test_targets_that_are_this_machine": "names this CPU",
    "test_public_api.py::test_the_source_is_text": "reads LLVM's code",
    "test_public_api.py::test_construction_on_no_device_and_without_gradients": "a default device of cuda is elsewhere",
    "test_public_api.py::test_latency_is_in_milliseconds": "watches the clock of CPUs",
    "test_public_api.py::test_weight_transform_takes_unsigned_codes": "cards read so small a weight as it is packed",
    "test_python_api.py": "compares documents",
    "test_quickstart.py": "starts a process, which is for this CPU",
    "test_rpc.py": "a server of TVM measures CPUs",
    "test_threads_processes.py": "CUDA cannot be used after a fork; threads are in test_cuda_streams.py",
    "test_tilings.py": "names targets of CPUs; test_matmul.py has every tiling of this machine",
    "test_transformers.py": "models are loaded on the CPU there; test_cuda_transformers.py has them on a card",
    "test_transformers_bitnet.py": "the same",
    "test_transformers_folders.py": "the same",
    "test_tuning.py": "test_cuda_tuning.py has kernels that crash a card",
    "test_warm_start.py": "starts processes, which are for this CPU; test_cuda_operator.py does so for a card",
    "test_wrong_uses.py": "what is wrong is refused before a kernel runs; devices are in test_cuda_streams.py",
}
#: What the emulator leaves out besides: it has no time, and children that measure have no emulator.
NOT_EMULATED = {
    "test_dynamic_quantization.py::test_tuning",
    "test_flash_atten.py",
    "test_operator.py::test_latency_is_measured_in_milliseconds",
    "test_public_api.py::test_enable_tuning_takes_a_record_and_never_measures",
    "test_public_api.py::test_tuning_of_a_tiny_operator",
    "test_splitk.py::test_tuning",
}
#: Files of `run/` that are about cards alone.
ONLY_ON_CARDS = re.compile(r"test_cuda_\w+\.py$")
#: A parameter of a test with this name is a target; these are other names of this machine.
_TARGETS = ("target", "mcpu")
_THIS_MACHINE = (None, "auto", "llvm")
#: What this run was asked for.
_current = ["cpu"]


def wanted(device: str | None, marks: str) -> str:
    """The device that the options of a run ask for: ``-m cuda`` alone means the card."""
    return device or ("cuda" if re.search(r"(?<!not )\bcuda\b", marks) else "cpu")


def why_not(path: str, name: str, parameters: dict[str, object]) -> str | None:
    """Why a test of `run/` says nothing about cards; None where it does.

    Parameters
    ----------
    path : str
        The name of its file.
    name : str
        The function's.
    parameters : dict
        What it is parametrised by.
    """
    reason = NOT_ON_CARDS.get(path) or NOT_ON_CARDS.get(f"{path}::{name}")
    if _current[0] == "emulated" and not NOT_EMULATED.isdisjoint((path, f"{path}::{name}")):
        reason = "takes time, which the emulator has not"
    if reason is None and any(parameters.get(key) not in _THIS_MACHINE for key in _TARGETS):
        reason = "is for another CPU"
    return reason


def shift(dtype: torch.dtype) -> int:
    """Elements between an aligned address and one where an output may begin: cards refuse what 16 does not divide."""
    return 1 if _current[0] != "cuda" else 16 // dtype.itemsize


# -- tensors ---------------------------------------------------------------------------------------------------------------


class Mirror:
    """Copies of CPU tensors on a device: what shares memory here does so there."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._storages: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}

    def of(self, value: object) -> object:
        """The copy of a dense CPU tensor, with its offset, strides and class; anything else as it is."""
        if not _can_be_copied(value):
            return value
        storage = value.untyped_storage()
        key = (storage.data_ptr(), storage.nbytes())
        if key not in self._storages:
            here = torch.empty(0, dtype=torch.uint8, device="cpu").set_(storage)
            there = torch.empty(len(here), dtype=torch.uint8, device=self.device).copy_(here)
            self._storages[key] = here, there
        place = self._storages[key][1].untyped_storage()
        copy = torch.empty(0, dtype=value.dtype, device=self.device)
        copy.set_(place, value.storage_offset(), value.size(), value.stride())
        copy = torch._neg_view(copy) if value.is_neg() else copy
        if isinstance(value, torch.nn.Parameter):
            return torch.nn.Parameter(copy, requires_grad=value.requires_grad)
        return copy.requires_grad_() if value.requires_grad else copy

    def bring_back(self) -> None:
        """Write what has changed on the device, wherever in the memory of a tensor, to where it came from."""
        for here, there in self._storages.values():
            found = there.to("cpu")
            if not torch.equal(found, here):
                here.copy_(found)


def _can_be_copied(value: object) -> bool:
    return (
        type(value) in (torch.Tensor, torch.nn.Parameter)
        and value.device.type == "cpu"
        and value.layout is torch.strided
    )


def mirrored_call(forward: Callable[..., torch.Tensor], device: torch.device) -> Callable[..., torch.Tensor]:
    """`forward`, a method of operators on `device`, for tensors on the CPU; where one is on a card, all are handed on."""

    @functools.wraps(forward)
    def call(self: object, *args: object, **kwargs: object) -> torch.Tensor:
        values = [*args, *kwargs.values()]
        on_card = any(isinstance(value, torch.Tensor) and value.is_cuda for value in values)
        if on_card or not any(map(_can_be_copied, values)):
            return forward(self, *args, **kwargs)
        mirror = Mirror(device)
        copies = [mirror.of(value) for value in values]
        result = forward(self, *copies[: len(args)], **dict(zip(kwargs, copies[len(args) :], strict=True)))
        mirror.bring_back()
        given = [value for value, copy in zip(values, copies, strict=True) if copy is result]
        return given[0] if given else result.to("cpu", copy=True)

    return call


# -- operators -------------------------------------------------------------------------------------------------------------


def install(device: str, targets: Iterable[object] = _THIS_MACHINE) -> None:
    """Let operators for this machine be operators for a device, in this process."""
    import bitblas

    _current[0] = device
    if device == "cpu":
        return
    if device in ("cuda", "emulated"):
        _redirect(tuple(targets), "cuda" if device == "cuda" else EMULATED)
    if device == "emulated":
        emulate(setattr)
        return
    place = torch.device("cuda" if device == "cuda" else "cpu")
    for kind in (bitblas.Matmul, bitblas.FlashAtten):
        kind.forward = kind.__call__ = mirrored_call(kind.forward, place)


def _redirect(names: tuple[object, ...], card: str) -> None:
    """Resolve the names of this machine to a card, in every module that asks for a target."""
    from bitblas import target

    real = target.resolve_target

    @functools.wraps(real)
    def resolve(asked: object = None) -> target.Target:
        return real(card if isinstance(asked, str | None) and asked in names else asked)

    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "bitblas" and getattr(module, "resolve_target", None) is real:
            module.resolve_target = resolve


# -- the emulator ----------------------------------------------------------------------------------------------------------


#: The emulator runs one kernel at a time.
_emulating = threading.Lock()


class _Checked:
    """A library of the emulator, of which each call is watched for accesses beside its tensors."""

    def __init__(self, library: object) -> None:
        self._library = library

    def __getitem__(self, name: str) -> Callable[..., None]:
        import emulator

        function = self._library[name]

        def call(*operands: torch.Tensor) -> None:
            with _emulating, torch.inference_mode():  # where tensors of that mode may be written, too
                emulator.run(function, *operands, seeds=(0,))

        return call


class _Rooms:
    """Room to share sums in: of any content; counters are 0 before and, which is looked at here, after each kernel."""

    def __init__(self) -> None:
        self._counters = torch.zeros(0, dtype=torch.int32)

    def get(self, device: int, num_sums: int, num_counters: int) -> tuple[torch.Tensor, torch.Tensor]:
        assert not self._counters.any(), "a kernel has left a counter that is not 0"
        self._counters = torch.zeros(num_counters, dtype=torch.int32, device="cpu")
        return torch.full((num_sums,), torch.nan, device="cpu"), self._counters


def emulate(replace: Callable[[object, str, object], None]) -> None:
    """Let operators for cards be built for the emulator and take tensors on the CPU.

    What is replaced: nvcc, the loader, the room for sums, and of the door the device. All else is what cards get.

    Parameters
    ----------
    replace : callable
        Sets an attribute of a module: `setattr`, or that of a monkeypatch.
    """
    import emulator

    from bitblas import build, env, runtime
    from bitblas.cuda import compile as cuda_compile
    from bitblas.ops import attention, matmul
    from bitblas.ops.arguments import Door
    from bitblas.ops.cuda_arguments import ALIGNMENT, CudaDoor
    from bitblas.ops.cuda_attention_arguments import CudaAttentionDoor

    class EmulatedDoor(CudaDoor):
        device = "cpu"

        def enter(self, *arguments: object) -> tuple[int, list[torch.Tensor], torch.Tensor]:
            m, operands, out = Door.enter(self, *arguments)
            return m, [t.clone() if t.data_ptr() % ALIGNMENT else t for t in operands], out

        def enter_bound(self, *arguments: object) -> tuple[int, list[torch.Tensor], torch.Tensor, object] | None:
            entered = Door.enter_bound(self, *arguments)
            if entered is None:
                return None
            m, operands, out, shape = entered
            return m, [t.clone() if t.data_ptr() % ALIGNMENT else t for t in operands], out, shape

    class EmulatedAttentionDoor(CudaAttentionDoor):
        device = "cpu"

        def _check_device(self, q: torch.Tensor) -> None:
            """Any CPU emulates any card."""

    def compile_library(_: str, source: Path, library: Path, arch: str) -> dict[str, object]:
        rooms = env.CACHE_DIR.get() / "emulator"
        rooms.mkdir(exist_ok=True)
        shutil.copy(emulator.build(source.read_text(), rooms, arch), library)
        return {}

    def load_module(path: str) -> _Checked:
        emulator.load(next((env.CACHE_DIR.get() / "emulator").glob("[!l]*.so")))  # and with it what all of them need
        return _Checked(tvm_ffi.load_module(path))

    replace(cuda_compile, "find_cuda_compiler", lambda: "the emulator")
    replace(cuda_compile, "compile_library", compile_library)
    replace(cuda_compile, "nvcc_version", lambda _: "")
    replace(runtime, "tvm_ffi", SimpleNamespace(load_module=load_module))
    replace(runtime, "workspaces", _Rooms())
    replace(matmul, "CudaDoor", EmulatedDoor)
    replace(attention, "CudaAttentionDoor", EmulatedAttentionDoor)
    replace(build, "find_cuda_compiler", cuda_compile.find_cuda_compiler)

"""The GPUs of this machine: what the driver shows of them, whether torch can use them, and what it needs to compile."""

from dataclasses import dataclass

from basics import machine
from basics.errors import ConfigError

ON_THE_CPU = "to run on the CPU all the same, hide the GPU: --device cpu, or CUDA_VISIBLE_DEVICES=-1"


@dataclass(frozen=True)
class Graphics:
    """What the driver and torch say of the GPUs of this machine.

    shown: the GPU that the driver shows, "" for none. driver: the CUDA version that the driver supports, major and
    minor. torch, cuda: torch's version, and the CUDA version that it was built for, "" for none. count, name, memory
    (bytes), bf16 (whether it multiplies that fast), capability: of the GPUs that torch sees, and of the first of them.
    kernels: what torch was built for (`torch.cuda.get_arch_list`). reason: why torch sees none, in its words.
    """

    shown: str = ""
    driver: tuple[int, int] | None = None
    torch: str = ""
    cuda: str = ""
    count: int = 0
    name: str = ""
    memory: int = 0
    bf16: bool = True
    capability: tuple[int, int] = (0, 0)
    kernels: tuple[str, ...] = ()
    reason: str = ""

    @classmethod
    def read(cls) -> "Graphics":
        """Those of this machine. torch is imported only where the driver shows one."""
        if not machine.has_gpu():
            return cls()
        import torch

        shown = machine.gpu_name() or "a device file"
        known = {"shown": shown, "torch": torch.__version__, "cuda": torch.version.cuda or torch.version.hip or ""}
        if torch.cuda.is_available():
            card = torch.cuda.get_device_properties(0)
            known |= {"count": torch.cuda.device_count(), "name": card.name, "memory": card.total_memory}
            known["bf16"] = torch.cuda.is_bf16_supported(including_emulation=False)
            known |= {"capability": (card.major, card.minor), "kernels": tuple(torch.cuda.get_arch_list())}
        else:
            try:
                torch.cuda.init()
            except (RuntimeError, AssertionError) as error:  # the latter where torch was built without CUDA
                known["reason"] = str(error).partition("\n")[0]
        return cls(driver=machine.driver_cuda(), **known)

    def check(self) -> str:
        """One line on the GPU. Raises ConfigError, with the way out, for one that the driver shows and that torch does
        not see or has no kernels for."""
        if not self.shown and not self.count:
            return "none; models run on the CPU"
        drives = f", driver for CUDA {'.'.join(map(str, self.driver))}" if self.driver else ""
        if not self.count:
            what = f"the driver shows a GPU ({self.shown}{drives}) and torch {self.torch} does not see it"
            build = tuple(map(int, self.cuda.split(".")[:2])) if self.cuda else None
            if build is None:
                way = "this torch is built without CUDA: install one that is (https://pytorch.org/get-started/locally)"
            elif self.driver and self.driver[0] < build[0]:
                way = f"it is built for CUDA {self.cuda}: update the driver, or install torch for CUDA {self.driver[0]}"
            else:
                way = f"it says: {self.reason}"
            raise ConfigError(f"{what}; {way}; {ON_THE_CPU}")
        if self.kernels and not any(_runs(kernel, self.capability) for kernel in self.kernels):
            raise ConfigError(
                f"torch {self.torch} has no kernels for {self.name} (compute capability "
                f"{'.'.join(map(str, self.capability))}, built for {', '.join(self.kernels)}): install an older build "
                f"of torch, or one for an older CUDA; {ON_THE_CPU}"
            )
        several = f"{self.count} x " if self.count > 1 else ""
        return f"{several}{self.name}, {self.memory / 1e9:.0f} GB{drives}; torch {self.torch}"


def _runs(kernel: str, capability: tuple[int, int]) -> bool:
    """Whether kernels of "sm_80" run on a GPU of this capability (same major version, at most its minor), or those of
    "compute_80", which the driver compiles, on it and all later ones. AMD's names ("gfx90a") are not judged."""
    form, _, number = kernel.partition("_")
    digits = number.rstrip("af")  # sm_90a, sm_100f
    if form not in ("sm", "compute") or not digits.isdecimal():
        return True
    built = (int(digits[:-1]), int(digits[-1]))
    return built <= capability and (form == "compute" or built[0] == capability[0])


def missing_to_compile(device: str) -> str:
    """What torch.compile lacks to build kernels for a device, "" if nothing. torch is imported only for a GPU."""
    missing = machine.missing_to_compile(device)
    if device == "cuda":
        from torch.utils._triton import has_triton

        if not has_triton():
            missing = " and ".join(filter(None, ("Triton on a GPU of compute capability 7.0 or later", missing)))
    return missing

"""Maps kernels/ to fgfast.kernels and builds fgfast._native from csrc/; everything else stands in pyproject.toml.

FGFAST_CUDA=0 or 1 says whether the extension has its CUDA part (default: where nvcc works), FGFAST_CUDA_ARCHS
("80 90") for which compute capabilities (default: all that this nvcc knows from 8.0 on; later ones compile its PTX).
FGFAST_NATIVE=0 leaves the extension out, FGFAST_SANITIZE=1 builds its CPU code for the address and the undefined
behaviour sanitizer.
"""

import copy
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError

SANITIZE = os.environ.get("FGFAST_SANITIZE") == "1"
WARNINGS = ["-Wall", "-Wextra", "-Werror"]
# Each operation is one rounding, on both processors: masks must not depend on where they are made.
COMMON = ["-std=c++17", "-O3"]


def nvcc() -> str | None:
    """The CUDA compiler to use, or None for a build without CUDA."""
    wanted = os.environ.get("FGFAST_CUDA", "")
    if wanted == "0" or SANITIZE:
        return None
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    found = shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")
    if wanted == "1" and found is None:
        sys.exit("FGFAST_CUDA=1 and no nvcc was found: put it on the PATH or set CUDA_HOME.")
    return found


def architectures(compiler: str) -> list[str]:
    """Compute capabilities to build for, without the dot, ascending."""
    wanted = os.environ.get("FGFAST_CUDA_ARCHS", "").replace(".", "").replace(",", " ").replace(";", " ").split()
    listed = subprocess.run([compiler, "--list-gpu-arch"], check=True, capture_output=True, text=True).stdout
    known = {line.removeprefix("compute_") for line in listed.split()}
    if unknown := [a for a in wanted if a not in known]:
        sys.exit(f"FGFAST_CUDA_ARCHS names {unknown[0]}, which {compiler} does not know: choose of {sorted(known)}.")
    return sorted(wanted or (a for a in known if a.isdigit() and int(a) >= 80), key=int)


class Build(build_ext):
    """Compiles what the host compiler cannot: the .cu files, by nvcc."""

    def build_extension(self, ext: Extension) -> None:
        """Build with CUDA where that works, else without."""
        compiler = nvcc()
        if compiler is not None:
            try:
                return super().build_extension(self.with_cuda(ext, compiler))
            except (CompileError, LinkError) as error:
                if os.environ.get("FGFAST_CUDA") == "1":
                    raise
                self.warn(f"{ext.name} is built without its CUDA part, which failed: {error}")
        super().build_extension(ext)

    def with_cuda(self, ext: Extension, compiler: str) -> Extension:
        """The extension together with the object that nvcc makes, and the static runtime."""
        folder = Path(self.build_temp)
        folder.mkdir(parents=True, exist_ok=True)
        object_ = folder / "pivotal_cuda.o"
        each = architectures(compiler)
        code = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in each]
        code.append(f"-gencode=arch=compute_{each[-1]},code=compute_{each[-1]}")
        command = [
            compiler, *COMMON, "--fmad=false", "--threads=0", "-DFGFAST_CUDA",
            "-Xcompiler=-fPIC,-fvisibility=hidden", "-Werror=all-warnings", *code, "-c", "csrc/pivotal_cuda.cu",
            "-o", str(object_),
        ]  # fmt: skip
        self.announce(" ".join(command), level=2)
        try:
            subprocess.run(command, check=True)
        except subprocess.CalledProcessError as error:
            raise CompileError(f"{compiler} exited with {error.returncode}") from error
        self.force = True  # setuptools looks at the C++ sources alone to see whether to link again
        both = copy.deepcopy(ext)
        both.extra_objects.append(str(object_))
        both.define_macros.append(("FGFAST_CUDA", "1"))
        both.library_dirs += library_folders(compiler)
        both.libraries += ["cudart_static", "dl", "rt", "pthread"]
        return both


def library_folders(compiler: str) -> list[str]:
    """Where the toolkit of ``compiler`` keeps its libraries; nvcc itself may be a link or a script somewhere else."""
    said = subprocess.run([compiler, "--dryrun", "-c", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    tops = [Path(line.removeprefix("#$ TOP=").strip()) for line in said.splitlines() if line.startswith("#$ TOP=")]
    return [str(p) for top in tops for p in (top / "lib64", top / "lib", *top.glob("targets/*/lib")) if p.is_dir()]


def extension() -> Extension:
    """The compiled mask sampler; a machine without a compiler goes without it."""
    import pybind11

    flags = [*COMMON, *WARNINGS, "-ffp-contract=off", "-fno-trapping-math", "-fno-math-errno", "-fvisibility=hidden"]
    extra = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g", "-DFGFAST_SANITIZE"] if SANITIZE else []
    return Extension(
        "fgfast._native",
        ["csrc/bindings.cpp", "csrc/pivotal_cpu.cpp"],
        depends=["csrc/pivotal.h", "csrc/pivotal_cuda.cu"],
        include_dirs=["csrc", pybind11.get_include()],
        extra_compile_args=[*flags, *extra],
        extra_link_args=extra[:1],
        language="c++",
        optional=not SANITIZE and os.environ.get("FGFAST_CUDA") != "1",
    )


setup(
    packages=[
        *find_packages(include=["fgfast", "fgfast.*"]),
        "fgfast.kernels",
        *(f"fgfast.kernels.{name}" for name in find_packages("kernels")),
    ],
    package_dir={"fgfast": "fgfast", "fgfast.kernels": "kernels"},
    ext_modules=[] if os.environ.get("FGFAST_NATIVE") == "0" or os.name == "nt" else [extension()],
    cmdclass={"build_ext": Build},
)

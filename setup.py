"""Maps kernels/ to fgfast.kernels and builds fgfast._native from csrc/; everything else is in pyproject.toml.

Environment variables:
    FGFAST_CUDA: 1 requires the CUDA part of the extension, 0 leaves it out (default: built if nvcc works).
    FGFAST_CUDA_ARCHS: compute capabilities to build for, such as "80 90" (default: all from 8.0 on that nvcc supports;
        newer GPUs compile the PTX).
    FGFAST_NATIVE: 0 leaves the extension out.
    FGFAST_SANITIZE: 1 builds its CPU code with AddressSanitizer and UndefinedBehaviorSanitizer.
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
# With -ffp-contract=off and --fmad=false below: every operation rounds once, so masks are the same on CPU and GPU.
COMMON = ["-std=c++17", "-O3"]


def nvcc() -> str | None:
    """The CUDA compiler to use, or None for a build without CUDA."""
    wanted = os.environ.get("FGFAST_CUDA", "")
    if wanted == "0" or SANITIZE:
        return None
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    found = shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")
    if wanted == "1" and found is None:
        sys.exit("FGFAST_CUDA=1, but no nvcc was found: put it on the PATH or set CUDA_HOME.")
    return found


def architectures(compiler: str) -> list[str]:
    """Compute capabilities to build for, without the dot, ascending."""
    wanted = os.environ.get("FGFAST_CUDA_ARCHS", "").replace(".", "").replace(",", " ").replace(";", " ").split()
    listed = subprocess.run([compiler, "--list-gpu-arch"], check=True, capture_output=True, text=True).stdout
    known = {line.removeprefix("compute_") for line in listed.split()}
    if unknown := [a for a in wanted if a not in known]:
        sys.exit(f"FGFAST_CUDA_ARCHS names {unknown[0]}, which {compiler} does not know: choose from {sorted(known)}.")
    return sorted(wanted or (a for a in known if a.isdigit() and int(a) >= 80), key=int)


class Build(build_ext):
    """Compiles the .cu file with nvcc, besides the C++ files."""

    def run(self) -> None:
        """Build, and tag the wheel for every platform if the extension, which is optional, could not be built."""
        super().run()
        if not all(Path(self.get_ext_fullpath(ext.name)).is_file() for ext in self.extensions):
            self.distribution.ext_modules = []
            if wheel := self.distribution.get_command_obj("bdist_wheel", create=False):
                wheel.root_is_pure = True  # set from ext_modules before the build

    def build_extension(self, ext: Extension) -> None:
        """Build with CUDA if that works, otherwise without."""
        compiler = nvcc()
        if compiler is not None:
            try:
                return super().build_extension(self.with_cuda(ext, compiler))
            except (CompileError, LinkError) as error:
                if os.environ.get("FGFAST_CUDA") == "1":
                    raise
                self.warn(f"{ext.name} is built without its CUDA part, which failed to build: {error}")
        super().build_extension(ext)

    def with_cuda(self, ext: Extension, compiler: str) -> Extension:
        """The extension with the object file from nvcc and the static CUDA runtime."""
        folder = Path(self.build_temp)
        folder.mkdir(parents=True, exist_ok=True)
        object_file = folder / "pivotal_cuda.o"
        capabilities = architectures(compiler)
        code = [f"-gencode=arch=compute_{c},code=sm_{c}" for c in capabilities]
        code.append(f"-gencode=arch=compute_{capabilities[-1]},code=compute_{capabilities[-1]}")
        command = [
            compiler, *COMMON, "--fmad=false", "--threads=0", "-DFGFAST_CUDA",
            "-Xcompiler=-fPIC,-fvisibility=hidden", "-Werror=all-warnings", *code, "-c", "csrc/pivotal_cuda.cu",
            "-o", str(object_file),
        ]  # fmt: skip
        self.announce(" ".join(command), level=2)
        try:
            subprocess.run(command, check=True)
        except subprocess.CalledProcessError as error:
            raise CompileError(f"{compiler} exited with {error.returncode}") from error
        self.force = True  # link again: setuptools looks only at the C++ sources to see whether it must
        extended = copy.deepcopy(ext)
        extended.extra_objects.append(str(object_file))
        extended.define_macros.append(("FGFAST_CUDA", "1"))
        extended.library_dirs += library_folders(compiler)
        extended.libraries += ["cudart_static", "dl", "rt", "pthread"]
        return extended


def library_folders(compiler: str) -> list[str]:
    """Library folders of the toolkit of ``compiler``; asked of nvcc, which may be a link or a script elsewhere."""
    output = subprocess.run([compiler, "--dryrun", "-c", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    tops = [Path(line.removeprefix("#$ TOP=").strip()) for line in output.splitlines() if line.startswith("#$ TOP=")]
    return [str(p) for top in tops for p in (top / "lib64", top / "lib", *top.glob("targets/*/lib")) if p.is_dir()]


def extension() -> Extension:
    """The compiled mask sampler and k-means; optional, as a machine may have no compiler."""
    import pybind11

    flags = [*COMMON, *WARNINGS, "-ffp-contract=off", "-fno-trapping-math", "-fno-math-errno", "-fvisibility=hidden"]
    extra = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g", "-DFGFAST_SANITIZE"] if SANITIZE else []
    return Extension(
        "fgfast._native",
        ["csrc/bindings.cpp", "csrc/pivotal_cpu.cpp", "csrc/pyramid_cpu.cpp"],
        depends=["csrc/pivotal.h", "csrc/pyramid.h", "csrc/threads.h", "csrc/pivotal_cuda.cu"],
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

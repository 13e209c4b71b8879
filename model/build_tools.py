"""The tools with which torch.compile builds kernels: a compiler and the headers of Python."""

import os
import shutil
import sys
import sysconfig
from pathlib import Path


def find_build_tools() -> dict[str, str | None]:
    """Returns the path of each tool with which torch.compile builds kernels; None if not found."""
    # The compilers that Triton (C) and PyTorch's Inductor (C++) look for.
    c = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    cxx = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")  # as Triton
    header = Path(sysconfig.get_paths(scheme)["include"], "Python.h")
    return {
        "C compiler": next(filter(None, map(shutil.which, c)), None),
        "C++ compiler": shutil.which(cxx),
        "Python.h": str(header) if header.is_file() else None,
    }


def require_build_tools(device_type: str) -> None:
    """Raises ValueError if torch.compile could not build its kernels for a device.

    On a GPU Triton needs a C compiler; on a CPU Inductor needs a C++ compiler.
    """
    compiler = "C++ compiler" if device_type == "cpu" else "C compiler"
    found = find_build_tools()
    missing = [name for name in (compiler, "Python.h") if found[name] is None]
    if missing:
        raise ValueError(
            f"compile: torch.compile needs a {compiler} and Python.h on this device "
            f"({device_type}), found no {' and no '.join(missing)}; install them (on Debian and "
            "Ubuntu: apt install g++ python3-dev), or use --no-compile"
        )

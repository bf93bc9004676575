#!/usr/bin/env python3
"""Writes stand-ins for the CUDA libraries that candle links. With them a build with the `cuda` feature links and starts
on a machine without a driver.

usage: gen_stubs.py OUT_DIR CUDARC_SOURCE

Every function that cudarc declares becomes one that returns an error code: `Device::new_cuda` then is a plain error.
At run time the real libraries take their place, since the names (SONAMEs) are theirs. Never ship the stand-ins.
"""

import pathlib
import re
import subprocess
import sys

# Library, the name the loader looks for, cudarc's module that declares it, the error code its functions return.
LIBRARIES = [
    ("cuda", "libcuda.so.1", "driver", 34),  # CUDA_ERROR_STUB_LIBRARY
    ("nvrtc", "libnvrtc.so.{major}", "nvrtc", 7),  # NVRTC_ERROR_BUILTIN_OPERATION_FAILURE
    ("curand", "libcurand.so.10", "curand", 203),  # CURAND_STATUS_INITIALIZATION_FAILED
    ("cublas", "libcublas.so.{major}", "cublas", 1),  # CUBLAS_STATUS_NOT_INITIALIZED
    ("cublasLt", "libcublasLt.so.{major}", "cublaslt", 1),
]


def main(out_dir, cudarc, major="13"):
    out_dir = pathlib.Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    for library, soname, module, code in LIBRARIES:
        soname = soname.format(major=major)
        source = (pathlib.Path(cudarc) / "src" / module / "sys" / "mod.rs").read_text()
        functions = re.findall(r"^\s*(?:pub unsafe )?fn ((?:cu|nvrtc)\w+)\s*\(", source, re.M)
        if not functions:
            sys.exit(f"gen_stubs.py: no function of lib{library} found in {cudarc}")
        code = "".join(f"int {name}(void) {{ return {code}; }}\n" for name in sorted(set(functions)))
        command = ["cc", "-x", "c", "-", "-shared", "-fPIC", "-s", f"-Wl,-soname,{soname}", "-o", out_dir / soname]
        subprocess.run(command, input=code.encode(), check=True)
        link = out_dir / f"lib{library}.so"
        link.unlink(missing_ok=True)
        link.symlink_to(soname)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
